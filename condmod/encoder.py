"""The abstract Encoder: a raw signal becomes a condition, and an absent one a learned null."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, final

import torch
from torch import Tensor, nn

from condmod.accepting import hidden_samples
from condmod.component import define
from condmod.config import EncoderConfig, NullableConfig
from condmod.errors import ConditionError, ShapeError
from condmod.site import Condition, Signal, is_bool

EncoderConfigT = TypeVar("EncoderConfigT", bound=EncoderConfig)


class Encoder(nn.Module, ABC, Generic[EncoderConfigT]):
    """Abstract: raw signal to condition, (B, D) or (B, T, D) with D = `out_dim`.

    A concrete class sets `name` and `Config`, implements `encode` and `reset_parameters`, and
    calls `reset_parameters` at the end of its constructor. Where its config is a NullableConfig
    with `nullable`, the base holds the learned null and replaces absent samples by it.

    Attributes:
        name: the name in specs; third parties put a namespace before it.
        out_dim: D, the width of what comes out.
        null: the learned null (D,), or None.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EncoderConfig]]
    aliases: ClassVar[tuple[str, ...]] = ()
    deprecated: ClassVar[Mapping[str, str]] = {}
    waivers: ClassVar[Mapping[str, str]] = {}
    null: nn.Parameter | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            define(cls, EncoderConfig, ("forward",))

    def __init__(self, config: EncoderConfigT, out_dim: int) -> None:
        super().__init__()
        self.config = config
        self.out_dim = out_dim
        nullable = isinstance(config, NullableConfig) and config.nullable
        self.null = nn.Parameter(torch.empty(out_dim)) if nullable else None
        self._dtype = torch.get_default_dtype()

    @abstractmethod
    def encode(self, signal: Signal) -> Tensor | Signal:
        """Turn a signal whose samples are all present into (B, D) or (B, T, D).

        The signal's mask goes along by itself; what takes it in, as pooling does, reads it by
        `read_mask` and gives a Signal of its own, without a mask where none comes out.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter afresh, as the constructor does; the null by `reset_null`."""

    def reset_null(self, std: float = 0.02) -> None:
        """Draw the learned null from N(0, std²), where there is one."""
        if self.null is not None:
            nn.init.normal_(self.null, std=std)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what comes out, outside autocast: that of the layer that reads it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                return module.weight.dtype
        own = next(self.parameters(recurse=False), None)
        return self._dtype if own is None else own.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # an encoder without parameters still follows .to(dtype)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def read(self, signal: Signal, shapes: Mapping[int, str]) -> Tensor:
        """The signal's tensor, for `encode`.

        Args:
            signal: what `encode` was given.
            shapes: in words, each rank that the encoder takes.

        Raises:
            ConditionError: no tensor, or one with an index.
            ShapeError: another rank.
        """
        value = signal.value
        if not isinstance(value, Tensor) or signal.index is not None:
            what = "a Signal with an index" if signal.index is not None else type(value).__name__
            raise ConditionError(f"{self.name} takes one tensor, without an index; got {what}")
        if value.ndim not in shapes:
            raise ShapeError(
                f"{self.name} takes {' or '.join(shapes.values())}; got {tuple(value.shape)}"
            )
        return value

    def read_mask(
        self, signal: Signal, shape: Sequence[int], *, may_hide_all: bool = False
    ) -> Tensor | None:
        """The signal's mask, for an `encode` that reads what it shows.

        Args:
            signal: what `encode` was given.
            shape: B and S.
            may_hide_all: whether it may hide every token of a sample.

        Raises:
            ConditionError: not bool with one value per token; or, in eager mode on a CPU, it
                hides what it may not.
        """
        mask = signal.mask
        if mask is None:
            return None
        if not is_bool(mask, shape):
            raise ConditionError(
                f"{self.name}: Signal.mask is bool (B, S), one per token; got {_words(mask)} for "
                f"B, S = {tuple(shape)}"
            )
        if not may_hide_all and (bare := hidden_samples(mask)):
            raise ConditionError(
                f"{self.name}: Signal.mask hides every token of the samples {bare}; show one token "
                f"at least, or say that they are absent: {self.name}(nullable=True) with "
                "Signal(..., present=...)"
            )
        return mask

    @final  # type: ignore[misc]  # nn.Module declares forward as an attribute
    def forward(self, signal: Condition) -> Tensor | Signal:
        """Encode a signal; samples with `present` False become the learned null.

        Args:
            signal: a tensor, a Signal, or for encoders such as `fuse` a mapping of names.

        Returns:
            (B, D) or (B, T, D); a Signal with the mask where there is one.

        Raises:
            ConditionError: the signal's content is wrong; `present` for an encoder without a
                null, or not a bool (B,); a mask that is not a bool (B, T).
            ShapeError: the signal's shape is wrong.
        """
        given = signal if isinstance(signal, Signal) else Signal(signal)
        if self.null is None:
            self._refuse_presence(given)
            return self._masked(given, self.encode(given))
        value = given.value
        if not isinstance(value, Tensor) or not value.ndim:
            self.encode(given)  # says what it takes instead
        present = self._presence(value, given.present)
        safe = torch.where(_column(present, value), value, torch.zeros_like(value))
        mask = given.mask
        if mask is not None and is_bool(mask, value.shape[:2]):
            mask = mask | ~present[:, None]  # what an absent sample hides does not matter
        clean = given._replace(value=safe, mask=mask, present=None)
        out = self._masked(clean, self.encode(clean))
        if isinstance(out, Signal):
            assert out.mask is not None
            return Signal(self._or_null(out.value, present), out.mask | ~present[:, None])
        return self._or_null(out, present)

    def _refuse_presence(self, signal: Signal) -> None:
        if signal.present is None:
            return
        if issubclass(self.Config, NullableConfig):
            mend = f"declare it with {self.name}(nullable=True)"
            raise ConditionError(f"{self.name} has no null for an absent signal; {mend}")
        raise ConditionError(f"{self.name} takes presence signal by signal; give it to its inputs")

    def _masked(self, signal: Signal, out: Tensor | Signal) -> Tensor | Signal:
        """What `encode` gave, with the signal's mask where `encode` did not keep it itself."""
        if isinstance(out, Signal):
            own: Tensor = out.value
            return own if out.mask is None else out
        mask = signal.mask
        if mask is None:
            return out
        if out.ndim != 3 or not is_bool(mask, out.shape[:2]):
            raise ConditionError(
                f"{self.name}: Signal.mask is bool (B, T), one per position; got {_words(mask)} "
                f"for an output {tuple(out.shape)}"
            )
        return Signal(out, mask)

    def _presence(self, value: Tensor, present: Tensor | None) -> Tensor:
        batch = value.shape[0]
        if present is None:
            present = torch.ones(batch, dtype=torch.bool, device=value.device)
        elif not is_bool(present, (batch,)):
            raise ConditionError(
                f"{self.name}: Signal.present is bool, one per sample, ({batch},); "
                f"got {_words(present)}"
            )
        drop = self.config.drop if isinstance(self.config, NullableConfig) else 0.0
        if self.training and drop:
            present = present & (torch.rand(batch, device=value.device) >= drop)
        return present

    def _or_null(self, out: Tensor, present: Tensor) -> Tensor:
        assert self.null is not None
        return torch.where(_column(present, out), out, self.null.to(out.dtype))

    def extra_repr(self) -> str:
        """The spec and the width, in torch's printout of a model."""
        return f"{self.config}, out_dim={self.out_dim}"


def _column(present: Tensor, like: Tensor) -> Tensor:
    return present.reshape(-1, *[1] * (like.ndim - 1))


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__}: {value!r:.60}"
