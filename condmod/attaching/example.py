"""What the modules of a model read and give on an example input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.layers import Features, first_argument, infer
from condmod.attaching.sites import Placement
from condmod.errors import SiteError

_Seat = tuple[int, int]  # C and where it lies


class Observed:
    """A model's run on an example: what each module read and gave, and where channels lie.

    Args:
        model: is left as it was, its mode too; it runs in evaluation and without gradients.
        modules: those to look at, by name.
        example: one tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        SiteError: the model does not run on the example.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], example: Any) -> None:
        self.reads: dict[int, Tensor] = {}
        self.gives: dict[int, Tensor] = {}
        self.seats: dict[int, _Seat] = {}  # of tensors, by id; `kept` keeps them alive
        self.kept: list[Tensor] = []
        self.model = model
        modes = {module: module.training for module in model.modules()}
        with ExitStack() as stack:
            for module in {id(module): module for module in modules.values()}.values():
                stack.callback(self._watch(module))
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.no_grad())
            try:
                run(model.eval(), example)
            except Exception as error:
                raise SiteError(
                    f"the model does not run on the example: {type(error).__name__}: {error}"
                ) from error
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def called(self, module: nn.Module) -> bool:
        """Whether the example reached a module."""
        return id(module) in self.reads or id(module) in self.gives

    def infer(self, module: nn.Module, placement: Placement) -> Features | str:
        """The features at a module, as the example shows them, or why it does not."""
        ends = {"input": [self.reads], "output": [self.gives]}
        seats: list[_Seat] = []
        for side in ends.get(placement, [self.reads, self.gives]):
            seat = self._seat(module, side)
            if isinstance(seat, str):
                return seat
            seats.append(seat)
        (features, dim), (gives, end) = seats[0], seats[-1]
        if dim != end:
            return "what it reads and what it gives on the example have their channels elsewhere"
        argument = first_argument(module)
        return Features(features, dim, argument, 0, gives if gives != features else None)

    def _watch(self, module: nn.Module) -> Any:
        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            x, y = _first(args or tuple(kwargs.values())), _first(output)
            for end, store, tensor in (("input", self.reads, x), ("output", self.gives, y)):
                if tensor is None:
                    continue
                store[id(module)] = tensor
                self.kept.append(tensor)
                known = infer(module, "input" if end == "input" else "output")
                if not isinstance(known, Features) or tensor.ndim < 2:
                    continue
                if tensor.shape[known.channel_dim] == known.features:
                    self.seats.setdefault(id(tensor), known[:2])

        return module.register_forward_hook(note, with_kwargs=True).remove

    def _seat(self, module: nn.Module, end: dict[int, Tensor]) -> _Seat | str:
        tensor = end.get(id(module))
        if tensor is None or tensor.ndim < 2:
            return "it reads or gives no tensor with a batch and channels on the example"
        if tensor.ndim == 2:
            return tensor.shape[-1], -1
        shape = tuple(tensor.shape)
        if (seat := self.seats.get(id(tensor))) is not None:
            return seat
        inside = {id(below) for below in module.modules()}
        alike = [*self._alike(shape, inside), *self._partner(module, shape)]
        alike = alike or self._of_width(shape, inside)
        if not alike:
            return f"{shape} on the example may have its channels at dim 1 or last"
        if len(set(alike)) > 1:
            return f"{shape} on the example has layers inside that disagree where channels lie"
        return alike[0]

    def _alike(self, shape: tuple[int, ...], inside: Iterable[int]) -> list[_Seat]:
        """The seats of tensors of this shape that the module's own layers give or read."""
        tensors = [end[i] for i in inside for end in (self.reads, self.gives) if i in end]
        same = [tensor for tensor in tensors if tuple(tensor.shape) == shape]
        return [self.seats[id(tensor)] for tensor in same if id(tensor) in self.seats]

    def _partner(self, module: nn.Module, shape: tuple[int, ...]) -> list[_Seat]:
        """The seat of what a module that keeps the shape reads or gives."""
        ends = [end.get(id(module)) for end in (self.reads, self.gives)]
        if any(tensor is None or tuple(tensor.shape) != shape for tensor in ends):
            return []
        return [self.seats[id(tensor)] for tensor in ends if id(tensor) in self.seats]

    def _of_width(self, shape: tuple[int, ...], inside: Iterable[int]) -> list[_Seat]:
        """Where the channels lie if just one of the two places has a width of its own layers."""
        tensors = [end[i] for i in inside for end in (self.reads, self.gives) if i in end]
        widths = {self.seats[id(t)][0] for t in tensors if id(t) in self.seats}
        found = [(shape[dim], dim) for dim in (1, -1) if shape[dim] in widths]
        return found if len(found) == 1 else []


def run(model: nn.Module, example: Any) -> Any:
    """Call a model on an example: a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def _first(output: Any) -> Tensor | None:
    """The first floating tensor of an output, or of arguments."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        return _first(output[0])
    return None
