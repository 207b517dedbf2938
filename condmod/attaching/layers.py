"""What a module's features are: by its class, or as seen on an example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from condmod.attaching.sites import Placement
from condmod.extensions import brought
from condmod.layer import Layer


class Unknown(str):
    """Why a class tells nothing, where an example might."""


class Features(NamedTuple):
    """What a site sees: C, where the channels lie, and how its module takes and gives them.

    Attributes:
        features: C; around a module those that it reads.
        channel_dim: 1 or -1.
        argument: the name of the argument that holds them.
        item: which of several outputs holds them.
        out_features: those that it gives, where a site around it has other ones.
    """

    features: int
    channel_dim: int
    argument: str
    item: int
    out_features: int | None = None

    @property
    def gives(self) -> int:
        """C of what comes out."""
        return self.out_features or self.features


def infer(module: nn.Module, placement: Placement) -> Features | str:
    """The features at a module, or why its class does not tell them.

    Args:
        module: the module.
        placement: on what it reads, on what it gives, around it, or on its weight.
    """
    if _base(type(module)).forward is nn.Module.forward:
        return f"a {type(module).__name__} is never called; match what it holds"
    if is_plain(module, nn.Sequential):
        return _of_sequence(module, placement)
    layer = layer_of(module)
    if layer is None:
        return Unknown(f"nothing is known of the class {_path(_base(type(module)))}")
    try:
        reason = layer.refuses(module, placement) if layer.refuses is not None else ""
        gives = layer.gives(module)
        reads = gives if layer.reads is None else layer.reads(module)
        dim = layer.channel_dim(module) if callable(layer.channel_dim) else layer.channel_dim
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        return Unknown(f"what is known of {_path(_base(type(module)))} does not hold: {error}")
    if reason:
        return reason
    argument = layer.argument or first_argument(module)
    if placement in ("around", "weight") and reads != gives:
        return Features(reads, dim, argument, layer.item, gives)
    return Features(reads if placement == "input" else gives, dim, argument, layer.item)


def is_plain(module: nn.Module, cls: Any) -> bool:
    """Whether a module is of a class, or of a subclass without a forward of its own."""
    return isinstance(module, cls) and _base(type(module)).forward is cls.forward


def layer_of(module: nn.Module) -> Layer | None:
    """What is known of a module's class, or of the nearest base whose forward it has."""
    known = _known()
    own = _base(type(module))
    bases: tuple[Any, ...] = own.__mro__
    for base in bases:
        if (layer := known.get(_path(base))) is not None:
            return layer if own.forward is base.forward else None
    return None


def first_argument(module: nn.Module) -> str:
    """The name of the argument that a module's forward takes first."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1] if len(names) > 1 else ""


def _base(cls: type[Any]) -> Any:
    """The class of a module before it was attached to."""
    return getattr(cls, "_condmod_base", cls)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _of_sequence(module: Any, placement: Placement) -> Features | str:
    """The features of a Sequential are those of its ends."""
    if not len(module):
        return "an empty Sequential has no features"
    ends = {"input": [(0, "input")], "output": [(-1, "output")]}
    found = [
        infer(module[place], "input" if end == "input" else "output")
        for place, end in ends.get(placement, [(0, "input"), (-1, "output")])
    ]
    for end in found:
        if isinstance(end, str):
            return type(end)(f"of an end of the {type(module).__name__}: {end}")
    first, last = found[0], found[-1]
    assert isinstance(first, Features)
    assert isinstance(last, Features)
    if first.channel_dim != last.channel_dim:
        return "what it reads and what it gives have their channels at different ends"
    gives = last.features if last.features != first.features else None
    return Features(first.features, last.channel_dim, "input", last.item, gives)


@cache
def _known() -> Mapping[str, Layer]:
    """Torch's own layers, and those that plugins know, by the path of the class."""
    return {**brought("condmod_layers"), **{_path(cls): layer for cls, layer in _TORCH.items()}}


def _sequence_first(module: Any, placement: str) -> str:  # noqa: ARG001
    if not module.batch_first:
        return f"a {type(module).__name__} with batch_first=False has its batch at dim 1"
    return ""


def _attention(module: Any, placement: str) -> str:
    if placement != "output":
        return (
            "its query, key and value are three arguments; place the site on the norm or the "
            "projection before it"
        )
    return _sequence_first(module, placement)


def _output_alone(module: Any, placement: str) -> str:
    if placement != "output":
        return f"a {type(module).__name__} reads no features; its output can be conditioned"
    return ""


def _one_axis(module: Any, placement: str) -> str:  # noqa: ARG001
    if len(module.normalized_shape) > 1:
        return f"it normalises over {len(module.normalized_shape)} axes, not over channels alone"
    return ""


def _hidden(module: Any) -> int:
    directions = 2 if module.bidirectional else 1
    return directions * (getattr(module, "proj_size", 0) or module.hidden_size)


def _last_block(module: Any) -> int:
    return int(module.layers[-1].linear2.out_features)


_LINEAR = Layer(lambda m: m.out_features, lambda m: m.in_features)
_CONV = Layer(lambda m: m.out_channels, lambda m: m.in_channels, channel_dim=1)
_NORM = Layer(lambda m: m.normalized_shape[0], refuses=_one_axis)
_BATCH_NORM = Layer(lambda m: m.num_features, channel_dim=1)
_RECURRENT = Layer(_hidden, lambda m: m.input_size, refuses=_sequence_first)
_BLOCK = Layer(
    lambda m: m.linear2.out_features,
    refuses=lambda m, placement: _sequence_first(m.self_attn, placement),
)
_STACK = Layer(
    _last_block, refuses=lambda m, placement: _sequence_first(m.layers[-1].self_attn, placement)
)
_TORCH: dict[type[nn.Module], Layer] = {
    nn.Linear: _LINEAR,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _LINEAR,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV,
    nn.ConvTranspose2d: _CONV,
    nn.ConvTranspose3d: _CONV,
    nn.Embedding: Layer(lambda m: m.embedding_dim, refuses=_output_alone),
    nn.LayerNorm: _NORM,
    nn.RMSNorm: _NORM,
    nn.GroupNorm: Layer(lambda m: m.num_channels, channel_dim=1),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.InstanceNorm3d: _BATCH_NORM,
    nn.MultiheadAttention: Layer(lambda m: m.embed_dim, refuses=_attention),
    nn.TransformerEncoderLayer: _BLOCK,
    nn.TransformerDecoderLayer: _BLOCK,
    nn.TransformerEncoder: _STACK,
    nn.TransformerDecoder: _STACK,
    nn.LSTM: _RECURRENT,
    nn.GRU: _RECURRENT,
    nn.RNN: _RECURRENT,
}
