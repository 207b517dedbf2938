"""What both kinds of modulator share: the abstract Component."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

from condmod.accepting import accept_map, accept_set, accept_sets
from condmod.config import ComponentConfig, Kind, ModulatorConfig
from condmod.errors import ConditionError, DefinitionError, ShapeError, SiteError
from condmod.site import Condition, Shared, Signal, Site, is_bool

ConfigT = TypeVar("ConfigT", bound=ModulatorConfig)
ModulationT = TypeVar("ModulationT")


def same_class(one: type, other: type) -> bool:
    """Whether two classes come from one definition, as when a notebook's cell is run again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def define(cls: type[Any], base: type[ComponentConfig], final: Sequence[str]) -> None:
    """Check a component's class as it is defined, and stamp it on its config.

    Raises:
        DefinitionError: a final method is overridden, or the config is missing or taken.
    """
    for method in final:
        if method in cls.__dict__:
            raise DefinitionError(f"{cls.__name__}.{method} is final; see the contract")
    config = cls.__dict__.get("Config")
    if not (isinstance(config, type) and issubclass(config, base)):
        raise DefinitionError(
            f"{cls.__name__} (component {cls.name!r}) needs `Config = ...`, a subclass of "
            f"{base.__name__} of its own; got {config!r}"
        )
    owner = config.component
    if owner is not None and not same_class(owner, cls):
        raise DefinitionError(
            f"{config.__name__} already belongs to {owner.__name__}; "
            f"give {cls.__name__} a config class of its own"
        )
    config.component = cls


class Component(nn.Module, ABC, Generic[ConfigT, ModulationT]):
    """Abstract: turns a condition into a modulation, which its subclasses apply to features.

    Subclass `Modulator` or `SublayerModulator`, not this class. A concrete class sets `name`,
    `Config` and `kinds`, draws its parameters in `reset_parameters`, and is not subclassed.

    Attributes:
        name: the name in specs; third parties put a namespace before it ("acme.gate").
        aliases: further names, each an entry point of its own.
        deprecated: old names with what to use instead, each an entry point of its own.
        kinds: which conditions it takes.
        sets: names of several sets of tokens, where its condition maps these to them (kind `set`).
        site_params: whether parameters are used after `generate`.
        changes_width: whether it serves sublayers whose output has `Site.out_features` channels.
        waivers: laws that it cannot keep, with the reason.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ModulatorConfig]]
    kinds: ClassVar[frozenset[Kind]]
    sets: ClassVar[tuple[str, ...]] = ()
    aliases: ClassVar[tuple[str, ...]] = ()
    deprecated: ClassVar[Mapping[str, str]] = {}
    site_params: bool = False
    changes_width: ClassVar[bool] = False
    waivers: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:  # torch makes subclasses of its own (parametrize, FSDP2)
            define(cls, ModulatorConfig, ("forward",))
            if clash := _colliding(getattr(cls, "kinds", frozenset())):
                raise DefinitionError(f"{cls.__name__}.kinds: {clash}")

    def __init__(self, config: ConfigT, site: Site) -> None:
        super().__init__()
        self.config = config
        self.site = site
        if ("raw" in self.kinds or "self" in self.kinds) and site.condition_dim is not None:
            raise SiteError(
                f"{self.where()} needs no condition_dim: it takes {_words(self.kinds)} conditions; "
                f"got condition_dim={site.condition_dim}"
            )
        if site.out_features not in (None, site.features) and not self.changes_width:
            raise SiteError(
                f"{self.where()} keeps the number of features; got features={site.features} and "
                f"out_features={site.out_features}"
            )
        if self.kinds & {"global", "aligned", "map", "set", "rows"} and site.condition_dim is None:
            raise SiteError(
                f"{self.where()} needs condition_dim, the width of its condition, as in "
                f"create({str(config)!r}, features={site.features}, condition_dim=128)"
            )

    @classmethod
    def shared(cls, config: ConfigT, sites: Sequence[Site]) -> nn.Module | None:  # noqa: ARG003
        """Build what a group of sites shares, a module with `reset_parameters`, or nothing.

        It is given the condition as `accept` returns it; `generate` reads its output with
        `received`.
        """
        return None

    @classmethod
    def as_base(cls, config: ConfigT) -> Mapping[str, Any]:  # noqa: ARG003
        """Options with which it starts as what it is attached to; those that are said win."""
        known = cls.Config.model_fields.get("init")
        return {"init": "identity"} if known and "identity" in get_args(known.annotation) else {}

    @abstractmethod
    def generate(self, condition: Condition) -> ModulationT:
        """Turn a condition into a modulation; never sees the features."""

    def received(self, condition: Any) -> Any:
        """What `shared` made of the condition, as the bank hands it to `generate`.

        Raises:
            ConditionError: it is a condition, and not from a bank.
        """
        if not isinstance(condition, Shared):
            raise ConditionError(
                f"{self.where()} generates from what the sites of its bank share, not from a "
                "condition: take its modulation from bank(condition), and call modulate or around"
            )
        return condition.value

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw every parameter afresh, as the constructor does."""

    def where(self) -> str:
        """What errors call this modulator: its name, and its site's if that has one."""
        return f"{self.name} at {self.site.name!r}" if self.site.name else self.name

    @property
    def condition_dim(self) -> int:
        """D, the width of the condition."""
        assert self.site.condition_dim is not None
        return self.site.condition_dim

    def match(self, x: Tensor, condition: Condition) -> None:
        """Check that features and a global or aligned condition belong together.

        Raises:
            ShapeError: says both shapes and the site; nothing broadcasts by chance.
            ConditionError: they are on two devices.
        """
        dim = self.site.channel_dim
        fits = x.ndim > 1 and x.shape[dim] == self.site.features
        if not x.is_floating_point():
            raise ShapeError(f"{self.where()} takes floating features; got {x.dtype}")
        if self.sets and isinstance(condition, Mapping):
            fits = fits and all(self._belong(x, part) for part in condition.values())
        else:
            fits = fits and self._belong(x, condition)
        if not fits:
            raise ShapeError(self._misfit(x, condition))

    def _belong(self, x: Tensor, condition: Any) -> bool:
        """Whether features and one condition have fitting shapes.

        Raises:
            ConditionError: they are on two devices.
        """
        dim, fits = self.site.channel_dim, True
        value: Any = condition.value if isinstance(condition, Signal) else condition
        embedding = isinstance(value, Tensor) and value.is_floating_point()  # else accept says why
        if embedding and self.kinds <= {"global", "aligned", "rows"}:
            index = condition.index if isinstance(condition, Signal) else None
            fits = self._takes(value, index) and value.shape[0] == x.shape[0]
            if fits and (index is not None or value.ndim > 2):
                places = value.movedim(dim, -1).shape[:-1] if index is None else index.shape
                fits = places == x.movedim(dim, -1).shape[:-1]
            if index is not None and index.device != value.device:
                raise ConditionError(
                    f"{self.where()}: Signal.index is on {index.device}, its rows are on "
                    f"{value.device}; move one of them"
                )
        if embedding and fits and self.kinds & {"map", "set"}:
            fits = value.ndim < 3 or value.shape[0] == x.shape[0]  # else accept_map says why
        if embedding and value.device != x.device and "raw" not in self.kinds:
            raise ConditionError(
                f"{self.where()}: the condition is on {value.device}, the features are on "
                f"{x.device}; move one of them"
            )
        return fits

    def accept(self, condition: Condition) -> Tensor:
        """Check a condition that is global, aligned or rows and return it with its width last.

        Args:
            condition: (B, D), or aligned to the features: (B, *positions, D) where they are
                channels-last, (B, D, *positions) where they are channels-first; or rows,
                Signal((B, R, D), index=(B, *positions)).

        A Signal's mask is checked and has no effect: positions that it hides are modulated too,
        and it is the features' reader that leaves them out.

        Returns:
            (B, D), (B, *positions, D) or (B, R, D).

        Raises:
            ShapeError: another shape; says the shapes and the site.
            ConditionError: not a floating tensor, a Signal with presence, with an index where no
                rows are taken or one that is no integer, or a mask that is not bool with one
                value per position.
        """
        value: Any = condition
        index = None
        if isinstance(condition, Signal):
            value, index = condition.value, condition.index
            if condition.present is not None:
                raise ConditionError(
                    f"{self.where()} has no null: it takes a Signal without `present`; encode an "
                    "absent condition with a nullable encoder"
                )
            if index is not None:
                self._check_index(index)
            _check_mask(self, condition)
        if not isinstance(value, Tensor):
            raise ConditionError(
                f"{self.where()} takes one tensor as its condition; got {type(value).__name__}; "
                "several conditions go through multi_condition(encoder=fuse(...))"
            )
        if not value.is_floating_point():
            raise ConditionError(
                f"{self.where()} takes an embedding as its condition; got {value.dtype}; "
                "class ids and timesteps go through an encoder such as label or timestep"
            )
        if not self._takes(value, index):
            raise ShapeError(self._misfit(None, condition))
        if value.ndim == 2 or index is not None:
            return value
        return value.movedim(self.site.channel_dim, -1)

    def accept_map(self, condition: Condition) -> Tensor:
        """Check a condition that is a map and return it as it is, its channels where x has them.

        Args:
            condition: (B, D, *sides) where the features are channels-first, (B, *sides, D) where
                they are channels-last; of any resolution.

        Raises:
            ShapeError: another shape.
            ConditionError: not a floating tensor, or a Signal with more than its value.
        """
        return accept_map(self.where, self.site, condition)

    def accept_set(
        self, condition: Condition, *, may_hide_all: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Check a condition that is a set of tokens.

        Args:
            condition: (B, S, D), or a Signal of such with a mask (B, S), True for real tokens.
            may_hide_all: whether a mask may hide every token of a sample, as it may where there
                are null keys.

        Returns:
            The tokens and the mask.

        Raises:
            ShapeError: another shape.
            ConditionError: not a floating tensor, a Signal with presence or index, a mask that
                is not bool with one value per token, or one that hides all of a sample's; the
                last in eager mode on a CPU alone, elsewhere the component gives zeros.
        """
        return accept_set(self.where, self.site, condition, may_hide_all=may_hide_all)

    def accept_sets(self, condition: Condition) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Check a condition that is a mapping of `sets` to sets of tokens, of one batch.

        Args:
            condition: for each name what `accept_set` takes.

        Returns:
            For each name the tokens and the mask.

        Raises:
            ShapeError: another shape, or two batches.
            ConditionError: missing or surplus names, or content that `accept_set` refuses.
        """
        return accept_sets(self.where, self.site, self.sets, condition)

    def accept_nothing(self, condition: Condition) -> None:
        """Check that a modulator that reads the features alone is given no condition.

        Raises:
            ConditionError: it is given one.
        """
        if condition is not None:
            raise ConditionError(
                f"{self.where()} reads the features alone and takes no condition; got "
                f"{type(condition).__name__}; call it with the features"
            )

    def check_channels(self, x: Tensor) -> None:
        """Check the features' channels, for a `modulate` that uses them before its modulation.

        Raises:
            ShapeError: another number than the site's.
        """
        dim = self.site.channel_dim
        if x.shape[dim] != self.site.features:
            raise ShapeError(
                f"{self.where()} takes features with {self.site.features} channels at dim {dim}; "
                f"got {tuple(x.shape)}"
            )

    def _check_index(self, index: Any) -> None:
        if "rows" not in self.kinds:
            raise ConditionError(
                f"{self.where()} has no table: it takes a Signal without `index`; "
                "give each position its own vector instead"
            )
        integer = isinstance(index, Tensor) and not (
            index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
        )
        if not integer:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise ConditionError(f"{self.where()}: Signal.index holds integers; got {got}")

    def _takes(self, value: Tensor, index: Tensor | None) -> bool:
        """Whether a condition has a kind and the width that it takes."""
        if index is not None:
            table = value.ndim == 3 and value.shape[-1] == self.condition_dim
            return table and index.ndim > 1 and index.shape[0] == value.shape[0]
        if value.ndim == 2:
            return "global" in self.kinds and value.shape[-1] == self.condition_dim
        aligned = value.ndim > 2 and "aligned" in self.kinds
        return aligned and value.shape[self.site.channel_dim] == self.condition_dim

    def _misfit(self, x: Tensor | None, condition: Any) -> str:
        """What it takes and what came, for an error."""
        value = condition.value if isinstance(condition, Signal) else condition
        index = condition.index if isinstance(condition, Signal) else None
        conditions = f"{self._condition_shapes()} for " if self.site.condition_dim else ""
        came = [] if x is None else [f"features {tuple(x.shape)}"]
        if isinstance(value, Tensor):
            came.append(f"a condition {tuple(value.shape)}")
        if self.sets and isinstance(value, Mapping):
            came += [f"{name!r} {_shape(part)}" for name, part in value.items()]
        if index is not None:
            came[-1] += f" with an index {tuple(index.shape)}"
        return (
            f"{self.where()} takes {conditions}features {self._feature_shape()}; "
            f"got {' and '.join(came)}"
        )

    def _condition_shapes(self) -> str:
        width = f"condition_dim={self.condition_dim}"
        shapes = []
        if "global" in self.kinds:
            shapes.append(f"a global condition (B, {width})")
        if "aligned" in self.kinds:
            first = self.site.channel_dim == 1
            inside = f"{width}, *positions" if first else f"*positions, {width}"
            shapes.append(f"an aligned condition (B, {inside})")
        if "map" in self.kinds:
            first = self.site.channel_dim == 1
            inside = f"{width}, *sides" if first else f"*sides, {width}"
            shapes.append(f"a map (B, {inside})")
        if "set" in self.kinds:
            names = f" by the names {list(self.sets)}" if self.sets else ""
            shapes.append(f"tokens (B, S, {width}){names}")
        if "rows" in self.kinds:
            shapes.append(f"rows (B, R, {width}) with an index (B, *positions)")
        return " or ".join(shapes)

    def _feature_shape(self) -> str:
        channels = f"features={self.site.features}"
        return f"(B, {channels}, ...)" if self.site.channel_dim == 1 else f"(B, ..., {channels})"

    def extra_repr(self) -> str:
        """The spec and the site, in torch's printout of a model."""
        return f"{self.config}, {self.site}"


def _check_mask(component: Component[Any, Any], signal: Signal) -> None:
    mask, value = signal.mask, signal.value
    if mask is None or not isinstance(value, Tensor):
        return
    if signal.index is not None:
        raise ConditionError(f"{component.where()}: a Signal with an index takes no mask")
    positions = value.movedim(component.site.channel_dim, -1).shape[:-1]
    if value.ndim < 3 or not is_bool(mask, positions):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)[:60]
        raise ConditionError(
            f"{component.where()}: Signal.mask is bool, one per position of an aligned condition; "
            f"got {got} with a condition {tuple(value.shape)}"
        )


def _shape(condition: Any) -> Any:
    """The shape of a set of tokens, for an error; another thing as it is."""
    value = condition.value if isinstance(condition, Signal) else condition
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _words(kinds: frozenset[Kind]) -> str:
    return " or ".join(sorted(kinds))


def _colliding(kinds: frozenset[Kind]) -> str:
    """Kinds of one rank cannot be told apart; `rows` is told by Signal.index."""
    if not isinstance(kinds, frozenset) or not kinds or kinds - set(get_args(Kind)):
        known = ", ".join(get_args(Kind))
        return f"a frozenset of some of {known}, as in frozenset({{'global', 'aligned'}})"
    for pair in ({"aligned", "map"}, {"aligned", "set"}, {"map", "set"}):
        if pair <= kinds:
            return f"{' and '.join(sorted(pair))} have one rank; a component takes one of them"
    if "self" in kinds and len(kinds) > 1:
        return "a component that reads the features alone takes no other condition"
    if "raw" in kinds and len(kinds) > 1:
        return "a component that owns its encoder takes no other condition"
    return ""
