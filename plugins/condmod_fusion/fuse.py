"""Several raw signals as one condition: by a sum, by concatenation, or by gates."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

import condmod
from condmod.functional import Activation, blank_linear, mlp, reset_linears

_TAKEN = frozenset(dir(nn.ModuleDict()))


class FuseConfig(condmod.EncoderConfig):
    """Options of `fuse`."""

    inputs: condmod.FrozenMapping[str, condmod.EncoderSpec]
    """The encoder of each signal, by the signal's name; their order means nothing."""
    mode: Literal["sum", "concat", "gated"] = "sum"
    """Add the encoded signals, concatenate them before an MLP, or add them through gates."""
    dim: condmod.Width = 256
    """Width of what comes out, where nothing else sets it, and of the sum before hidden layers."""
    hidden: tuple[condmod.Width, ...] | None = None
    """Widths of hidden layers behind the fusion; None: one, of the output's width, for concat."""
    activation: Activation = "silu"
    """Activation behind each hidden layer."""
    drop: condmod.Probability = 0.0
    """Probability of dropping all nullable signals of a sample together, in training."""

    @field_validator("inputs")
    @classmethod
    def _names_are_names(
        cls, inputs: condmod.FrozenMapping[str, condmod.EncoderConfig]
    ) -> condmod.FrozenMapping[str, condmod.EncoderConfig]:
        if not inputs:
            raise ValueError("inputs names at least one signal, as in {'time': timestep}")
        for name in inputs:
            if not (name.isascii() and name.isidentifier()):
                raise ValueError(f"an input's name is a plain ASCII identifier; got {name!r}")
            if name in _TAKEN:
                raise ValueError(f"torch keeps the name {name!r} for itself; choose another")
        return inputs

    @model_validator(mode="after")
    def _drop_needs_null(self) -> Self:
        if self.drop and not _has_null(self):
            raise ValueError(
                "drop > 0 needs an input with nullable=True: a dropped signal becomes its null"
            )
        return self


class Fuse(condmod.Encoder[FuseConfig]):
    """One condition of several signals x_i, each through its own encoder e_i = E_i(x_i).

    sum: c = Σ e_i. concat: c = MLP([e_1, ..., e_n]). gated: c = Σ σ(Z_i·[e_1, ..., e_n]) ⊙
    tanh(W_i·e_i), the Gated Multimodal Unit, without biases. Hidden layers and a last Linear
    stand behind the fusion: always one layer for concat, else where `hidden` has widths.
    Encoders, parameters and the concatenation are in the sorted order of the names.

    A signal per sample is repeated over the positions of the others; two numbers of positions
    are an error, and a position counts where no mask excludes it. `drop` is joint: it drops all
    nullable inputs of a sample at once, those of a nested `fuse` too, beside each input's own.

    Shapes:
        {name: signal}, each a tensor or Signal as its encoder takes it -> (B, D), or (B, T, D)
        with a mask (B, T) where there is one. The native D is `dim`; for concat and gated each
        encoder has its native width.

    Init:
        torch's Linear default, behind the encoders' own.

    Source:
        sum as in ADM and DiT, arXiv:2105.05233 and arXiv:2212.09748; gated: Arevalo et al.,
        Gated Multimodal Units for Information Fusion, 2017, arXiv:1702.01992; joint drop: Ho and
        Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598.
    """

    name = "fuse"
    Config = FuseConfig

    def __init__(self, config: FuseConfig, out_dim: int | None) -> None:
        super().__init__(config, out_dim or config.dim)
        concat, gated = config.mode == "concat", config.mode == "gated"
        hidden = config.hidden
        if hidden is None:
            hidden = (self.out_dim,) if concat else ()
        width = config.dim if hidden else self.out_dim  # of the sum, plain or gated
        self.inputs = nn.ModuleDict(
            {
                name: condmod.create_encoder(
                    config.inputs[name], width if config.mode == "sum" else None
                )
                for name in sorted(config.inputs)
            }
        )
        widths = {name: encoder.out_dim for name, encoder in self._encoders().items()}
        total = sum(widths.values())
        if gated:
            self.values = nn.ModuleDict(
                {name: blank_linear(native, width, bias=False) for name, native in widths.items()}
            )
            self.gates = blank_linear(total, len(widths) * width, bias=False)
        layers = (total if concat else width, *hidden)
        self.hidden = mlp(layers, config.activation)
        behind = concat or hidden
        self.proj = blank_linear(layers[-1], self.out_dim) if behind else nn.Identity()
        self._reset_fusion()

    def reset_parameters(self) -> None:
        """Draw every parameter afresh."""
        for encoder in self._encoders().values():
            encoder.reset_parameters()
        self._reset_fusion()

    def _reset_fusion(self) -> None:
        for name, child in self.named_children():
            if name != "inputs":
                reset_linears(child)

    def encode(self, signal: condmod.Signal) -> Tensor | condmod.Signal:
        """A mapping of signals to (B, D) or (B, T, D)."""
        signals = self._matched(signal)
        if self.training and self.config.drop:
            first = _leading(next(iter(signals.values())).value)
            keep = torch.rand(first.shape[0], device=first.device) >= self.config.drop
            signals = self._dropped(signals, keep)
        encoded = {name: encoder(signals[name]) for name, encoder in self._encoders().items()}
        parts, mask = _placed(encoded)
        # an encoder without parameters may not know the dtype of the layers behind it
        parts = {name: part.to(self.dtype) for name, part in parts.items()}
        fused = self.proj(self.hidden(self._fused(parts)))
        return fused if mask is None else condmod.Signal(fused, mask)

    def _fused(self, parts: dict[str, Tensor]) -> Tensor:
        if self.config.mode == "sum":
            first, *others = parts.values()
            return sum(others, first)
        together = torch.cat(list(parts.values()), dim=-1)
        if self.config.mode == "concat":
            return together
        gates = self.gates(together).sigmoid().chunk(len(parts), dim=-1)
        values = [layer(parts[name]).tanh() for name, layer in self.values.items()]
        first, *others = [gate * value for gate, value in zip(gates, values, strict=True)]
        return sum(others, first)

    def _encoders(self) -> dict[str, condmod.Encoder[Any]]:
        return dict(self.inputs.items())  # type: ignore[arg-type]  # ModuleDict forgets the class

    def _matched(self, signal: condmod.Signal) -> dict[str, condmod.Signal]:
        """One Signal per input, in the order of the inputs, of one batch size.

        Raises:
            ConditionError: no mapping, missing or surplus names, or what is no signal.
            ShapeError: two batch sizes.
        """
        given, wanted = signal.value, list(self.inputs)
        if not isinstance(given, Mapping):
            raise condmod.ConditionError(
                f"fuse takes a mapping with the keys {wanted}; got {type(given).__name__}"
            )
        if set(given) != set(wanted):
            missing = [name for name in wanted if name not in given]
            surplus = sorted(str(name) for name in given if name not in wanted)
            raise condmod.ConditionError(
                f"fuse takes a mapping with the keys {wanted}; missing {missing}, surplus {surplus}"
            )
        if signal.mask is not None or signal.index is not None:
            raise condmod.ConditionError("fuse takes masks signal by signal; give it to its inputs")
        signals, sizes = {}, {}
        for name in wanted:
            item = given[name]
            signals[name] = item if isinstance(item, condmod.Signal) else condmod.Signal(item)
            leading = _leading(signals[name].value)
            if not isinstance(leading, Tensor) or not leading.ndim:
                raise condmod.ConditionError(
                    f"fuse: the input {name!r} is a tensor with a batch, a Signal, or for a "
                    f"nested fuse a mapping; got {type(item).__name__}: {item!r:.60}"
                )
            sizes[name] = leading.shape[0]
            if sizes[name] != sizes[wanted[0]]:
                raise condmod.ShapeError(
                    f"fuse: the inputs {wanted[0]!r} and {name!r} have batches of "
                    f"{sizes[wanted[0]]} and {sizes[name]}; a single sample is not repeated"
                )
        return signals

    def _dropped(
        self, signals: Mapping[str, condmod.Signal], keep: Tensor
    ) -> dict[str, condmod.Signal]:
        """The signals, nullable ones absent where `keep` (B,) is False."""
        dropped = dict(signals)
        for name, encoder in self._encoders().items():
            signal = signals[name]
            if isinstance(encoder, Fuse):
                inner = encoder._dropped(encoder._matched(signal), keep)
                dropped[name] = signal._replace(value=inner)
            elif encoder.null is not None:
                present = keep if signal.present is None else signal.present
                if present.shape == keep.shape:  # its encoder says what another shape means
                    present = present & keep
                dropped[name] = signal._replace(present=present)
        return dropped


def _placed(
    encoded: Mapping[str, Tensor | condmod.Signal],
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What is to be fused, all (B, D) or all (B, T, D), and the positions that count, (B, T).

    Raises:
        ShapeError: two inputs have different numbers of positions.
    """
    parts: dict[str, Tensor] = {}
    mask: Tensor | None = None
    placed = ""
    for name, out in encoded.items():
        value, own = (out.value, out.mask) if isinstance(out, condmod.Signal) else (out, None)
        parts[name] = value
        if value.ndim == 3:
            placed = placed or name
            if value.shape[1] != parts[placed].shape[1]:
                raise condmod.ShapeError(
                    f"fuse: the inputs {placed!r} and {name!r} have {parts[placed].shape[1]} and "
                    f"{value.shape[1]} positions; a signal has one value per sample, or as many "
                    "as the others"
                )
        if own is not None:
            mask = own if mask is None else mask & own
    if placed:
        positions = parts[placed].shape[1]
        parts = {
            name: part if part.ndim == 3 else part[:, None].expand(-1, positions, -1)
            for name, part in parts.items()
        }
    return parts, mask


def _leading(value: Any) -> Any:
    """The first tensor of a mapping of signals, nested or not; any other value as it is."""
    while isinstance(value, Mapping | condmod.Signal):
        value = (
            value.value if isinstance(value, condmod.Signal) else next(iter(value.values()), None)
        )
    return value


def _has_null(config: condmod.EncoderConfig | str) -> bool:
    if isinstance(config, FuseConfig):
        return any(_has_null(inner) for inner in config.inputs.values())
    return isinstance(config, condmod.NullableConfig) and config.nullable
