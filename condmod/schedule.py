"""A table of all modulations of a finite set of conditions, looked up by their values."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from math import prod
from threading import get_ident
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from condmod.errors import ConditionError, ShapeError
from condmod.site import Condition
from condmod.trees import filled, leaves, named

_MIB: Final = 2**20


class Schedule:
    """The modulations of a finite set of conditions: generated once, then looked up by value.

    With k keys of n_1, ..., n_k values there are K = n_1·…·n_k conditions, and row r of the table
    holds module(condition r). For a condition with (B,) values of each key,
    schedule(condition) = module(condition) up to rounding, for the price of one gather.

    Before a lookup the module's weights are compared with those of the table, which is filled anew
    where one has changed. In a `with schedule:` block, as around the steps of a sampler, that is
    done at its beginning, and inside only signs of a change are looked at: an optimiser's step,
    other modules or tensors, versions, places in memory, autocast. A write through
    `parameter.data` or a view of numpy leaves no sign, and counts from the next block on. What a
    module holds beside parameters, buffers and modules, such as hooks, is not watched.

    On a GPU a lookup inside a block waits for nothing and reads the same memory each time, also
    after the table was filled anew, so it can be part of a CUDA graph.

    Args:
        module: turns the condition into modulations, such as a bank, the bank of an attachment, or
            nn.Sequential(encoder, bank); in eval mode. Its rows do not depend on each other.
        keys: the condition, with all values that it may have, (n,), in place of each tensor (B,):
            one tensor, a Signal, or a mapping of names to these.

    Attributes:
        rows: K.
        table_bytes: memory of the table.
        kept_bytes: memory of the weights that are kept to compare with.

    Raises:
        ConditionError: there is no key, or one is empty or not finite; the module is in training
            mode.
        ShapeError: a key is not (n,); what the module gives is no tree of floating (K, ...).
    """

    def __init__(self, module: nn.Module, keys: Condition) -> None:
        self.module = module
        self.keys = keys
        self._values = {name: _distinct(name, key) for name, key in named(keys)}
        if not self._values:
            raise ConditionError("a schedule needs a key, the values of a condition; got none")
        self.rows = prod(len(key) for key in self._values.values())
        self._tables: dict[torch.dtype, Tensor] = {}
        self._kept: list[Tensor] = []
        self._signs: tuple[Any, Any] = ((), ())
        self._blocks: Counter[int] = Counter()
        self._fill()

    def __call__(self, condition: Condition) -> Any:
        """The modulations of a condition, as the module gives them, without their gradients.

        Args:
            condition: as `keys`, with (B,) values of the keys' dtypes, on the module's device.

        Raises:
            ConditionError: a value is not in the schedule (on a GPU its modulation is NaN
                instead), or is of another dtype or device; the keys are others; the module is in
                training mode; or a gradient would have to be recorded.
            ShapeError: the values are not (B,).
        """
        if "torch._dynamo" not in sys.modules:  # which compiles, and takes a second to import
            return self._look_up(condition)
        apart = torch.compiler.disable(Schedule._look_up)  # type: ignore[no-untyped-call]
        return apart(self, condition)

    def _look_up(self, condition: Condition) -> Any:
        self._check()
        values = dict(named(condition))
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*self._weights, *values.values())
        ):
            raise ConditionError(
                "a schedule gives no gradients; look up under torch.no_grad(), or generate without"
            )
        row = self._row(values)
        found: list[Tensor] = []
        for dtype, table in self._tables.items():
            found += torch.split(table.index_select(0, row), self._widths[dtype], 1)
        parts = [
            found[at] if shape is None else found[at].view(len(row), *shape)
            for at, shape in self._parts
        ]
        return filled(self._made, iter(parts))

    def __enter__(self) -> Schedule:
        """Compare the weights now, and within the block look at signs alone."""
        self._check(trusted=False)
        self._blocks[get_ident()] += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks[get_ident()] -= 1

    def __str__(self) -> str:
        """Its memory, and when it pays: a count, not a time."""
        keys = " x ".join(f"{len(key)} {name}" for name, key in self._values.items())
        return (
            f"schedule of {self.rows} conditions ({keys}): table {self.table_bytes / _MIB:.1f} "
            f"MiB, kept weights {self.kept_bytes / _MIB:.1f} MiB; pays once {self.rows} conditions "
            "are looked up (counted: to fill it generates as many)"
        )

    @property
    def table_bytes(self) -> int:
        """Memory of the table."""
        return sum(table.nbytes for table in self._tables.values())

    @property
    def kept_bytes(self) -> int:
        """Memory of the weights that are kept to compare with."""
        return sum(tensor.nbytes for tensor in self._kept)

    def _check(self, *, trusted: bool = True) -> None:
        """Fill the table anew where what it was filled by has changed."""
        modules, weights = _state(self.module)
        signs = _signs(modules, weights)
        seen = all(version >= 0 for _, version in signs[1][1])  # inference tensors have none
        if signs == self._signs and trusted and seen and self._blocks[get_ident()]:
            return
        same = signs[0] == self._signs[0] and len(weights) == len(self._kept)
        if same and all(map(_equal, weights, self._kept)):
            self._note(modules, weights)
        else:
            self._fill()

    def _note(self, modules: list[nn.Module], weights: list[Tensor]) -> None:
        """Note the signs of now, and hold what they point to, so that nothing else gets there."""
        self._signs, self._weights = _signs(modules, weights), weights
        self._held = modules, [weight.detach() for weight in weights]

    def _fill(self) -> None:
        """Generate every row, into the memory of the former table where that fits."""
        self._signs = ((), ())  # if anything fails, the next lookup begins anew
        modules, weights = _state(self.module)
        device = next((weight.device for weight in weights), None)
        with torch.inference_mode(False), torch.no_grad():
            self._values = {name: key.to(device) for name, key in self._values.items()}
            self._kept = [weight.detach().clone() for weight in weights]
            values = self._values.values()
            places = [torch.arange(len(key), device=key.device) for key in values]
            grid = torch.meshgrid(*places, indexing="ij")
            likes = (key.dtype for _, key in named(self.keys))
            columns = (
                key[at.flatten()].to(dtype)
                for key, at, dtype in zip(values, grid, likes, strict=True)
            )
            made = self.module(filled(self.keys, columns))
            self._tabulate(list(leaves(made)))
        self._made = filled(made, (leaf.new_empty(0) for leaf in leaves(made)))
        self._note(modules, weights)

    def _tabulate(self, made: list[Tensor]) -> None:
        """Put what was generated side by side, leaves of one dtype in one table."""
        for leaf in made:
            if not leaf.is_floating_point() or leaf.ndim < 1 or len(leaf) != self.rows:
                raise ShapeError(
                    f"a schedule holds floating modulations with a row for each of its {self.rows} "
                    f"conditions; {type(self.module).__name__} gave {leaf.dtype} "
                    f"{tuple(leaf.shape)}"
                )
        order = sorted(range(len(made)), key=lambda at: str(made[at].dtype))
        tables, self._widths = {}, {}
        for dtype, group in groupby(order, key=lambda at: made[at].dtype):
            flat = [made[at].reshape(self.rows, prod(made[at].shape[1:])) for at in group]
            whole = torch.cat(flat, 1)
            missing = whole.new_full((1, whole.shape[1]), torch.nan)
            tables[dtype] = _into(self._tables.get(dtype), torch.cat([whole, missing]))
            self._widths[dtype] = [part.shape[1] for part in flat]
        self._tables = tables
        self._parts = [
            (order.index(at), None if leaf.ndim == 2 else leaf.shape[1:])
            for at, leaf in enumerate(made)
        ]

    def _row(self, values: Mapping[str, Tensor]) -> Tensor:
        """The row of each sample; the last one, of NaN, where a value is not in the schedule."""
        if values.keys() != self._values.keys():
            raise ConditionError(
                f"this schedule's keys are {', '.join(self._values)}; got {', '.join(values)}"
            )
        first = next(iter(values.values()))
        row, known = torch.zeros((), dtype=torch.long, device=first.device), None
        for (name, key), (_, like) in zip(self._values.items(), named(self.keys), strict=True):
            value = _fitting(name, values[name], like.dtype, key.device, first.shape)
            place = torch.searchsorted(key, value.contiguous()).clamp_(max=len(key) - 1)
            hit = key.index_select(0, place) == value
            if _may_wait(value) and not hit.all():
                raise ConditionError(_absent(name, key, value[~hit][0]))
            row = row * len(key) + place
            known = hit if known is None else known & hit
        assert known is not None
        return torch.where(known, row, self.rows)


def _distinct(name: str, key: Tensor) -> Tensor:
    """The values of a key in order; False and True as 0 and 1, as torch sorts no bools."""
    if key.ndim != 1:
        raise ShapeError(
            f"a schedule's key is a row of values, (n,); got {name!r} {tuple(key.shape)}"
        )
    if not len(key) or not key.isfinite().all():
        raise ConditionError(f"a schedule's key has finite values, one at least; {name!r} has not")
    sortable = key.to(torch.uint8) if key.dtype == torch.bool else key
    return cast(Tensor, torch.unique(sortable.detach()))


def _fitting(
    name: str, value: Tensor, dtype: torch.dtype, device: torch.device, shape: torch.Size
) -> Tensor:
    """The values of one key as they are searched for."""
    if value.ndim != 1 or value.shape != shape:
        raise ShapeError(
            f"a schedule is looked up by one value per sample, (B,); got {name!r} "
            f"{tuple(value.shape)}"
        )
    if (value.dtype, value.device) != (dtype, device):
        raise ConditionError(
            f"the schedule's {name!r} is {dtype} on {device}; got {value.dtype} on "
            f"{value.device}; convert the values"
        )
    return value.to(torch.uint8) if dtype == torch.bool else value


def _may_wait(value: Tensor) -> bool:
    """Whether a look at what a tensor holds is free: elsewhere it would wait for the device."""
    return value.device.type == "cpu"


def _absent(name: str, key: Tensor, value: Tensor) -> str:
    nearest = key[(key.double() - value.double()).abs().argmin()]
    return (
        f"the schedule has no {name} {value.item()}; the nearest of its {len(key)} is "
        f"{nearest.item()}; build it with every value that is looked up, or generate without it"
    )


def _state(module: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Every module and tensor inside; as `modules()` and `parameters()`, in a tenth of the time.

    Raises:
        ConditionError: a module is in training mode.
    """
    modules, weights = [module], []
    for one in modules:  # grows on the way
        if one.training:
            raise ConditionError(
                f"a schedule's module is in eval mode, as in training it may draw at random; "
                f"{type(one).__name__} is not: call eval()"
            )
        for tensors in (one._parameters, one._buffers):
            weights += [tensor for tensor in tensors.values() if tensor is not None]
        modules += [child for child in one._modules.values() if child is not None]
    return modules, weights


def _signs(modules: list[nn.Module], weights: list[Tensor]) -> tuple[Any, Any]:
    """What shows a change: of the module's make or of autocast, and of the weights' values."""
    kinds = {weight.device.type for weight in weights}
    casts = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(kinds - {"meta"})
    ]
    marks = [
        (weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights
    ]
    return (casts, list(map(id, modules))), (_steps()[0], marks)


@cache
def _steps() -> list[int]:
    """How many steps optimisers have made: fused ones change weights and leave no other sign."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    register_optimizer_step_post_hook(add)
    return count


def _equal(weight: Tensor, kept: Tensor) -> bool:
    same = (weight.shape, weight.dtype, weight.device) == (kept.shape, kept.dtype, kept.device)
    return same and torch.equal(weight, kept)


def _into(former: Tensor | None, table: Tensor) -> Tensor:
    """The table, in the former one's memory where it has its shape: graphs have its address."""
    fits = former is not None and former.shape == table.shape and former.device == table.device
    return former.copy_(table) if fits and former is not None else table
