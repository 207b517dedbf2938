"""The sites of an attachment on its model, and what the model was before the first of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from condmod.attaching.frames import Slot
from condmod.attaching.patterns import named_modules, plain_name, reader
from condmod.attaching.planned import Plan
from condmod.attaching.sites import Swapped, restore, sites_of, swap
from condmod.errors import SiteError

Freeze = Literal["base", "none"] | Sequence[str]
_BEFORE = "_condmod_before"  # on the model: flags of it as they were before its first attachment


class Standing:
    """Where an attachment stands on its model.

    Attributes:
        sites: by name.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Swapped] = {}
        self._hooks: list[RemovableHandle] = []
        self._keeps_statistics = False
        self._missed: set[str] = set()

    def put(self, base: nn.Module, plan: Plan, attachment: str, freeze: Freeze) -> None:
        """Put every site of a plan on a model, or none where one cannot be.

        Raises:
            SiteError: a module cannot be conditioned, or a pattern of `freeze` matches nothing.
        """
        frozen = list(_to_freeze(base, freeze))
        modules = {**named_modules(base), "": base}
        try:
            for planned in plan:
                module = modules[planned.site.name]
                slot = Slot(planned.site.name, attachment)
                site = Swapped(module, slot, planned.placement, planned.argument, planned.item)
                swap(module, site)
                self.sites[planned.site.name] = site
        except BaseException:
            self.lift(base)
            raise
        before = base.__dict__.setdefault(_BEFORE, {"trains": {}, "nested": {}, "still": set()})
        parameters = dict(base.named_parameters())
        for name in frozen:
            before["trains"].setdefault(name, parameters[name].requires_grad)
            parameters[name].requires_grad_(False)
        for name, module in modules.items():
            if isinstance(module, nn.TransformerEncoder) and _has_sites(module):
                before["nested"].setdefault(name, module.use_nested_tensor)
                module.use_nested_tensor = False
            if isinstance(module, nn.TransformerEncoderLayer) and _has_sites(module):
                self._hooks.append(module.norm1.register_forward_pre_hook(_slow))
        self._keeps_statistics = freeze != "none"
        before["still"] |= {name for name, norm in self._still(base) if norm.training}
        self.hold_statistics(base)

    def lift(self, base: nn.Module) -> None:
        """Take every site off; with the last attachment the model's flags are as before."""
        for name, module in self.modules(base).items():
            restore(module, self.sites[name])
        for hook in self._hooks:
            hook.remove()
        self.sites, self._hooks, self._keeps_statistics = {}, [], False
        if _has_sites(base) or _BEFORE not in vars(base):
            return
        before = base.__dict__.pop(_BEFORE)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(before["trains"].get(name, parameter.requires_grad))
        for name, module in {**named_modules(base), "": base}.items():
            if name in before["nested"]:
                module.use_nested_tensor = before["nested"][name]
            if name in before["still"]:
                module.training = base.training

    def modules(self, base: nn.Module) -> dict[str, nn.Module]:
        """The module of every site, whatever its name is now: peft wraps layers."""
        names = {id(site): name for name, site in self.sites.items()}
        return {
            names[id(site)]: module
            for module in base.modules()
            for site in sites_of(module)
            if id(site) in names
        }

    def hold_statistics(self, base: nn.Module) -> None:
        """Put frozen batch norms in evaluation; no other module's mode is touched."""
        for _, norm in self._still(base):
            norm.training = False

    def forget_reached(self) -> None:
        """Forget which sites earlier passes have reached."""
        if not torch.compiler.is_compiling():
            for site in self.sites.values():
                site.slot.reached = False

    def tell_missed(self, base: nn.Module) -> None:
        """Warn, once each, of sites that a pass did not reach: no condition acts there."""
        if torch.compiler.is_compiling():
            return
        missed = [
            name
            for name, site in self.sites.items()
            if not site.slot.reached and name not in self._missed
        ]
        self._missed.update(missed)
        if missed and not any(map(_is_compiled, base.modules())):  # which notes nothing
            warnings.warn(
                f"the condition did not reach {', '.join(missed):.400}: the model did not call "
                "that module, reads its weight alone, or has another in its place",
                stacklevel=3,
            )

    def _still(self, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The norms whose running statistics are to stay, by name."""
        if not self._keeps_statistics:
            return
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        for name, module in {**named_modules(base), "": base}.items():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                own = list(module.parameters(recurse=False))
                if frozen or (own and not any(p.requires_grad for p in own)):
                    yield name, module


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _to_freeze(model: nn.Module, freeze: Freeze) -> Iterator[str]:
    """The names of the parameters that do not train.

    Raises:
        SiteError: a pattern that matches neither a module nor a parameter, or no patterns.
    """
    parameters = dict(model.named_parameters())
    if freeze == "none":
        return
    if freeze == "base":
        yield from parameters
        return
    if isinstance(freeze, str) or not isinstance(freeze, Sequence):
        raise SiteError(f"freeze is 'base', 'none' or a list of patterns; got {freeze!r}")
    modules = named_modules(model)
    for pattern in freeze:
        reads = reader(pattern)
        above = [name for name, module in modules.items() if reads(name, module)]
        found = [
            name
            for name in parameters
            if any(plain_name(name).startswith(f"{module}.") for module in above)
            or (not pattern.startswith("type:") and reads(plain_name(name), None))
        ]
        if not found:
            raise SiteError(f"the pattern {pattern!r} of freeze matches no module or parameter")
        yield from found


def _has_sites(model: nn.Module) -> bool:
    return any(sites_of(module) for module in model.modules())


def _slow(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing but keep torch's encoder layers from reading weights alone."""
