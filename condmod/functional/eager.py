"""The passes as torch's own ops: one formula, and on a CPU the sequence of ops that costs least.

Shapes: B batch, C features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from condmod.errors import ShapeError
from condmod.functional.layout import (
    HALVES,
    SMALL,
    Pass,
    align,
    check_floating,
    in_layout_of,
    is_eager,
    is_recorded,
    placed,
    unhalved,
    widened,
    widest,
)
from condmod.functional.norms import Norm
from condmod.functional.parts import PLUS, GateForm, Indexed, Leaf, ScaleForm, read

Vectors = tuple[Tensor | None, Tensor | None]

LARGE = 1 << 18
"""Elements of a sample from which half precision is widened within an op alone."""
SAMPLE = 1 << 14
"""Elements of a sample from which it is worth a norm of its own."""


class Affine(NamedTuple):
    """What is done with features: m(scale)·norm(x) + shift, and x once more as residual.

    Attributes:
        scale: a leaf, or None for a factor of 1.
        shift: a leaf, or None for 0.
    """

    scale: Leaf | None
    shift: Leaf | None
    channel_dim: int
    form: ScaleForm | GateForm
    norm: Pass | None
    where: Callable[[], str]
    residual: bool = False

    def views(self, x: Tensor) -> list[Tensor]:
        """The leaves as they broadcast against x."""
        scale, shift, dim, where = self.scale, self.shift, self.channel_dim, self.where
        found = [] if scale is None else [align(x, scale, dim, where=where)]
        if shift is not None:
            found.append(align(x, shift, dim, where=where))
        return found

    def check(self, x: Tensor) -> None:
        """Check that the norm is one of these features.

        Raises:
            ShapeError: the features are not floating, or the norm is of others.
        """
        check_floating(x, self.where)
        if isinstance(self.norm, Norm):
            try:
                self.norm.check(x)
            except ShapeError as error:
                raise placed(error, self.where) from None

    def read(self, views: Sequence[Tensor], dtype: torch.dtype) -> Vectors:
        """Factor and shift in a dtype."""
        wide = [view if view.dtype == dtype else view.to(dtype) for view in views]
        if self.scale is None:
            return None, wide[0]
        shift = None if self.shift is None else wide[1]
        if self.residual and self.form in PLUS:
            return wide[0] + (PLUS[self.form] + 1), shift
        factor = read(self.form, wide[0])
        return factor + 1 if self.residual else factor, shift

    @property
    def is_global(self) -> bool:
        """Whether the leaves are (B, C)."""
        return not any(
            isinstance(leaf, Indexed) or (leaf is not None and leaf.ndim != 2)
            for leaf in (self.scale, self.shift)
        )


def affine(x: Tensor, by: Affine) -> Tensor:
    """m(scale)·norm(x) + shift in the ops that cost least for this dtype, layout and device."""
    if x.numel() <= SMALL or x.ndim < 3 or not is_eager(x) or not x.is_contiguous():
        return plain_affine(x, by)
    by.check(x)
    views = by.views(x)
    y = _global(x, by, views) if by.is_global else None
    if y is None and _keeps_halves(x, by, views):
        y = _scaled(x, by, views)
    return plain_affine(x, by) if y is None else y


def plain_affine(x: Tensor, by: Affine) -> Tensor:
    """m(scale)·norm(x) + shift as one formula, which a compiler fuses."""
    h = widened(x, by.norm, by.where)
    norm = by.norm  # whose listeners may hold what it gave
    own = h.dtype != x.dtype if norm is None else type(norm) is Norm and norm.is_bare()
    y = _scaled(h, by, by.views(x), own=own)
    return in_layout_of(x, y if y.dtype == x.dtype else y.to(x.dtype))


def gate(x: Tensor, y: Tensor, by: Affine) -> Tensor:
    """X + g(gate)·norm(y) in the ops that cost least here."""
    if x.dtype in HALVES and x.dtype == y.dtype and is_eager(x):
        views = by.views(x)
        if _keeps_halves(x, by, views):
            return in_layout_of(x, torch.addcmul(x, y, views[0]))
    return plain_gate(x, y, by)


def plain_gate(x: Tensor, y: Tensor, by: Affine) -> Tensor:
    """X + g(gate)·norm(y) as one formula."""
    h = widened(x, None, by.where)
    factor, _ = by.read(by.views(x), h.dtype)
    assert factor is not None
    branch = widened(y, by.norm, by.where).to(h.dtype)
    if is_recorded(h, branch, factor) and h.is_contiguous():  # addcmul's backward has a pass more
        joined = branch * factor
        joined = joined.add_(h) if is_eager(joined) else joined + h
    else:
        joined = torch.addcmul(h, branch, factor)
    return in_layout_of(x, joined.to(x.dtype))


def plain_gate_affine(x: Tensor, y: Tensor, by: Affine, then: Affine) -> tuple[Tensor, Tensor]:
    """A gate and the affine behind it, as one formula."""
    joined = plain_gate(x, y, by)
    return joined, plain_affine(joined, then)


def _scaled(h: Tensor, by: Affine, views: Sequence[Tensor], *, own: bool = False) -> Tensor:
    """Factor·h + shift, in place of h where it is the pass's own and no gradient needs it."""
    own = own and not is_recorded(h, *views) and is_eager(h)
    if own and len(views) == 2 and by.form == "one_plus" and not by.residual:
        scale, added = (view.to(h.dtype) for view in views)
        if scale.shape == h.shape:  # a factor would be as large as the features
            return h.addcmul_(h, scale).add_(added)
    factor, shift = by.read(views, h.dtype)
    if factor is None or shift is None:
        y = h if factor is None else h * factor
        return y if shift is None else y + shift
    if is_recorded(h, factor, shift):
        if h.dtype in HALVES:
            return torch.addcmul(shift, h, factor)  # rounds once
        y = h * factor  # addcmul's backward has a pass more
        return y.add_(shift) if is_eager(y) else y + shift
    if own:
        return torch.addcmul(shift, h, factor, out=h)
    spare = factor is not views[0] and factor.shape == h.shape and factor.stride() == h.stride()
    return torch.addcmul(shift, h, factor, out=factor if spare and is_eager(h) else None)


def _global(x: Tensor, by: Affine, views: Sequence[Tensor]) -> Tensor | None:
    """One vector per sample: a norm's own affine does it, or that of a batch norm at rest."""
    norm, first = by.norm, by.channel_dim == 1
    half, each = x.dtype in HALVES, x[0].numel()
    if norm is None:
        if first:
            return _by_channels(x, by, views)
        wide = half and not _keeps_halves(x, by, views)
        return _by_rows(x, by, views) if wide and each > LARGE else None
    if type(norm) is not Norm or not norm.is_bare():
        return None
    if norm.kind in {"group", "instance"} and first:
        return _by_groups(x, by, views, norm)
    if norm.kind != "layer" or first:
        return None
    recorded = is_recorded(x, *views, *norm.own(x.dtype))
    if half and recorded:  # torch sums the gradients of a layer norm's affine in half precision
        return None
    apart = len(x) == 1 or (each >= SAMPLE and (recorded or half))
    return _by_samples(x, by, views, norm) if apart else None


def _by_channels(x: Tensor, by: Affine, views: Sequence[Tensor]) -> Tensor:
    """Channels first: a batch norm of B·C channels with mean 0 and variance 1, in one pass."""
    factor, shift = _vectors(x, by, views)
    rows = factor.numel()
    zeros, ones = torch.zeros_like(factor), torch.ones_like(factor)
    y = F.batch_norm(x.reshape(1, rows, -1), zeros, ones, factor, shift, eps=0.0)
    return y.view(x.shape)


def _by_groups(x: Tensor, by: Affine, views: Sequence[Tensor], norm: Norm) -> Tensor:
    """Channels first: one group norm of the groups of all samples."""
    weight, bias = _vectors(x, by, views, norm)
    groups = len(x) * norm.groups
    y = F.group_norm(x.reshape(1, weight.numel(), -1), groups, weight, bias, norm.eps)
    return y.view(x.shape)


def _by_samples(x: Tensor, by: Affine, views: Sequence[Tensor], norm: Norm) -> Tensor:
    """Channels last: a layer norm for each sample, whose affine is its modulation."""
    shape = (norm.features,)
    weight, bias = _vectors(x, by, views, norm)
    if len(x) == 1:
        return F.layer_norm(x, shape, weight, bias, norm.eps)

    def run(one: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(one, shape, weight, bias, norm.eps)

    return _stacked(run, x, weight, bias)


def _by_rows(x: Tensor, by: Affine, views: Sequence[Tensor]) -> Tensor:
    """Channels last: as `_by_channels`, for each sample; its float32 never leaves the registers."""
    zeros = torch.zeros(x.shape[-1], device="cpu", dtype=torch.float32)
    ones = torch.ones_like(zeros)

    def run(one: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        rows = one.flatten(0, -2)
        return F.batch_norm(rows, zeros, ones, factor, shift, eps=0.0).view(one.shape)

    return _stacked(run, x, *_vectors(x, by, views))


def _stacked(run: Callable[..., Tensor], x: Tensor, *vectors: Tensor) -> Tensor:
    """What is made of each sample and its own vectors."""
    own = (vector.view(len(x), -1).unbind() for vector in vectors)
    samples = list(zip(x.unbind(), *own, strict=True))
    if not is_recorded(x, *vectors):
        out = torch.empty_like(x)
        for into, sample in zip(out.unbind(), samples, strict=True):
            into.copy_(run(*sample))
        return out
    with unhalved(x):  # a stack of float16 fails under a CPU's autocast
        return torch.stack([run(*sample) for sample in samples])


def _vectors(
    x: Tensor, by: Affine, views: Sequence[Tensor], norm: Norm | None = None
) -> tuple[Tensor, Tensor]:
    """Factor and shift (B·C,), in float32 for half precision, with the norm's own affine in."""
    wide = widest(x.dtype)
    factor, shift = by.read([view.flatten(1) for view in views], wide)
    weight, bias = (None, None) if norm is None else norm.own(wide)
    if factor is None:
        assert shift is not None
        factor = torch.ones_like(shift)
    if shift is None:
        shift = torch.zeros_like(factor)
    if bias is not None:
        shift = torch.addcmul(shift, bias, factor)
    if weight is not None:
        factor = weight * factor
    return factor.flatten(), shift.flatten()


def _keeps_halves(x: Tensor, by: Affine, views: Sequence[Tensor]) -> bool:
    """Whether all is half precision of one dtype, for ops that round once by themselves.

    Ops are slow at that with channels first.
    """
    return (
        x.dtype in HALVES
        and by.channel_dim == -1
        and by.norm is None
        and by.form in {"raw", "linear"}
        and not by.residual
        and all(view.dtype == x.dtype for view in views)
    )
