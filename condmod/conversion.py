"""Parameters from a published layout into a component's own, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condmod.bank import Bank
from condmod.build import SpecLike, configure
from condmod.codec import Codec, Layout, Shares, same
from condmod.component import Component
from condmod.config import ComponentConfig
from condmod.errors import CodecError
from condmod.registry import Registry, active_registry
from condmod.spec import nearest, show

_SHOWN = 40  # keys of an error: a component's own, and not a whole model's


def convert(
    component: nn.Module | SpecLike,
    source: str,
    state_dict: Mapping[str, Tensor],
    *,
    inverse: bool = False,
    registry: Registry | None = None,
) -> dict[str, Tensor]:
    """Move parameters from a published layout into ours, or back; no value changes.

    Args:
        component: a modulator, whose shapes are then checked too, or its spec; or a bank, whose
            sites the source's keys then begin with, as in "blocks.0.adaLN_modulation.1.weight"; or
            a model that holds such, whose other keys are the source's own.
        source: a name that the component has a codec for, as in "dit"; `condmod show NAME` lists
            them.
        state_dict: exactly the parameters (and buffers) of the component, by the source's keys;
            by ours where `inverse`.
        inverse: from ours to the source's.
        registry: where the component's plugin is looked up.

    Returns:
        A state dict for `load_state_dict(..., strict=True)`.

    Raises:
        CodecError: the source is unknown or reads an option otherwise, keys are missing or
            surplus (all are listed), a shape does not fit, or what is one tensor in the model
            comes with two values.
    """
    if not isinstance(state_dict, Mapping):
        raise CodecError(f"parameters come as a state dict; got {type(state_dict).__name__}")
    registry = active_registry() if registry is None else registry
    if isinstance(component, nn.Module) and not isinstance(component, Component | Bank):
        where = type(component).__name__
        layouts = _layouts_of_model(where, component, source, registry)
    else:
        config = _config(component, registry)
        where = component.where() if isinstance(component, Component) else config.component_name()
        layouts = _layouts_of(config, component, _find(config, source, registry))
    shapes = _shapes(component)
    ways = [
        (layout.ours, layout.theirs) if inverse else (layout.theirs, layout.ours)
        for layout in layouts
    ]
    ways = [way for way in ways if not _left_out(way[0], state_dict)]
    _check_keys(where, [key for given, _ in ways for key in given], state_dict, source, inverse)
    converted: dict[str, Tensor] = {}
    for given, wanted in ways:
        shares = _split(where, given, state_dict)
        for key, names in wanted.items():
            parts = [shares[name] for name in names]
            converted[key] = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        came = ", ".join(f"{key} {tuple(state_dict[key].shape)}" for key in given)
        for key in given if inverse else wanted:
            value = state_dict[key] if inverse else converted[key]
            if key in shapes and value.shape != shapes[key]:
                raise CodecError(f"{where}: {key} is {tuple(shapes[key])} here; got {came}")
    if isinstance(component, nn.Module):
        _check_ties(where, component, state_dict if inverse else converted)
    return converted


def _config(component: Any, registry: Registry) -> ComponentConfig:
    if isinstance(component, Component | Bank):
        config: ComponentConfig = component.config
        return config
    return configure(component, role="modulator", registry=registry)


def _find(config: ComponentConfig, source: str, registry: Registry) -> Codec:
    name = config.component_name()
    known = {codec.source: codec for codec in registry.codecs(name)}
    if source not in known:
        listed = f"; it has {', '.join(known)}" if known else ": it has none"
        raise CodecError(f"{name} has no codec for {source!r}{nearest(source, known) or listed}")
    for option, value in known[source].requires.items():
        if (held := getattr(config, option)) != value:
            raise CodecError(
                f"{config} reads {source}'s parameters otherwise: its codec is for "
                f"{option}={show(value)}, not {option}={show(held)}"
            )
    return known[source]


def _layouts_of_model(
    where: str, model: nn.Module, source: str, registry: Registry
) -> list[Layout]:
    """Of each component, by its place in the model, and of every other key, which both share.

    Of a bank the source's keys begin where the module that holds it stands, as its sites do.
    """
    layouts: list[Layout] = []
    held: tuple[str, ...] = ()
    for place, part in model.named_modules(remove_duplicate=False):
        if not isinstance(part, Component | Bank) or place.startswith(held):
            continue
        held += (f"{place}.",)
        codec = _find(part.config, source, registry)
        beside = codec.beside or isinstance(part, Bank)
        theirs = place.rpartition(".")[0] if beside else place
        layouts += [
            Layout(_under(place, layout.ours), _under(theirs, layout.theirs))
            for layout in _layouts_of(part.config, part, codec)
        ]
    if not layouts:
        raise CodecError(
            f"{where} holds no modulator, so it has no keys to convert: load the state dict as it "
            "is, or give the model that holds the modulators"
        )
    layouts += [same(key, key) for key in model.state_dict() if not key.startswith(held)]
    counts = Counter(key for layout in layouts for key in layout.theirs)
    if twice := sorted(key for key, count in counts.items() if count > 1):
        raise CodecError(
            f"{where}: two of its parameters are {', '.join(twice)} as {source} has them; give "
            "the modulator or the other module another place"
        )
    return layouts


def _under(place: str, side: Shares) -> Shares:
    """The keys as they are in the whole model."""
    return {f"{place}.{key}" if place else key: names for key, names in side.items()}


def _layouts_of(config: ComponentConfig, component: Any, codec: Codec) -> list[Layout]:
    """Those of one component, spec or bank, checked."""
    layouts = list(_layouts(codec, config, component))
    _check_codec(codec, layouts, _shapes(component))
    return layouts


def _layouts(codec: Codec, config: ComponentConfig, component: Any) -> Iterator[Layout]:
    """Every layout; of a bank those of each site, of all sites joined, and of what they share."""
    if not isinstance(component, Bank):
        yield from codec.layout(config)
        yield from codec.joined(config)
        return
    for layout in codec.shared(config):
        yield Layout({f"shared.{key}": names for key, names in layout.ours.items()}, layout.theirs)
    for layout in codec.joined(config):
        ours, theirs = {}, {}
        for name in component:
            for key, names in layout.ours.items():
                ours[f"{component.prefix(name)}.{key}"] = [f"{name} {share}" for share in names]
        for key, names in layout.theirs.items():
            theirs[key] = [f"{name} {share}" for name in component for share in names]
        yield Layout(ours, theirs)
    for name in component:
        for layout in codec.layout(config):
            yield Layout(
                {f"{component.prefix(name)}.{key}": names for key, names in layout.ours.items()},
                {f"{name}.{key}": names for key, names in layout.theirs.items()},
            )


def _check_codec(codec: Codec, layouts: Sequence[Layout], shapes: Mapping[str, torch.Size]) -> None:
    """A codec names the same shares on both sides, and all parameters of a built component."""
    wrong = []
    for layout in layouts:
        ours, theirs = (
            sorted(share for names in side.values() for share in names)
            for side in (layout.ours, layout.theirs)
        )
        if ours != theirs or len(set(ours)) < len(ours):
            wrong.append(f"{', '.join(layout.ours)} has the shares {ours} here, {theirs} there")
    keys = {key for layout in layouts for key in layout.ours}
    if shapes and keys != set(shapes):
        differing = sorted(keys ^ set(shapes))
        wrong.append(f"its keys and the component's differ in {', '.join(differing)}")
    if wrong:
        raise CodecError(
            f"the codec of {codec.component} for {codec.source!r} is wrong: {'; '.join(wrong)}"
        )


def _left_out(given: Shares, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether it is a count of batches that old checkpoints lack, and torch fills in by itself."""
    return all(key.endswith("num_batches_tracked") and key not in state_dict for key in given)


def _check_keys(
    where: str, keys: Sequence[str], state_dict: Mapping[str, Tensor], source: str, inverse: bool
) -> None:
    found = [
        f"{what}: {_listed(sorted(names))}"
        for what, names in (
            ("missing", set(keys) - set(state_dict)),
            ("unknown", {str(key) for key in state_dict} - set(keys)),
        )
        if names
    ]
    if found:
        side = f"of condmod, to be laid out as {source}'s" if inverse else f"as {source} has them"
        raise CodecError(f"{where}: these are not its parameters {side}; {'; '.join(found)}")


def _listed(names: Sequence[str]) -> str:
    """All of them, or the first of very many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _split(where: str, given: Shares, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shares of the rows, by name, all of one shape."""
    shares: dict[str, Tensor] = {}
    for key, names in given.items():
        value = state_dict[key]
        if not isinstance(value, Tensor):
            raise CodecError(f"{where}: {key} is a tensor; got {type(value).__name__}")
        if len(names) > 1 and (value.ndim == 0 or value.shape[0] % len(names)):
            raise CodecError(
                f"{where}: the rows of {key} {tuple(value.shape)} are no {len(names)} equal "
                f"shares ({', '.join(names)})"
            )
        parts = (value,) if len(names) == 1 else value.chunk(len(names))
        shares.update(zip(names, parts, strict=True))
    if len({part.shape for part in shares.values()}) > 1:
        listed = ", ".join(f"{name} {tuple(part.shape)}" for name, part in shares.items())
        raise CodecError(f"{where}: the shares of {', '.join(given)} differ in shape: {listed}")
    if len({(part.dtype, part.device) for part in shares.values()}) > 1:
        listed = ", ".join(f"{name} {part.dtype} on {part.device}" for name, part in shares.items())
        raise CodecError(f"{where}: the shares of {', '.join(given)} differ in kind: {listed}")
    return shares


def _check_ties(where: str, model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """What is one tensor here comes with one value, however many keys it has."""
    first: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if key not in held:  # a count of batches, left out
            continue
        other = first.setdefault(id(value), key)
        one, two = held[other], held[key]
        if one.is_meta or two.is_meta:  # no values to compare
            continue
        if other != key and not torch.equal(one, two.to(one.device)):
            raise CodecError(f"{where}: {other} and {key} are one tensor here; got two that differ")


def _shapes(component: Any) -> dict[str, torch.Size]:
    if not isinstance(component, nn.Module):
        return {}
    held = component.state_dict()  # an extra state may be anything
    return {key: value.shape for key, value in held.items() if isinstance(value, Tensor)}
