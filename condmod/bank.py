"""The modulators of many sites as one module, which generates for all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from condmod.component import Component
from condmod.config import ModulatorConfig
from condmod.errors import ShapeError, SiteError
from condmod.functional.projecting import project
from condmod.linear import LinearGenerator, generate_linear, indexed
from condmod.site import Condition, Shared, Signal, Site
from condmod.spec import nearest

_STEPS = ("generate", "prepare", "unpack")
_RESERVED = frozenset(dir(nn.ModuleDict()))


class UnknownSiteError(SiteError, KeyError):
    """A bank has no site of this name."""

    def __str__(self) -> str:  # KeyError's own shows the repr
        return Exception.__str__(self)


class Bank(nn.Module):
    """One modulator per site, and what they share, which a state dict shows once.

    Args:
        config: the options of every modulator.
        sites: the places by name. In the state dict a name's dots read as slashes, and a name
            that torch keeps for itself, such as "keys", has a slash behind it.

    Raises:
        SiteError: no site, or the component does not fit one.
    """

    def __init__(self, config: ModulatorConfig, sites: Mapping[str, Site]) -> None:
        super().__init__()
        if not sites:
            raise SiteError(f"a bank of {config} needs at least one site")
        cls: type[Component[Any, Any]] = config.component
        keys = [_key(name) for name in sites]
        for name, key in zip(sites, keys, strict=True):
            if not name or keys.count(key) > 1:
                raise SiteError(
                    f"the sites of a bank have distinct names (dots read as slashes); got {name!r}"
                )
        self.config = config
        self.names = tuple(sites)
        self.shared = cls.shared(config, list(sites.values()))
        own = {_key(name): cls(config, site) for name, site in sites.items()}
        self.modulators = nn.ModuleDict(own)
        self._together = _share_prepare(own.values())

    def generate(self, condition: Condition) -> dict[str, Any]:
        """The modulation of every site, by name; what is shared runs once.

        Where generators are linear and all that they have is their projection, `prepare` runs once,
        too, and the projections together.
        """
        if self.shared is None:
            modulators = cast("Iterable[Component[Any, Any]]", self.modulators.values())
            own = dict(zip(self.names, modulators, strict=True))
            # what stands in front of a `generate` (condmod.inspect, FSDP2's own) is to be called
            if self._together and all(map(self._is_as_made, own.values())):
                return _generate_together(own, condition)
            return {name: module.generate(condition) for name, module in own.items()}
        shared = Shared(self.shared(self._accepted(condition)))
        return {name: indexed(self[name].generate(shared), condition) for name in self}

    def _is_as_made(self, module: Component[Any, Any]) -> bool:
        """Whether a modulator is the bank's own, with nothing in front of its steps."""
        own = vars(module)
        return module.config is self.config and not any(step in own for step in _STEPS)

    def _accepted(self, condition: Condition) -> Any:
        """The condition as the first site takes it, and so as all of them do."""
        accepted = self[self.names[0]].accept(condition)
        rows = isinstance(condition, Signal) and condition.index is not None
        ends = {self[name].site.channel_dim for name in self}
        if accepted.ndim > 2 and not rows and len(ends) > 1:
            raise ShapeError(
                f"{self.config}: an aligned condition fits sites with their channels at one end; "
                "this bank has sites of both"
            )
        return accepted

    def forward(self, condition: Condition) -> dict[str, Any]:
        """The same as `generate`."""
        return self.generate(condition)

    def reset_parameters(self) -> None:
        """Draw what is shared and then every site's parameters afresh."""
        for module in (self.shared, *self.modulators.values()):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]

    def prefix(self, name: str) -> str:
        """What the keys of a site's modulator begin with in the state dict."""
        return f"modulators.{_key(name)}"

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            mend = nearest(str(name), self) or f"; it has {', '.join(self):.200}"
            raise UnknownSiteError(f"this bank of {self.config} has no site {name!r}{mend}")
        return self.modulators[_key(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _key(name) in self.modulators

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _key(name: str) -> str:
    key = name.replace(".", "/")
    return f"{key}/" if key in _RESERVED else key


def _generate_together(
    components: Mapping[str, Component[Any, Any]], condition: Condition
) -> dict[str, Any]:
    """What `generate_linear` gives for each of several sites that share `prepare`.

    Args:
        components: modulators by the names of their sites.
        condition: one of their kinds; where it is wrong, the error names the first site.
    """
    generators = cast("Mapping[str, LinearGenerator[Any]]", components)
    prepared = next(iter(generators.values())).prepare(condition)
    # a look into _modules is a tenth of nn.Module.__getattr__, once per site
    layers = [cast(Any, component._modules["proj"]) for component in components.values()]
    made = zip(generators.items(), project(prepared, layers), strict=True)
    return {name: indexed(each.unpack(rows), condition) for (name, each), rows in made}


def _share_prepare(components: Collection[Component[Any, Any]]) -> bool:
    """Whether `prepare` gives the same at every site of a bank.

    It does where the generator is linear, all conditions come in one way, and no modulator has a
    parameter or buffer but those of the module `proj`: then nothing is left that could differ.
    """
    ways = {(component.site.condition_dim, component.site.channel_dim) for component in components}
    return len(ways) == 1 and all(
        getattr(type(component), "generate", None) is generate_linear
        and isinstance(component._modules.get("proj"), nn.Module)
        and all(name.startswith("proj.") for name in _tensor_names(component))
        for component in components
    )


def _tensor_names(component: nn.Module) -> Iterator[str]:
    """The names of all parameters and buffers."""
    for tensors in (component.named_parameters(), component.named_buffers()):
        yield from (name for name, _ in tensors)
