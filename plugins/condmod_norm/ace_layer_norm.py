"""The conditional layer norm of ACE, a climate emulator."""

from collections.abc import Mapping
from typing import Annotated, Any, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import (
    ScaleShift,
    blank_linear,
    featurewise_affine,
    normalisation,
    reset_constant,
)


class AceLayerNormConfig(condmod.ModulatorConfig):
    """Options of `ace_layer_norm`."""

    scalar: condmod.Width | None = None
    """Width of the condition `scalar`, such as a time's embedding; None: no such condition."""
    label: condmod.Width | None = None
    """Width of the condition `label`: one-hot labels or their embedding."""
    noise: condmod.Width | None = None
    """Width of the condition `noise`, a map."""
    position: condmod.Width | None = None
    """Width of the condition `position`, a map."""
    global_norm: bool = False
    """Normalise over channels and positions together, not over the channels of each position."""
    affine: bool = False
    """Give the norm a learned weight and bias of its own."""
    eps: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the variance."""

    @property
    def widths(self) -> dict[str, int]:
        """The width of each condition that it takes, by name."""
        named = {name: getattr(self, name) for name in ("scalar", "label", "noise", "position")}
        return {name: width for name, width in named.items() if width is not None}

    @model_validator(mode="after")
    def _is_conditional(self) -> Self:
        if not self.widths:
            raise ValueError(
                "it takes none of scalar, label, noise and position; give the width of at least "
                "one, as in scalar=128"
            )
        if self.global_norm and self.affine:
            raise ValueError(
                "affine=True with global_norm=True would be a weight per position, for maps of "
                "one size; leave one of them out"
            )
        return self


class AceLayerNorm(condmod.Modulator[AceLayerNormConfig, ScaleShift]):
    """ACE's conditional norm: y = LN(x)·Σ scale_k + Σ shift_k, over several named conditions.

    (scale_k, shift_k) = W_k·c_k + b_k for each configured condition k of scalar, label, noise
    and position; b only for scalar and label. Rows of each W are [scale, shift]. Without a
    scalar, whose b would begin at 1, the scale is 1 + Σ scale_k.

    Shapes:
        x (B, ..., C) or (B, C, ...), any rank from 2; a mapping with exactly the configured
        names, each (B, width), or a map (B, *positions, width), with the width where x has C.

    Init:
        every W 0, the bias of the scale by `scalar` 1 and every other bias 0, so y = LN(x).

    Source:
        ai2cm/ace fme/core/models/conditional_sfno/layers.py (Apache-2.0): ConditionalLayerNorm;
        after Chen et al., AdaSpeech, 2021, arXiv:2103.00993.
    """

    name = "ace_layer_norm"
    Config = AceLayerNormConfig
    kinds = frozenset({"raw"})

    def __init__(self, config: AceLayerNormConfig, site: condmod.Site) -> None:
        super().__init__(config, site)
        self.site_params = config.affine
        self.norm = normalisation(
            "group" if config.global_norm else "layer",
            site.features,
            site.channel_dim,
            affine="both" if config.affine else "none",
            eps=config.eps,
        )
        self.proj = nn.ModuleDict(
            {
                name: blank_linear(width, 2 * site.features, bias=name in {"scalar", "label"})
                for name, width in config.widths.items()
            }
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter as at the start; nothing is random."""
        self.norm.reset_parameters()
        for name, layer in self.proj.items():
            reset_constant(cast("nn.Linear", layer), (name == "scalar", 0))

    def generate(self, condition: condmod.Condition) -> ScaleShift:
        """The sums of all scales and shifts, each (B, C) or (B, *positions, C)."""
        projected = [self.proj[name](value) for name, value in self._read(condition).items()]
        rank = max(part.ndim for part in projected)
        total, *rest = (
            part.reshape(part.shape[0], *[1] * (rank - part.ndim), *part.shape[1:])
            for part in projected
        )
        for part in rest:  # in float32 at least: beside a scalar's 1 the others are small
            total = total.to(torch.promote_types(total.dtype, torch.float32)) + part
        return ScaleShift(*total.chunk(2, dim=-1))

    def modulate(self, x: Tensor, modulation: ScaleShift) -> Tensor:
        """LN(x)·Σ scale_k + Σ shift_k; without a scalar, 1 + Σ scale_k."""
        return featurewise_affine(
            x,
            modulation,
            self.site.channel_dim,
            form="one_plus" if self.config.scalar is None else "raw",
            norm=self.norm,
            where=self.where,
        )

    def _read(self, condition: Any) -> dict[str, Tensor]:
        """Each condition by name, checked, its width last."""
        widths, dim = self.config.widths, self.site.channel_dim
        if not isinstance(condition, Mapping) or set(condition) != set(widths):
            raise condmod.ConditionError(self._wrong_keys(condition))
        read = {}
        for name, width in widths.items():
            value = condition[name]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise condmod.ConditionError(
                    f"{self.where()}: {name!r} is a plain floating tensor; got {got}; ids go "
                    "through torch.nn.functional.one_hot or an encoder such as label"
                )
            if value.ndim < 2 or value.shape[-1 if value.ndim == 2 else dim] != width:
                inside = f"{width}, *positions" if dim == 1 else f"*positions, {width}"
                raise condmod.ShapeError(
                    f"{self.where()}: {name!r} is (B, {name}={width}), or a map (B, {inside}); "
                    f"got {tuple(value.shape)}"
                )
            read[name] = value if value.ndim == 2 else value.movedim(dim, -1)
        batches = [value.shape[:1] for value in read.values()]
        places = [value.shape[1:-1] for value in read.values() if value.ndim > 2]
        if any(shapes[1:] != shapes[:-1] for shapes in (batches, places)):  # a set would specialise
            came = ", ".join(f"{name} {tuple(condition[name].shape)}" for name in widths)
            raise condmod.ShapeError(
                f"{self.where()}: conditions have one batch, and maps have equal positions; "
                f"got {came}"
            )
        return read

    def _wrong_keys(self, condition: Any) -> str:
        """What it takes and what came, for an error."""
        known, came = set(self.config.widths), f"got {type(condition).__name__}"
        if isinstance(condition, Mapping):
            given = set(condition)
            came = f"missing {sorted(known - given)}, surplus {sorted(given - known)}"
        return f"{self.where()} takes a mapping with the keys {sorted(known)}; {came}"
