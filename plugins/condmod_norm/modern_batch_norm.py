"""The conditional batch norm of MODERN."""

from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

import condmod
from condmod.functional import ScaleShift, blank_linear, featurewise_affine, fill


class ModernBatchNormConfig(condmod.ModulatorConfig):
    """Options of `modern_batch_norm`."""

    hidden: condmod.Width = 512
    """Width of the hidden layer of each of the two generators."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the running variance; that of the pretrained norm."""
    init: Literal["published", "identity"] = "published"
    """Changes of mean zero, or the pretrained norm itself at the start."""


class ModernBatchNorm(condmod.Modulator[ModernBatchNormConfig, ScaleShift]):
    """MODERN's conditional BatchNorm: y = (γ + Δγ)·(x - μ)/σ + β + Δβ, all but Δ frozen.

    γ, β, μ and σ are those of a pretrained BatchNorm, which `load_batch_norm` takes over; they
    are buffers under torch's names, and neither training nor the data changes them. Δγ and Δβ
    come from one generator each, V·relu(U·c + u); rows of U are [Δγ, Δβ].

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; condition (B, D) or aligned to x.

    Init:
        γ and σ at 1, β and μ at 0 until loaded. published: U and V Xavier uniform, u at 0, so
        that the changes have mean zero. identity: V at 0, the pretrained norm.

    Source:
        de Vries et al., Modulating early visual processing by language, 2017, arXiv:1707.00683;
        widths and start as in its authors' GuessWhatGame/neural_toolbox cbn_pluggin.py.
    """

    name = "modern_batch_norm"
    Config = ModernBatchNormConfig
    kinds = frozenset({"global", "aligned"})

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, config: ModernBatchNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(site.features))
        self.hidden = blank_linear(self.condition_dim, 2 * config.hidden)
        self.delta_weight = blank_linear(config.hidden, site.features, bias=False)
        self.delta_bias = blank_linear(config.hidden, site.features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh, and forget the pretrained norm."""
        for value, start in zip(self._frozen(), (1.0, 0.0, 0.0, 1.0), strict=True):
            value.fill_(start)
        like: dict[str, Any] = {
            "dtype": self.hidden.weight.dtype,
            "device": self.hidden.weight.device,
        }
        blank = torch.empty(self.config.hidden, self.condition_dim, **like)
        drawn = [nn.init.xavier_uniform_(blank.clone()) for _ in range(2)]
        fill(self.hidden.weight, torch.cat(drawn))
        nn.init.zeros_(self.hidden.bias)
        for layer in (self.delta_weight, self.delta_bias):
            if self.config.init == "identity":
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)

    def load_batch_norm(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        """Take over a pretrained BatchNorm: its affine, or 1 and 0, and its running statistics.

        Raises:
            CheckpointError: it has other features or another eps, or no running statistics.
        """
        wrong = ""
        if norm.num_features != self.site.features:
            wrong = f"it has {norm.num_features} features, this site {self.site.features}"
        elif norm.eps != self.config.eps:
            wrong = f"it has eps={norm.eps}; build modern_batch_norm(eps={norm.eps})"
        elif norm.running_mean is None:
            wrong = "it has no running statistics (track_running_stats=False)"
        if wrong:
            raise condmod.CheckpointError(
                f"{self.where()} cannot take over this BatchNorm: {wrong}"
            )
        affine = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        with torch.no_grad():
            for held, value, start in zip(
                self._frozen(), affine, (1.0, 0.0, 0.0, 1.0), strict=True
            ):
                held.fill_(start) if value is None else held.copy_(value)

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """The changes Δγ and Δβ, each (B, C) or (B, *positions, C)."""
        hidden = nn.functional.relu(self.hidden(self.accept(condition)))
        for_weight, for_bias = hidden.chunk(2, dim=-1)
        return ScaleShift(self.delta_weight(for_weight), self.delta_bias(for_bias))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """(γ + Δγ)·(x - μ)/σ + β + Δβ."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias, mean, var = (value.to(wide) for value in self._frozen())
        scale, shift = (cast(Tensor, leaf).to(wide) for leaf in modulation)
        factor = (weight + scale) / (var + self.config.eps).sqrt()
        folded = ScaleShift(factor, bias + shift - factor * mean)
        return featurewise_affine(x, folded, self.site.channel_dim, form="raw", where=self.where)

    def _frozen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.running_mean, self.running_var
