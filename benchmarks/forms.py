"""Mechanisms written by hand, as blog posts have them and as well as eager torch allows.

Shapes: B batch, T positions, C features, D condition. A form is called with features and condition,
or with features and a modulation (B, 2C) or (B, T, 2C) where its generator is `Given`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import condmod
from condmod.functional import gated_residual

Act = Callable[[Tensor], Tensor]


class TwoLinears(nn.Module):
    """Two Linears of the condition."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        for name, weight, bias in zip(
            ("gamma", "beta"), proj.weight.chunk(2), proj.bias.chunk(2), strict=True
        ):
            layer = nn.Linear(proj.in_features, proj.out_features // 2)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, layer)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """The two parts."""
        return self.gamma(condition), self.beta(condition)


class OneLinear(nn.Module):
    """One Linear of the activated condition, cut in two."""

    def __init__(self, proj: nn.Linear, act: Act) -> None:
        super().__init__()
        self.proj, self.act = proj, act

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """The two parts."""
        return self.proj(self.act(condition)).chunk(2, dim=-1)


class Given(nn.Module):
    """The modulation is there already."""

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """The two parts."""
        return modulation.chunk(2, dim=-1)


class GivenRows(nn.Module):
    """Rows of a table are there already, and the row of each position, (B, T)."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The two parts."""
        at = self.index[..., None].expand(-1, -1, rows.shape[-1])
        return rows.gather(1, at).chunk(2, dim=-1)


class Form(nn.Module, ABC):
    """Abstract: features and what the generator takes to features."""

    def __init__(self, generator: nn.Module, channel_dim: int, norm: Any = None) -> None:
        super().__init__()
        self.generator, self.channel_dim, self.norm = generator, channel_dim, norm

    def leaves(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        """The two parts, as they broadcast against the features."""
        return [spread(x, leaf, self.channel_dim) for leaf in self.generator(condition)]

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""


def spread(x: Tensor, leaf: Tensor, channel_dim: int) -> Tensor:
    """A leaf as it broadcasts against the features."""
    if leaf.ndim < x.ndim:
        middle = [1] * (x.ndim - 2)
        shape = (len(leaf), *middle, -1) if channel_dim == -1 else (len(leaf), -1, *middle)
        return leaf.view(shape)
    return leaf if channel_dim == -1 else leaf.movedim(-1, 1)


class WrittenFilm(Form):
    """gamma * x + beta."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        gamma, beta = self.leaves(x, condition)
        return gamma * x + beta


class AddcmulFilm(Form):
    """The same in one pass; a trap in bfloat16 with channels first."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        gamma, beta = self.leaves(x, condition)
        return torch.addcmul(beta, x, gamma)


class BestFilm(AddcmulFilm):
    """One pass, and in bfloat16 two that allocate once."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        if x.dtype == torch.float32:
            return super().forward(x, condition)
        gamma, beta = self.leaves(x, condition)
        return (gamma * x).add_(beta)


class WrittenDense(Form):
    """X + (1 + scale) * x + shift."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        scale, shift = self.leaves(x, condition)
        return x + (1 + scale) * x + shift


class BestDense(Form):
    """x * (scale + 2) + shift."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        scale, shift = self.leaves(x, condition)
        factor = scale + 2
        if factor.shape == x.shape and not torch.is_grad_enabled():
            return torch.addcmul(shift, x, factor, out=factor)
        return torch.addcmul(shift, x, factor)


class WrittenAdaptive(Form):
    """norm(x) * (1 + scale) + shift; rows [shift, scale] for adaLN, [scale, shift] for AdaGN."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        first, second = self.leaves(x, condition)
        shift, scale = (first, second) if isinstance(self.norm, nn.LayerNorm) else (second, first)
        return self.norm(x) * (1 + scale) + shift


def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """h * (1 + scale) + shift, into h where no gradient needs it."""
    if torch.is_grad_enabled():
        return torch.addcmul(shift, h, 1 + scale)
    if scale.shape == h.shape:
        return h.addcmul_(h, scale).add_(shift)
    return torch.addcmul(shift, h, 1 + scale, out=h)


class BestAdaLN(Form):
    """LN with ones and zeros, faster than with none; with one sample, its affine modulates."""

    def __init__(self, generator: nn.Module, channel_dim: int, norm: nn.LayerNorm) -> None:
        super().__init__(generator, channel_dim, norm)
        self.features, self.eps = tuple(norm.normalized_shape), norm.eps
        self.ones, self.zeros = torch.ones(self.features), torch.zeros(self.features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        shift, scale = self.leaves(x, condition)
        if scale.numel() == scale.shape[-1]:
            affine = (1 + scale).flatten(), shift.flatten()
            return F.layer_norm(x, self.features, *affine, self.eps)
        h = F.layer_norm(x, self.features, self.ones, self.zeros, self.eps)
        return modulated(h, scale, shift)


class BestAdaGN(Form):
    """A global modulation as the affine of one group norm over all samples."""

    def __init__(self, generator: nn.Module, channel_dim: int, norm: nn.GroupNorm) -> None:
        super().__init__(generator, channel_dim, norm)
        self.groups, self.eps = norm.num_groups, norm.eps

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated features."""
        scale, shift = self.leaves(x, condition)
        if scale.shape == x.shape:
            return modulated(self.norm(x), scale, shift)
        weight = self.norm.weight * (1 + scale).flatten(1)
        bias = self.norm.bias * (1 + scale).flatten(1) + shift.flatten(1)
        rows = x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])
        groups = x.shape[0] * self.groups
        return F.group_norm(rows, groups, weight.flatten(), bias.flatten(), self.eps).view_as(x)


class WrittenGate(nn.Module):
    """X + gate * y."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """The joined features."""
        return x + spread(x, gate, -1) * y


class BestGate(nn.Module):
    """The same in one pass."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """The joined features."""
        return torch.addcmul(x, y, spread(x, gate, -1))


class OurGate(nn.Module):
    """The same by condmod."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """The joined features."""
        return gated_residual(x, y, gate)


class Ours(nn.Module):
    """A modulator of condmod where the modulation is there already."""

    def __init__(self, modulator: Any, index: Tensor | None) -> None:
        super().__init__()
        self.modulator, self.index = modulator, index

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The modulated features."""
        made = self.modulator.unpack(modulation)
        if self.index is not None:
            made = condmod.indexed(made, condmod.Signal(modulation, index=self.index))
        return self.modulator.modulate(x, made)


def forms(
    name: str,
    features: int,
    width: int | None,
    channel_dim: int,
    index: Tensor | None = None,
) -> dict[str, nn.Module]:
    """One mechanism in every form, all with the same parameters.

    Args:
        name: film, dense_film, adaln, ada_group_norm or gate.
        features: C.
        width: D, or None where the modulation is given.
        channel_dim: 1 or -1.
        index: the row of each position, where rows are given.
    """
    if name == "gate":
        return {"written": WrittenGate(), "best": BestGate(), "condmod": OurGate()}
    spec = "dense_film(residual=True)" if name == "dense_film" else name
    ours: Any = condmod.create(
        spec, features=features, condition_dim=width or 1, channel_dim=channel_dim
    )
    one: nn.Module = Given() if index is None else GivenRows(index)
    two = one
    if width:
        acts: dict[str, Act] = {"film": nn.Identity(), "dense_film": F.mish}
        one = two = OneLinear(ours.proj, acts.get(name, F.silu))
        if name == "film":
            two = TwoLinears(ours.proj)
    norm: Any = None
    if name == "adaln":
        norm = nn.LayerNorm(features, eps=ours.config.eps, elementwise_affine=False)
    if name == "ada_group_norm":
        norm = nn.GroupNorm(ours.config.groups, features, ours.config.eps)
        norm.weight, norm.bias = ours.norm.weight, ours.norm.bias
    written, best = {
        "film": (WrittenFilm, BestFilm),
        "dense_film": (WrittenDense, BestDense),
        "adaln": (WrittenAdaptive, BestAdaLN),
        "ada_group_norm": (WrittenAdaptive, BestAdaGN),
    }[name]
    found = {
        "written": written(two, channel_dim, norm),
        "best": best(one, channel_dim, norm),
        "condmod": ours if width else Ours(ours, index),
    }
    if name == "film":
        found["addcmul"] = AddcmulFilm(one, channel_dim)
    return found
