"""Norms over features with the channels at either end, parameter-free or affine."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condmod.errors import ShapeError, SiteError
from condmod.functional.layout import SMALL, in_layout_of, is_eager

NormKind = Literal["layer", "rms", "group", "instance", "batch"]
Affine = Literal["none", "weight", "both"]


def normalisation(
    kind: NormKind,
    features: int,
    channel_dim: int = -1,
    *,
    affine: Affine = "none",
    eps: float = 1e-6,
    groups: int = 1,
    momentum: float = 0.1,
    where: str = "the norm",
) -> "Norm | BatchNorm":
    """A norm of features (B, ..., C, ...), which keeps shape, dtype and layout.

    layer and rms are over the channels of each position; group over a group of channels and all
    positions of a sample; instance over all positions of each channel of a sample; batch over
    all samples and positions of each channel in training, by running statistics in evaluation.
    Variances are biased. `reset_parameters` sets weight to 1, bias to 0.

    Args:
        kind: which.
        features: C.
        channel_dim: 1 or -1.
        affine: parameters `weight` and `bias` (C,), the weight alone, or none.
        eps: added to the variance, or to the mean square.
        groups: for kind group.
        momentum: for kind batch, the share of a new batch in the running statistics.
        where: what an error calls the place.

    Raises:
        SiteError: the groups do not divide the features.
    """
    if kind == "batch":
        return BatchNorm(features, channel_dim, affine=affine, eps=eps, momentum=momentum)
    if kind == "group" and features % groups:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        raise SiteError(
            f"{where}: groups={groups} does not divide features={features}; "
            f"choose groups from {fitting}"
        )
    return Norm(kind, features, channel_dim, affine=affine, eps=eps, groups=groups)


class Norm(nn.Module):
    """Layer, RMS, group or instance norm; see `normalisation`, which makes it."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: NormKind,
        features: int,
        channel_dim: int,
        *,
        affine: Affine,
        eps: float,
        groups: int,
    ) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.features, self.channel_dim = features, channel_dim
        self.groups = features if kind == "instance" else groups
        self.affine = affine
        parameters = {"none": (), "weight": ("weight",), "both": ("weight", "bias")}[affine]
        for name in ("weight", "bias"):
            held = nn.Parameter(torch.empty(features)) if name in parameters else None
            self.register_parameter(name, held)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The normed features, of the same shape, dtype and layout."""
        self.check(x)
        weight, bias = self.own(x.dtype)
        if self.kind in {"layer", "rms"}:
            last = x if self.channel_dim == -1 else x.movedim(1, -1)
            if self.kind == "layer":
                y = layer_normed(last, weight, bias, self.eps)
            else:
                y = F.rms_norm(last, (self.features,), weight, self.eps)
            if bias is not None and self.kind == "rms":
                y = y + bias
            y = y if y.dtype == x.dtype else y.to(x.dtype)
            return y if last is x else in_layout_of(x, y.movedim(-1, 1))
        first = _channels_first(x, self.channel_dim)
        y = F.group_norm(first, self.groups, weight, bias, self.eps).to(x.dtype)
        return in_layout_of(x, y.movedim(1, self.channel_dim))

    @property
    def kernel(self) -> Literal["layer", "rms", "group"]:
        """What a fused kernel calls it: an instance norm has groups of one channel."""
        named: dict[NormKind, Literal["layer", "rms"]] = {"layer": "layer", "rms": "rms"}
        return named.get(self.kind, "group")

    def own(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in a dtype."""
        if self.affine == "none":
            return None, None  # a module's attributes are slow
        weight, bias = self.weight, self.bias
        return None if weight is None else weight.to(dtype), None if bias is None else bias.to(
            dtype
        )

    def check(self, x: Tensor) -> None:
        """Check the features' channels, and that there is something to average over.

        Raises:
            ShapeError: other channels, or one element alone.
        """
        _check_channels(x, self.features, self.channel_dim)
        if self.kind in {"group", "instance"}:
            _enough(self.kind, x, math.prod(x.shape[1:]) // self.groups)

    def is_bare(self) -> bool:
        """Whether nobody listens to its calls, so that a pass may do its work."""
        return not (
            "forward" in self.__dict__
            or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        )

    def extra_repr(self) -> str:
        """The kind and the sizes."""
        groups = f", groups={self.groups}" if self.kind == "group" else ""
        return f"{self.kind}, {self.features}{groups}, eps={self.eps}"


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of any rank, channels at either end; see `normalisation`, which makes it.

    It keeps torch's state dict, its arithmetic, and its meaning of `momentum` None (the mean of
    all batches so far, as `torch.optim.swa_utils.update_bn` sets it). Statistics narrower than
    the features are read and updated in the features' dtype, and stored in their own.

    `SyncBatchNorm.convert_sync_batchnorm` replaces it, by a norm of channels at dim 1: with
    channels last that is another norm, so convert such a model with channels first.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, features: int, channel_dim: int, *, affine: Affine, eps: float, momentum: float
    ) -> None:
        super().__init__(features, eps, momentum, affine=affine != "none", bias=affine == "both")
        self.channel_dim = channel_dim

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """The normed features, of the same shape, dtype and layout."""
        _check_channels(input, self.num_features, self.channel_dim)
        statistics = (self.running_mean, self.running_var)
        dtype = torch.promote_types(input.dtype, self.running_mean.dtype)
        first = _channels_first(input, self.channel_dim).to(dtype)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        mean, var = wide = [value.to(dtype) for value in statistics]
        share = self.momentum or 0.0
        if self.training:
            _enough("batch", input, input.numel() // self.num_features)
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        y = F.batch_norm(first, mean, var, weight, bias, self.training, share, self.eps)
        if self.training:
            for held, new in zip(statistics, wide, strict=True):
                if held is not new:
                    held.copy_(new)
        return in_layout_of(input, y.to(input.dtype).movedim(1, self.channel_dim))


def layer_normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dim; torch's is faster with an affine of 1 and 0 than with none."""
    shape = x.shape[-1:]
    if weight is None and is_eager(x) and x.dtype == torch.float32 and x.numel() > SMALL:
        weight = torch.ones(shape, dtype=x.dtype, device="cpu")
        bias = torch.zeros_like(weight)
    return F.layer_norm(x, shape, weight, bias, eps)


def _check_channels(x: Tensor, features: int, channel_dim: int) -> None:
    if x.ndim < 2 or x.shape[channel_dim] != features:
        raise ShapeError(
            f"the norm is over {features} channels at dim {channel_dim}; got {tuple(x.shape)}"
        )


def _channels_first(x: Tensor, channel_dim: int) -> Tensor:
    first = x.movedim(channel_dim, 1)
    if x.device.type == "cpu" and torch.is_grad_enabled() and not x.requires_grad:
        # torch 2.13's CPU backward crashes on channels-last features that need no gradient
        layout = torch.contiguous_format  # which one channel has by name, not by its strides
        first = first.contiguous() if first.shape[1] > 1 else first.clone(memory_format=layout)
    return first


def _enough(kind: str, x: Tensor, elements: int) -> None:
    if elements < 2:
        raise ShapeError(
            f"{kind} norm averages over more than one element; features {tuple(x.shape)} give "
            f"it {elements}"
        )
