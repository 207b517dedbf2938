"""Which modulator goes where in a model: `plan` says it and touches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import nn

from condmod.attaching.example import Observed
from condmod.attaching.layers import Features, Unknown, first_argument, infer
from condmod.attaching.patterns import match, named_modules
from condmod.attaching.planned import Plan, PlannedSite, Start
from condmod.attaching.sites import Placement
from condmod.attaching.starting import check_starts
from condmod.build import SpecLike, configure, create_encoder
from condmod.config import EncoderConfig, ModulatorConfig
from condmod.errors import SiteError, SpecError
from condmod.modulator import Modulator
from condmod.site import Site
from condmod.spec import call


def plan(
    model: nn.Module,
    patterns: Mapping[str, Any],
    *,
    condition_dim: int | None = None,
    encoder: SpecLike | None = None,
    example: Any = None,
    start: Start = "base",
) -> Plan:
    """Say what `attach` would put where; nothing is touched.

    Args:
        model: any model.
        patterns: by pattern a spec, or a tuple of a spec with a placement ("input", "output",
            "around" or "weight"; by default a modulator of features conditions a module's output,
            one that acts around sublayers the module, and one that reads a layer's weight that)
            or with a `Site` that says the features by hand, or
            with both. A pattern is a dotted glob, * within a segment and ** across, or "re:" and
            an expression for the whole name, or "type:" and a class.
        condition_dim: D, the width of the condition.
        encoder: spec of what turns raw signals into the condition; its width is D.
        example: what the model takes, a tensor, a tuple of arguments or a mapping of keywords: it
            runs once, so that features that no class tells are seen.
        start: "base" makes the model start as it was, bit for bit; "published" keeps each
            mechanism's own start.

    Raises:
        SiteError: a pattern that matches nothing, two that overlap, features that cannot be
            inferred, a component that cannot start as the base.
        SpecError: as `configure`.
    """
    check_model(model)
    if start not in get_args(Start):
        raise SiteError(f"start is 'base' or 'published'; got {start!r}")
    if not isinstance(patterns, Mapping) or not patterns:
        raise SiteError(
            "patterns are specs by pattern, as in {'blocks.*.norm1': 'film'}; got "
            f"{type(patterns).__name__ if not isinstance(patterns, Mapping) else 'none'}"
        )
    encoding = None
    if encoder is not None:
        encoding = cast(EncoderConfig, configure(encoder, role="encoder"))
        with torch.device("meta"):
            condition_dim = create_encoder(encoding, condition_dim).out_dim
    modules = named_modules(model)
    observed = None if example is None else Observed(model, modules, example)
    sites: list[PlannedSite] = []
    owners: dict[int, tuple[str, str]] = {}
    users = _users(modules)
    for pattern, choice in patterns.items():
        config, placement, given = _chosen(pattern, choice)
        config = _one_part(config)
        config = config if start == "published" else starting_as_base(config)
        for name in match(pattern, modules):
            module = modules[name]
            if (held := owners.setdefault(id(module), (pattern, name))) != (pattern, name):
                if held[0] == pattern:  # one module under two names
                    continue
                raise SiteError(
                    f"the patterns {held[0]!r} and {pattern!r} both match {name!r}; a module has "
                    "one site in an attachment: narrow one, or attach twice under two names"
                )
            _reached(name, modules, observed)
            if given is not None and given.condition_dim not in (None, condition_dim):
                raise SiteError(
                    f"the Site of {pattern!r} says condition_dim={given.condition_dim}, the "
                    f"attachment {condition_dim}; say it to plan or attach alone"
                )
            found = _features(pattern, name, module, placement, given, observed)
            if placement == "weight":
                _check_weight(name, module, config, users)
            site = _site(config, name, found, condition_dim, encoding)
            base = getattr(type(module), "_condmod_base", type(module)).__name__
            sites.append(
                PlannedSite(base, pattern, config, placement, site, found.argument, found.item)
            )
    base = sum(parameter.numel() for parameter in model.parameters())
    if encoding is None and condition_dim and not any(s.site.condition_dim for s in sites):
        raise SiteError(
            "no modulator of the plan takes a condition of a width: they have encoders of their "
            f"own, or read the features alone; leave out condition_dim={condition_dim}"
        )
    if encoding is not None and all(s.config.component.kinds == {"self"} for s in sites):
        raise SiteError(
            f"every modulator of the plan reads the features alone, and none takes what "
            f"encoder={str(encoding)!r} gives; leave it out"
        )
    made = Plan(tuple(sites), condition_dim, encoding, start, base)
    made.parameters()  # says what does not fit before anything is built
    if start == "base":
        check_starts((planned.config, planned.site) for planned in sites)
    return made


def check_model(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        SiteError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise SiteError(f"a model is a torch.nn.Module; got {model!r:.80}")


def starting_as_base(config: ModulatorConfig) -> ModulatorConfig:
    """The same options with those unsaid that a component needs to start as the base.

    Raises:
        SiteError: they contradict the options that were said.
    """
    options = {name: getattr(config, name) for name in config.model_fields_set}
    for name, value in config.component.as_base(config).items():
        options.setdefault(name, value)
    inner = getattr(config, "inner", None)
    if isinstance(inner, ModulatorConfig):
        options["inner"] = starting_as_base(inner)
    try:
        return type(config).from_options(options)
    except SpecError as error:
        rule = str(error).partition("\n")[0]
        raise SiteError(
            f"{config} cannot start as the base: {rule}; leave that option out, or ask for "
            "start='published'"
        ) from None


def _chosen(pattern: str, choice: Any) -> tuple[ModulatorConfig, Placement, Site | None]:
    """The config, placement and hand-written site of a pattern."""
    spec, *rest = choice if isinstance(choice, tuple | list) else (choice,)
    config = cast(ModulatorConfig, configure(spec, role="modulator"))
    placement: Any = ""
    given = None
    for item in rest:
        if isinstance(item, Site) and given is None:
            given = item
        elif item in get_args(Placement) and not placement:
            placement = item
        else:
            raise SiteError(
                f"the pattern {pattern!r} has a spec, or a tuple of a spec with a placement "
                f"('input', 'output', 'around' or 'weight') or a Site; got {item!r:.80}"
            )
    placement = placement or fitting(config)[-1]
    check_placement(config, placement, pattern)
    return config, placement, given


def check_placement(config: ModulatorConfig, placement: Placement, pattern: str) -> None:
    """Check that a modulator can act where it is placed.

    Raises:
        SiteError: it turns features into features and is placed around, or the reverse.
    """
    fit = fitting(config)
    if placement not in fit:
        what = {
            "output": "turns features into features",
            "around": "acts around a sublayer",
            "weight": "reads a layer's weight",
        }[fit[-1]]
        raise SiteError(
            f"{config.component_name()} {what}, so its placement is "
            f"{' or '.join(map(repr, fit))}; the pattern {pattern!r} says {placement!r}"
        )


def fitting(config: ModulatorConfig) -> tuple[Placement, ...]:
    """The placements at which a modulator can act; the last is its default."""
    if issubclass(config.component, Modulator):
        return "input", "output"
    return ("weight",) if config.component.reads_weight else ("around",)


def _one_part(config: ModulatorConfig) -> ModulatorConfig:
    """The same options for one sublayer, where it is not said how many.

    Raises:
        SiteError: it serves several.
    """
    said = {name: getattr(config, name) for name in config.model_fields_set}
    if "parts" in type(config).model_fields:
        if said.get("parts", 1) == 1:
            return type(config).from_options({**said, "parts": 1})
        one = call(config.component_name(), {**config.changed(), "parts": 1})
        raise SiteError(
            f"{config} serves {said['parts']} sublayers at once, and a site is around one module; "
            f"say {one}"
        )
    parts = getattr(config.component, "parts", 1)
    if parts != 1:
        raise SiteError(
            f"{config} serves {parts} sublayers at once, and a site is around one module"
        )
    return config


def _reached(name: str, modules: Mapping[str, nn.Module], observed: Observed | None) -> None:
    """Refuse a module that the model never calls.

    Raises:
        SiteError: why it is not called.
    """
    above = modules.get(name.rpartition(".")[0])
    if isinstance(above, nn.MultiheadAttention):
        raise SiteError(
            f"the site {name!r} would never act: MultiheadAttention reads its projection's weight "
            "and does not call it; place the site on the attention's output"
        )
    parts = name.split(".")
    for depth in range(1, len(parts)):
        above = modules.get(".".join(parts[:depth]))
        blocks = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        if isinstance(above, blocks) and not above.self_attn.batch_first:
            raise SiteError(
                f"no site can stand at {name!r}: it lies in a {type(above).__name__} with "
                "batch_first=False, which has its batch at dim 1"
            )
    if observed is not None and not observed.called(modules[name]):
        raise SiteError(f"the site {name!r} would never act: the example does not reach it")


def _features(
    pattern: str,
    name: str,
    module: nn.Module,
    placement: Placement,
    given: Site | None,
    observed: Observed | None,
) -> Features:
    """The features at a module: as said by hand, known of its class, or seen on the example.

    Raises:
        SiteError: none of them tells.
    """
    if given is not None:
        known = infer(module, placement)
        said = (given.features, given.channel_dim)
        out = given.out_features
        if out not in (None, given.features) and placement in ("input", "output"):
            raise SiteError(
                f"the Site of {pattern!r} says features={said[0]} and out_features={out}; at the "
                f"{placement} of {name!r} there is one width, say it as features"
            )
        if isinstance(known, Features) and known.channel_dim == said[1]:
            if known.features != said[0]:
                raise SiteError(
                    f"the Site of {pattern!r} says features={said[0]}, but {name!r} "
                    f"({type(module).__name__}) has {known.features}"
                )
            if out not in (None, known.gives):
                raise SiteError(
                    f"the Site of {pattern!r} says out_features={out}, but {name!r} "
                    f"({type(module).__name__}) gives {known.gives}"
                )
            return known
        out = None if out == given.features else out
        if isinstance(known, Features):
            return Features(*said, known.argument, known.item, out)
        return Features(*said, first_argument(module), 0, out)
    found = infer(module, placement)
    if isinstance(found, Unknown) and observed is not None:
        seen = observed.infer(module, placement)
        found = seen if isinstance(seen, Features) else Unknown(f"{found}; {seen}")
    if isinstance(found, Unknown):
        how = "" if observed is not None else "give an example=..., or "
        raise SiteError(
            f"the features at {name!r} ({type(module).__name__}) cannot be inferred: {found}; "
            f"{how}say them: {{{pattern!r}: (spec, condmod.Site(features=..., channel_dim=...))}}"
        )
    if isinstance(found, str):
        raise SiteError(f"no site can stand at {name!r} ({placement}): {found}")
    return found


def _site(
    config: ModulatorConfig,
    name: str,
    found: Features,
    condition_dim: int | None,
    encoder: EncoderConfig | None,
) -> Site:
    """The site of one module.

    Raises:
        SiteError: the component and the attachment's condition do not belong together.
    """
    owns = bool(config.component.kinds & {"raw", "self"})
    if "raw" in config.component.kinds and encoder is not None:
        raise SiteError(
            f"{config} has an encoder of its own; leave out encoder={str(encoder)!r}, or attach "
            "what it holds inside"
        )
    if not owns and condition_dim is None:
        raise SiteError(
            f"{config} needs the width of its condition: say condition_dim=..., or encoder=..."
        )
    out = found.out_features
    if out is not None and not config.component.changes_width:
        raise SiteError(
            f"no site can stand at {name!r} (around): it turns {found.features} features into "
            f"{out}, and what acts around it keeps their number"
        )
    width = None if owns else condition_dim
    return Site(found.features, width, found.channel_dim, out_features=out, name=name)


def _users(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """The names under which each parameter stands, by its id."""
    users: dict[int, list[str]] = {}
    for name, module in {id(module): (name, module) for name, module in modules.items()}.values():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(id(parameter), []).append(f"{name}.{key}")
    return users


def _check_weight(
    name: str, module: nn.Module, config: ModulatorConfig, users: Mapping[int, list[str]]
) -> None:
    """Check that a modulator can read a module's weight, and no other module has it.

    Raises:
        SiteError: why not.
    """
    reason = config.component.refuses_layer(module)
    others = users.get(id(getattr(module, "weight", None)), [])
    if not reason and len(others) > 1:
        reason = (
            f"its weight is shared ({', '.join(others)}), and only one of these would be "
            "conditioned; untie them, or place a modulator of features there"
        )
    if reason:
        raise SiteError(f"{config.component_name()} cannot stand at {name!r} (weight): {reason}")
