"""A site on a module of the base: its class swapped for one that reads the slots.

One class for each class of the base, cached as torch's own parametrizations and FSDP2 do; what
differs between modules is data on the instance. So a deep copy and a pickle stay conditioned, keys
of the state dict stay, `isinstance` holds, and equal blocks share one compiled graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from condmod.attaching.frames import Slot
from condmod.errors import ShapeError, SiteError

Placement = Literal["input", "output", "around", "weight"]


class Swapped:
    """What a module's site is: where it acts and which slot it reads.

    Args:
        module: gets the site by `swap`.
        slot: holds what it applies.
        placement: on what the module reads, on what it gives, around it, or on its weight.
        reads: the name of the argument that holds the features.
        gives: which of several outputs holds them.
    """

    def __init__(
        self, module: nn.Module, slot: Slot, placement: Placement, reads: str, gives: int
    ) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.place = names.index(reads) if reads in names else 0
        self.slot = slot
        self.placement = placement
        self.reads = reads
        self.gives = gives
        self.on = True

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """The arguments with the features modulated, and these as they came."""
        modulator, modulation, strength = self.held()
        x = args[self.place] if self.place < len(args) else kwargs.get(self.reads)
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"the site {self.slot.place!r} conditions what its module reads, the argument "
                f"{self.reads!r}; it was called with {type(x).__name__}"
            )
        try:
            if self.placement == "input":
                entered = modulator.modulate(x, modulation)
            else:
                entered = modulator.enter(x, modulation[0], self._sublayer(module))
        except ShapeError as error:
            raise self._misfit(x, modulation, error) from None
        entered = _partly(x, entered, strength)
        args = tuple(entered if arg is x else arg for arg in args)
        return args, {key: entered if arg is x else arg for key, arg in kwargs.items()}, x

    def exit(self, module: nn.Module, x: Any, output: Any) -> Any:
        """The module's output with the features in it modulated."""
        if isinstance(output, Tensor):
            return self._change(module, x, output)
        kind: Any = type(output)
        several = isinstance(output, Mapping | tuple | list) and len(output) > self.gives
        items = list(output.values() if isinstance(output, Mapping) else output) if several else []
        if several and isinstance(items[self.gives], Tensor):
            items[self.gives] = self._change(module, x, items[self.gives])
            if isinstance(output, Mapping):
                changed = dict(zip(output, items, strict=True))
                return changed if kind is dict else kind(**changed)
            return kind(*items) if hasattr(output, "_fields") else kind(items)
        raise ShapeError(
            f"the site {self.slot.place!r} conditions what its module gives, a tensor or the item "
            f"{self.gives} of several; it gave {type(output).__name__}"
        )

    def _change(self, module: nn.Module, x: Any, y: Tensor) -> Tensor:
        """The features that a module gave, modulated."""
        modulator, modulation, strength = self.held()
        try:
            if self.placement == "output":
                changed = modulator.modulate(y, modulation)
            else:
                changed = modulator.exit(x, y, modulation[0], self._sublayer(module))
        except ShapeError as error:
            raise self._misfit(y, modulation, error) from None
        return _partly(y, changed, strength)

    def _sublayer(self, module: nn.Module) -> nn.Module | None:
        """The module, for a modulator that reads its weight."""
        return module if self.placement == "weight" else None

    def held(self) -> tuple[Any, Any, Tensor | None]:
        """What the slot holds, unpacked so that a refusal speaks."""
        held: Any = self.slot.held
        modulator, modulation, strength = held
        if not torch.compiler.is_compiling():  # a traced checkpoint must leave all as it was
            self.slot.reached = True
        return modulator, modulation, strength

    def _misfit(self, x: Any, modulation: Any, error: ShapeError) -> ShapeError:
        """The error, in terms of the condition where its batch is at fault."""
        sizes = {leaf.shape[0] for leaf in tensors(modulation)}
        if not isinstance(x, Tensor) or not x.ndim or sizes == {x.shape[0]}:
            return error
        return ShapeError(
            f"the condition has a batch of {', '.join(map(str, sorted(sizes)))}, the features "
            f"{tuple(x.shape)} at {self.slot.place!r} one of {x.shape[0]}; repeat the condition as "
            "the model repeats its input, for guidance or beams, and mind that some layers flatten "
            "windows or experts into the batch"
        )


def tensors(modulation: Any) -> list[Tensor]:
    """The leaves of a modulation."""
    if isinstance(modulation, Tensor):
        return [modulation]
    return [leaf for part in modulation for leaf in tensors(part)]


def _partly(x: Tensor, y: Tensor, strength: Tensor | None) -> Tensor:
    """Y at strength 1, x bit for bit at 0; under autocast the two may have different dtypes."""
    return y if strength is None else torch.lerp(x, y.to(x.dtype), strength.to(x.dtype))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _conditioned(base: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class `base` gets, the same one each time."""
    if base not in _CLASSES:
        _CLASSES[base] = _subclass(base)
    return _CLASSES[base]


def _subclass(base: type[nn.Module]) -> type[nn.Module]:
    own: Any = base.forward

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        sites = [site for site in self._condmod_sites if site.on and site.slot.held is not None]
        if not sites:
            return own(self, *args, **kwargs)
        entered = []
        for site in reversed(sites):
            x = None
            if site.placement != "output":
                args, kwargs, x = site.enter(self, args, kwargs)
            entered.append(x)
        output = own(self, *args, **kwargs)
        for site in sites:
            x = entered.pop()
            if site.placement != "input":
                output = site.exit(self, x, output)
        return output

    def reduce(self: Any, protocol: Any) -> Any:
        reduced: Any = base.__reduce_ex__(self, protocol)
        construct, arguments, *rest = reduced
        return _rebuild, (base, construct, arguments[1:]), *rest

    def refuse_script(self: Any) -> Any:  # torch.jit.script calls it before it reads anything
        place = self._condmod_sites[0].slot.place
        raise SiteError(
            f"torch.jit.script cannot read the site {place!r}, whose condition is set while the "
            "model runs; detach first, or use torch.export.export(conditioned, args, kwargs), "
            "torch.jit.trace or torch.compile"
        )

    body = {
        "forward": forward,
        "__prepare_scriptable__": refuse_script,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_condmod_base": base,
    }
    return type(base.__name__, (base,), body)


def _rebuild(base: type[nn.Module], construct: Any, arguments: Any) -> Any:
    return construct(_conditioned(base), *arguments)


def swap(module: nn.Module, site: Swapped) -> None:
    """Put a site on a module; the last one put is the outermost.

    Raises:
        SiteError: its class cannot be swapped, or its forward is not its class's.
    """
    if "forward" in vars(module):
        raise SiteError(
            f"the forward of {site.slot.place!r} is set on the module itself, as accelerate's "
            "hooks do, so that no other would be called; attach first, then wrap"
        )
    sites = sites_of(module)
    if not hasattr(type(module), "_condmod_base"):
        try:
            module.__class__ = _conditioned(type(module))
        except Exception as error:
            raise SiteError(
                f"the class {type(module).__name__} of {site.slot.place!r} cannot be conditioned: "
                f"{type(error).__name__}: {error}"
            ) from error
    module.__dict__["_condmod_sites"] = (*sites, site)


def restore(module: nn.Module, site: Swapped) -> None:
    """Take a site off a module; without sites it has its own class again."""
    left = tuple(other for other in sites_of(module) if other is not site)
    module.__dict__["_condmod_sites"] = left
    if left or "_condmod_base" not in vars(type(module)):  # or FSDP2 has wrapped the class
        return
    del module.__dict__["_condmod_sites"]
    module.__class__ = type(module)._condmod_base  # type: ignore[attr-defined]


def sites_of(module: nn.Module) -> tuple[Swapped, ...]:
    """The sites on a module, the innermost first."""
    sites: tuple[Swapped, ...] = vars(module).get("_condmod_sites", ())
    return sites
