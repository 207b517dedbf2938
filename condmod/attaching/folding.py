"""A constant condition folded into the weights beside its sites, where that is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condmod.attaching.layers import is_plain
from condmod.attaching.sites import Placement, Swapped, sites_of, tensors
from condmod.errors import FoldError, ShapeError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_FOLDABLE = (*_LINEAR, *_CONVS, *_TRANSPOSED, *_NORMS, nn.RMSNorm, nn.Embedding)
_POSITIONS = 5


class Affine(NamedTuple):
    """scale·x + shift of each channel, in float64."""

    scale: Tensor
    shift: Tensor


class Change(NamedTuple):
    """A new value for a parameter of a module."""

    module: nn.Module
    key: str
    value: Tensor


# Each parameter with what it was, and its version once folded.
Undo = list[tuple[nn.Module, str, Tensor | None, int]]


class Refused(Exception):  # noqa: N818
    """Why a site cannot be folded."""


def changes(
    module: nn.Module, placement: Placement, modulator: Any, modulation: Any, strength: float
) -> list[Change]:
    """What the weights of a module become when a modulation goes into them.

    Args:
        module: the site's module.
        placement: where the modulator acts.
        modulator: what acts there.
        modulation: of one sample.
        strength: as in a call.

    Raises:
        Refused: it cannot be done exactly, and why.
    """
    if modulator.site_params:
        raise Refused(f"{modulator.name} has parameters that read the features")
    if placement in ("input", "output"):
        affine = _affine(modulator, lambda x: modulator.modulate(x, modulation), strength)
        return _into(module, placement, affine)
    if modulator.reads_weight:
        raise Refused(f"{modulator.name} reads the sublayer's weight")
    own, zero = modulation[0], _probes(modulator)[0]
    enter = _affine(modulator, lambda x: modulator.enter(x, own, None), strength)
    exits = _affine(modulator, lambda y: modulator.exit(zero, y, own, None), strength)
    for x in _probes(modulator)[1:]:
        if not torch.equal(
            modulator.exit(x, zero, own, None), modulator.exit(zero, zero, own, None)
        ):
            raise Refused(f"{modulator.name} adds what the module reads to what it gives")
    first = _into(module, "input", enter)
    held = {(id(change.module), change.key): change.value for change in first}
    second = _into(module, "output", exits, held)
    done = {(id(change.module), change.key) for change in second}
    return [*(c for c in first if (id(c.module), c.key) not in done), *second]


def _probes(modulator: Any) -> list[Tensor]:
    """Features: zeros, ones, and two whose values differ everywhere."""
    site = modulator.site
    own = next(modulator.parameters(), torch.empty(0))
    count = torch.arange(_POSITIONS * site.features, dtype=torch.float64, device=own.device)
    waves = [torch.zeros_like(count), torch.ones_like(count), count.sin(), 3 * (count**1.5).cos()]
    laid = [wave.reshape(1, _POSITIONS, site.features) for wave in waves]
    return [wave if site.channel_dim == -1 else wave.mT.contiguous() for wave in laid]


def _affine(modulator: Any, act: Callable[[Tensor], Tensor], strength: float) -> Affine:
    """The scale and shift of each channel that a pass over the features is.

    Raises:
        Refused: it is something else.
    """
    dim = modulator.site.channel_dim
    try:
        probed = [(x.movedim(dim, -1), act(x).movedim(dim, -1)) for x in _probes(modulator)]
    except ShapeError:
        raise Refused("the condition differs between positions") from None
    shift, scale = probed[0][1][0, 0], (probed[1][1] - probed[0][1])[0, 0]
    for x, y in probed:
        if not torch.allclose(y, x * scale + shift, rtol=1e-10, atol=1e-10):
            raise Refused(f"{modulator.name} is no fixed scale and shift of each channel")
    return Affine(1 + strength * (scale - 1), strength * shift)


def _into(
    module: nn.Module,
    end: Placement,
    affine: Affine,
    held: dict[tuple[int, str], Tensor] | None = None,
) -> list[Change]:
    """A scale and shift of what a module reads or gives, as a change of its weights."""
    if isinstance(module, nn.Sequential) and is_plain(module, nn.Sequential) and len(module):
        return _into(module[0 if end == "input" else -1], end, affine, held)
    if (
        isinstance(module, nn.MultiheadAttention)
        and is_plain(module, nn.MultiheadAttention)
        and end == "output"
    ):
        return _into(module.out_proj, end, affine, held)
    kind = getattr(type(module), "_condmod_base", type(module))
    for key in ("weight", "bias"):
        if kind in _FOLDABLE and hasattr(module, key) and key not in module._parameters:
            raise Refused(f"the {key} of the {type(module).__name__} is made of other parameters")
    where = _Weights(module, held or {})
    if kind in (*_LINEAR, *_CONVS):
        return _output(where, affine) if end == "output" else _input(where, affine)
    if kind in _TRANSPOSED:
        return _transposed(where, end, affine)
    if kind is nn.Embedding and end == "output":
        if module.max_norm is not None:
            raise Refused("the embedding renormalises its weight in use (max_norm)")
        return [Change(module, "weight", where.read("weight") * affine.scale + affine.shift)]
    if kind in (*_NORMS, nn.RMSNorm):
        return _norm(where, end, affine)
    raise Refused(
        f"a {type(module).__name__} has no weight of its own that a scale and shift of what it "
        f"{'reads' if end == 'input' else 'gives'} could go into"
    )


class _Weights:
    """A module's parameters in float64, as they are or as an earlier change leaves them."""

    def __init__(self, module: nn.Module, held: dict[tuple[int, str], Tensor]) -> None:
        self.module: Any = module
        self.held = held

    def read(self, key: str, otherwise: Tensor | None = None) -> Tensor:
        if (id(self.module), key) in self.held:
            return self.held[id(self.module), key]
        own = getattr(self.module, key)
        if own is None:
            assert otherwise is not None
            return otherwise
        value: Tensor = own.detach().double()
        return value

    def bias(self, value: Tensor) -> list[Change]:
        """The change of the bias, if there is one or one is needed."""
        if self.module.bias is None and not value.any():
            return []
        return [Change(self.module, "bias", value)]


def _spread(vector: Tensor, weight: Tensor, dim: int) -> Tensor:
    """A vector along one dim of a weight."""
    shape = [1] * weight.ndim
    shape[dim] = -1
    return vector.reshape(shape)


def _output(where: _Weights, affine: Affine) -> list[Change]:
    weight = where.read("weight")
    bias = where.read("bias", torch.zeros_like(affine.shift)) * affine.scale + affine.shift
    changed = weight * _spread(affine.scale, weight, 0)
    return [Change(where.module, "weight", changed), *where.bias(bias)]


def _input(where: _Weights, affine: Affine) -> list[Change]:
    module, weight = where.module, where.read("weight")
    groups = getattr(module, "groups", 1)
    padded = getattr(module, "padding_mode", "") == "zeros" and module.padding not in (
        "valid",
        (0,) * (weight.ndim - 2),
    )
    if padded and affine.shift.any():
        raise Refused("zeros that the convolution pads with would be shifted, too")
    per_group = affine.scale.reshape(groups, 1, -1)
    shape = (groups, weight.shape[0] // groups, weight.shape[1], *weight.shape[2:])
    split = weight.reshape(shape)
    extra = (None,) * (weight.ndim - 2)
    changed = (split * per_group[(..., *extra)]).reshape(weight.shape)
    moved = (split * affine.shift.reshape(groups, 1, -1)[(..., *extra)]).flatten(2).sum(2).flatten()
    bias = where.read("bias", torch.zeros_like(moved)) + moved
    return [Change(module, "weight", changed), *where.bias(bias)]


def _transposed(where: _Weights, end: Placement, affine: Affine) -> list[Change]:
    module, weight = where.module, where.read("weight")
    if end == "input":
        if affine.shift.any():
            raise Refused("a shift of what a transposed convolution reads differs at its borders")
        return [Change(module, "weight", weight * _spread(affine.scale, weight, 0))]
    split = weight.reshape(module.groups, -1, *weight.shape[1:])
    scale = affine.scale.reshape(module.groups, 1, -1, *(1,) * (weight.ndim - 2))
    bias = where.read("bias", torch.zeros_like(affine.shift)) * affine.scale + affine.shift
    changed = (split * scale).reshape(weight.shape)
    return [Change(module, "weight", changed), *where.bias(bias)]


def _norm(where: _Weights, end: Placement, affine: Affine) -> list[Change]:
    module = where.module
    if end == "input":
        raise Refused(f"the {type(module).__name__} normalises what it reads")
    ones = torch.ones_like(affine.scale)
    weight = where.read("weight", ones) * affine.scale
    if not hasattr(module, "bias"):
        if affine.shift.any():
            raise Refused(f"a {type(module).__name__} has no bias, which the shift would go into")
        return [Change(module, "weight", weight)]
    bias = where.read("bias", 0 * ones) * affine.scale + affine.shift
    return [Change(module, "weight", weight), Change(module, "bias", bias)]


def fold(
    base: nn.Module,
    sites: Mapping[str, tuple[nn.Module, Swapped]],
    held: Mapping[str, tuple[Any, Any]],
    strength: float,
) -> Undo:
    """Write modulations of one sample into the weights at their sites, all of them or none.

    Args:
        base: the model.
        sites: the module of every site, and the site.
        held: the modulator and the modulation of every site.
        strength: as in a call.

    Raises:
        FoldError: which sites cannot be folded exactly, and why; nothing is changed.
    """
    users: dict[Any, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        users.setdefault(_storage(parameter), []).append(name)
    wanted: list[Change] = []
    taken: dict[tuple[int, str], str] = {}
    problems: dict[str, list[str]] = {}
    for name, (modulator, modulation) in held.items():
        try:
            if name not in sites:
                raise Refused("its module is no longer in the model")
            module, site = sites[name]
            if sites_of(module)[0] is not site:
                raise Refused("another attachment acts there first")
            if any(leaf.shape[0] != 1 for leaf in tensors(modulation)):
                raise Refused("the condition has more than one sample")
            found = changes(module, site.placement, modulator, modulation, strength)
            for change in found:
                others = users.get(_storage(getattr(change.module, change.key)), [])
                if len(others) > 1:
                    raise Refused(f"its {change.key} is shared: {', '.join(others)}")
                if any(other is not site for other in sites_of(change.module)):
                    raise Refused("another site acts where it would go")
                if (other := taken.setdefault((id(change.module), change.key), name)) != name:
                    raise Refused(f"{other} goes into the same {change.key}")
            wanted += found
        except Refused as reason:
            problems.setdefault(str(reason), []).append(name)
    if problems:
        told = "; ".join(f"{_few(names)}: {reason}" for reason, names in problems.items())
        raise FoldError(f"the condition cannot be folded: {told}")
    floating = (p for p in base.parameters() if p.is_floating_point())
    return _apply(wanted, next(floating, torch.empty(0)))


def _storage(parameter: Any) -> Any:
    """What parameters that share their values have in common."""
    if parameter is None or parameter.is_meta:
        return id(parameter)
    return parameter.untyped_storage().data_ptr() or id(parameter)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _apply(made: list[Change], like: Tensor) -> Undo:
    """Write changes into the parameters; gives what was there.

    Args:
        made: the changes.
        like: what a parameter is like that a module without any gets.
    """
    before: Undo = []
    with torch.no_grad():
        for module, key, value in made:
            own = getattr(module, key)
            was = None if own is None else own.detach().clone()
            if own is None:
                sibling: Any = module.weight if module.weight is not None else like
                own = nn.Parameter(value.to(sibling), sibling.requires_grad)
                setattr(module, key, own)
            else:
                own.copy_(value)
            before.append((module, key, was, own._version))
    return before


def undo(before: Undo) -> None:
    """Put back what `fold` replaced, bit for bit.

    Raises:
        FoldError: a parameter has changed since; nothing is put back.
    """
    for module, key, _, version in before:
        own = getattr(module, key)
        if own is None or own._version != version:
            raise FoldError(
                f"the {key} of a {type(module).__name__} has changed since the fold, by training "
                "or by a later fold; unfold that first"
            )
    with torch.no_grad():
        for module, key, value, _ in reversed(before):
            if value is None:
                setattr(module, key, None)
            else:
                getattr(module, key).copy_(value)
