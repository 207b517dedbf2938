"""The conditions that are set, thread by thread, and how a backward pass gets them back.

A site reads its slot. What a slot holds is set while a condition is open, and again while a
backward pass recomputes activations of that forward pass: the tensors saved while a condition is
open carry it (public `saved_tensors_hooks`), and the first of them that a backward pass unpacks
puts it back, until that pass ends. So activation checkpointing recomputes what it computed, after
the condition was closed, or while another is open.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from condmod.errors import ConditionError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DYNAMO = torch._C._dynamo.eval_frame


def _as_it_is(function: _Function) -> _Function:
    """Keep torch.compile from compiling a function by itself, where a graph breaks around it.

    In a whole graph it is traced through all the same.
    """
    skip = _DYNAMO._FrameExecStrategy(_DYNAMO._FrameAction.SKIP, _DYNAMO._FrameAction.DEFAULT)
    _DYNAMO.set_code_exec_strategy(function.__code__, skip)
    return function


class Held(NamedTuple):
    """What a site applies while a condition is open."""

    modulator: Any
    modulation: Any
    strength: Tensor | None


class Refusal:
    """Stands where a site should find what it applies; whoever reads it is told why it cannot."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self) -> Iterator[Any]:
        raise ConditionError(self.text)


class Slot(threading.local):
    """What one site applies in this thread: Held, None where it is switched off, or a Refusal.

    Args:
        place: the site's name.
        attachment: the attachment's name.
    """

    held: Held | Refusal | None

    def __init__(self, place: str, attachment: str) -> None:
        self.place = place
        self.attachment = attachment
        self.unset = Refusal(
            f"the site {place!r} has no condition: the attachment {attachment!r} is on, so call "
            "conditioned(x, condition=...), run the model inside `with "
            "conditioned.condition(...)`, or switch it off with conditioned.disabled(); a copy "
            "of the bare model cannot be conditioned: copy what attach returned, or "
            "condmod.detach(model)"
        )
        self.held = self.unset
        self.reached = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.place, self.attachment)


Frame = tuple[tuple[Slot, Held | Refusal | None], ...]
_REENTRANT = CheckpointFunction.backward.__code__
_REENTRANT_TEXT = (
    "the site {!r} lies inside reentrant activation checkpointing, which gives its modulation no "
    "gradient; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), in transformers "
    "activation_checkpointing_enable({{'use_reentrant': False}})"
)


class _Thread(threading.local):
    """What is open in this thread, and what a running backward pass has put in its place."""

    def __init__(self) -> None:
        self.open: tuple[Opened, ...] = ()
        self.replay: _Replay | None = None
        self.shown: tuple[Frame, ...] = ()

    @_as_it_is
    def show(self) -> None:
        """Fill the slots with what is open, or with a replay and what was opened since."""
        replay = self.running()
        put, before = ((), ()) if replay is None else (replay.put, replay.before)
        opened = (
            opened.frame for opened in self.open if opened not in before and not opened.closed
        )
        old, self.shown = self.shown, (*put, *opened)
        for frame in old:
            for slot, _ in frame:
                slot.held = slot.unset
        for frame in self.shown:
            for slot, held in frame:
                slot.held = held

    @_as_it_is
    def running(self) -> _Replay | None:
        """The innermost replay; those that are over are dropped."""
        while self.replay is not None and self.replay.over:
            self.replay = self.replay.outer
        return self.replay


_THREAD = _Thread()


class Opened:
    """A context in which slots hold something; every slot is as before at its end.

    Args:
        frame: each slot with what it is to hold.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.thread = 0
        self.closed = False

    @_as_it_is
    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            for slot, held in self.frame:
                slot.held = held
            return
        if self.thread:
            raise ConditionError(
                "the context of a condition is entered once; call condition() or disabled() again"
            )
        for slot, _ in self.frame:
            if not isinstance(slot.held, Refusal) and not is_recomputing():
                raise ConditionError(
                    f"the attachment {slot.attachment!r} already has a condition, or is switched "
                    f"off, in this thread (site {slot.place!r}); leave that context first"
                )
        self.thread = threading.get_ident()
        self.replayed: AbstractContextManager[Any] = nullcontext()
        _THREAD.open = (*_THREAD.open, self)
        _THREAD.show()
        if not torch._C._are_functorch_transforms_active():  # they take no hooks
            self.replayed = _capture(_THREAD.shown)
        self.replayed.__enter__()

    @_as_it_is
    def __exit__(self, *error: Any) -> None:
        if torch.compiler.is_compiling():
            for slot, _ in self.frame:
                slot.held = slot.unset
            return
        if threading.get_ident() != self.thread:
            raise ConditionError("the context of a condition is left in the thread that entered it")
        self.closed = True
        while _THREAD.open and _THREAD.open[-1].closed:  # autograd's hooks are a stack
            _THREAD.open[-1].replayed.__exit__(None, None, None)
            _THREAD.open = _THREAD.open[:-1]
        _THREAD.show()


@_as_it_is
def _capture(frames: tuple[Frame, ...]) -> AbstractContextManager[Any]:
    """Hooks that give the tensors saved meanwhile what is open now.

    Autograd calls the innermost hooks alone, so these call those that they hide: checkpointing,
    save_on_cpu.
    """
    hidden = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = hidden or (_note_version, _check_version)
    original = unpack.original if isinstance(unpack, _Unpack) else unpack
    return torch.autograd.graph.saved_tensors_hooks(pack, _Unpack(frames, original))


class _Unpack:
    """Gives a saved tensor back, and puts what was open then into the slots."""

    def __init__(self, frames: tuple[Frame, ...], original: Callable[[Any], Tensor]) -> None:
        self.frames = frames
        self.original = original

    @_as_it_is
    def __call__(self, packed: Any) -> Tensor:
        tensor = self.original(packed)  # first: it may run, and so open, all of this again
        task = torch._C._current_graph_task_id()
        if task != -1:
            reentrant = sys._getframe(1).f_code is _REENTRANT
            replay = _THREAD.replay
            if replay is None or not replay.is_of(self.frames, task, reentrant):
                _begin(self.frames, task, reentrant)
        return tensor


@_as_it_is
def _note_version(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


@_as_it_is
def _check_version(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor, unless it was changed in place: torch's own check, which hooks switch off."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: {tensor.type()} {tuple(tensor.shape)} is at version "
            f"{tensor._version}; expected version {version} instead"
        )
    return tensor


def is_recomputing() -> bool:
    """Whether a backward pass runs, in which checkpointing may open a condition once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Replay:
    """What a backward pass has put into the slots of this thread."""

    @_as_it_is
    def __init__(self, outer: _Replay | None) -> None:
        self.outer = outer
        self.before = _THREAD.open
        self.over = False
        self.put: tuple[Frame, ...] = ()
        self.frames: tuple[Frame, ...] = ()
        self.task = -1
        self.reentrant = False

    @_as_it_is
    def is_of(self, frames: tuple[Frame, ...], task: int, reentrant: bool) -> bool:
        """Whether the slots hold just this."""
        same = self.frames is frames and self.task == task and self.reentrant == reentrant
        return same and not self.over


class _End:
    """Ends a replay when autograd calls it at the end of a backward pass, or drops it on error."""

    def __init__(self, replay: _Replay) -> None:
        self.replay = replay
        self.thread = threading.get_ident()

    @_as_it_is
    def __call__(self) -> None:
        replay = self.replay
        if replay.over:
            return
        replay.over = True
        if threading.get_ident() == self.thread:
            _THREAD.show()

    __del__ = __call__


@_as_it_is
def _begin(frames: tuple[Frame, ...], task: int, reentrant: bool) -> None:
    """Put what these frames hold into their slots until this backward pass ends."""
    current = _THREAD.running()
    if current is None or current.task != task:
        current = _THREAD.replay = _Replay(current)
        torch.autograd.Variable._execution_engine.queue_callback(_End(current))
    current.frames, current.task, current.reentrant = frames, task, reentrant
    current.put = _refusals(frames) if reentrant else frames
    _THREAD.show()


def _refusals(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Frames in which each site says that reentrant checkpointing cannot recompute it."""
    return tuple(
        tuple(
            (slot, None if held is None else Refusal(_REENTRANT_TEXT.format(slot.place)))
            for slot, held in frame
        )
        for frame in frames
    )
