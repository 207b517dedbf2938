"""The registry: names from entry-point metadata, and one plugin loaded when one name is asked.

Listing reads metadata alone. A plugin that fails is kept in quarantine with its traceback, and
told to whoever asks for one of its names; the others go on.
"""

import fnmatch
import importlib
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import pluggy

from condmod import hooks
from condmod.config import Role
from condmod.entries import GROUPS, HOOKS, Entry, by_name, installed_state, located
from condmod.errors import (
    DefinitionError,
    PluginConflictError,
    PluginError,
    UnknownNameError,
    told,
)
from condmod.spec import is_name, nearest
from condmod.tables import html_table

if TYPE_CHECKING:
    from condmod.codec import Codec

ComponentT = TypeVar("ComponentT", bound=type)


class Registry:
    """Every component that is installed or registered, by name; modulators and encoders alike.

    Args:
        entries: what there is; by default the installed distributions' entry points, less
            those that the environment shuts out (`CONDMOD_PLUGINS` names the only third-party
            distributions allowed, `CONDMOD_DISABLE` those that are not; commas between).

    Examples:
        >>> Registry([])
        <Registry: 0 components from 0 distributions>
    """

    def __init__(self, entries: Iterable[Entry] | None = None) -> None:
        self._fixed = None if entries is None else tuple(entries)
        self._manager = pluggy.PluginManager("condmod")
        self._manager.add_hookspecs(hooks)
        self._registered: dict[str, tuple[Entry, type[Any]]] = {}
        self._loaded: dict[str, dict[str, type[Any]]] = {}
        self._reasons: dict[str, str] = {}
        self._loading = threading.RLock()
        self._scanning = threading.Lock()
        self.quarantine: dict[str, str] = {}
        self._entries: dict[str, list[Entry]] = {}
        self._shut: dict[str, str] = {}
        self._scanned: tuple[Any, ...] | None = None
        self._scan()

    def _scan(self) -> None:
        """Read the metadata, unless nothing has changed; readers see all of it or nothing."""
        with self._scanning:
            state = installed_state() if self._fixed is None else ()
            if state != self._scanned:
                self._entries, self._shut = by_name(self._fixed)
                self._scanned = state

    def names(self, role: Role | None = None) -> list[str]:
        """Every name, sorted; from metadata, nothing is imported."""
        known = [entry for group in self._entries.values() for entry in group]
        known += [entry for entry, _ in self._registered.values()]
        return sorted({entry.name for entry in known if role in (None, entry.role)})

    def match(
        self, pattern: str = "*", role: Role | None = None, exclude: str | Iterable[str] = ()
    ) -> list[str]:
        """Names that match a wildcard and none of `exclude`."""
        without = [exclude] if isinstance(exclude, str) else list(exclude)
        return [
            name
            for name in self.names(role)
            if fnmatch.fnmatchcase(name, pattern)
            and not any(fnmatch.fnmatchcase(name, other) for other in without)
        ]

    def entry(self, name: str) -> Entry:
        """Where a name comes from, from metadata.

        Raises:
            UnknownNameError: nothing has this name; the nearest one is offered.
            PluginConflictError: two distributions have it.
        """
        if name in self._registered:
            return self._registered[name][0]
        if name not in self._entries:
            self._scan()  # something may have been installed meanwhile
        entries = self._entries.get(name)
        if entries is None:
            raise UnknownNameError(self._unknown(name))
        if len(entries) > 1:
            owners = " and ".join(
                sorted(f"{item.provenance} ({item.role} in {item.module})" for item in entries)
            )
            raise PluginConflictError(
                f"{name!r} is claimed by {owners}; uninstall one, or shut it out with "
                "CONDMOD_DISABLE=<distribution>"
            )
        return entries[0]

    def _unknown(self, name: str) -> str:
        if name in self._shut:
            return f"{name!r} is provided by {self._shut[name]}"
        mend = nearest(name, self.names())
        hint = "; `condmod list` shows what is installed"
        if not mend and "." in name:
            hint = f"; if a package provides it, install that package{hint}"
        return f"no component is called {name!r}{mend or hint}"

    def load(self, name: str, role: Role | None = None) -> type[Any]:
        """The class that a name stands for; imports its plugin, and that one alone.

        Raises:
            UnknownNameError: nothing has this name, or what has it is of the other role.
            PluginConflictError: two distributions have it.
            PluginError: the plugin failed; the traceback is in `quarantine`.
        """
        entry = self.entry(name)
        if role not in (None, entry.role):
            raise UnknownNameError(
                f"{name!r} is {an(entry.role)}, not {an(role or entry.role)}; "
                f"{role}s here: {', '.join(self.names(role)) or 'none'}"
            )
        cls = (
            self._registered[name][1]
            if name in self._registered
            else self._provided(entry).get(name)
        )
        if cls is None:
            raise PluginError(
                f"{entry.provenance} declares {name!r} in the group {GROUPS[entry.role]}, but "
                f"its module {entry.module} does not provide it"
            )
        if name in cls.deprecated:
            warnings.warn(
                f"the component {name!r} is deprecated: {cls.deprecated[name]}",
                FutureWarning,
                stacklevel=4,
            )
        return cls

    def _provided(self, entry: Entry) -> dict[str, type[Any]]:
        """Name to class for one plugin module and role, imported once, under guard."""
        key = f"{entry.module}:{entry.role}"
        with self._loading:
            if key not in self._loaded and entry.module not in self.quarantine:
                try:
                    self._loaded[key] = self._import(entry)
                except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin may raise anything
                    self._reasons[entry.module] = told(error)
                    self.quarantine[entry.module] = "".join(traceback.format_exception(error))
        if entry.module in self.quarantine:
            raise PluginError(
                f"{entry.name!r} comes from {entry.provenance}, whose module {entry.module} "
                f"failed: {self._reasons[entry.module]}; `condmod doctor` shows the traceback"
            )
        return self._loaded[key]

    def _import(self, entry: Entry) -> dict[str, type[Any]]:
        module = importlib.import_module(entry.module)
        if not self._manager.is_registered(module):
            try:
                self._manager.register(module, name=entry.module)
            except Exception:
                if self._manager.has_plugin(entry.module):
                    self._manager.unregister(name=entry.module)
                raise
        provided: dict[str, type[Any]] = {}
        for classes in self._ask(module, HOOKS[entry.role]):
            for cls in classes:
                for name in _check(cls, entry.role):
                    if provided.setdefault(name, cls) is not cls:
                        raise DefinitionError(
                            f"{name!r} is the name of both {provided[name].__qualname__} and "
                            f"{cls.__qualname__}"
                        )
        return provided

    def _ask(self, module: Any, hook: str) -> list[Any]:
        """What one plugin alone answers to a hook."""
        others = [plugin for plugin in self._manager.get_plugins() if plugin is not module]
        answers: list[Any] = self._manager.subset_hook_caller(hook, others)()
        return answers

    def codecs(self, name: str) -> "list[Codec]":
        """The layouts of published checkpoints that are known for a component.

        Raises:
            UnknownNameError: nothing has this name.
            PluginError: the plugin failed, names a source twice, or a component that is not its
                own.
        """
        cls, entry = self.load(name), self.entry(name)
        module = self._manager.get_plugin(entry.module)
        if module is None:  # registered by hand
            return []
        try:
            return self._codecs(cls.name, entry, module)
        except (Exception, SystemExit) as error:  # a plugin may raise anything
            raise PluginError(
                f"{entry.provenance} failed to give the codecs of {name!r}: {told(error)}"
            ) from error

    def _codecs(self, name: str, entry: Entry, module: Any) -> "list[Codec]":
        from condmod.codec import Codec

        roles: tuple[Role, ...] = get_args(Role)
        both = [self._provided(replace(entry, role=role)) for role in roles]
        own = {other.name for provided in both for other in provided.values()}
        found: dict[tuple[str, str], Codec] = {}
        for codecs in self._ask(module, "condmod_codecs"):
            for codec in codecs:
                if not isinstance(codec, Codec):
                    raise DefinitionError(f"condmod_codecs gives Codecs; got {codec!r:.80}")
                key = (codec.component, codec.source)
                if codec.component not in own:
                    raise DefinitionError(
                        f"{entry.module} brings a codec for {codec.component!r}, which is not "
                        "its own component"
                    )
                if found.setdefault(key, codec) is not codec:
                    raise DefinitionError(
                        f"{entry.module} brings two codecs of {codec.component!r} for "
                        f"{codec.source!r}"
                    )
        return [codec for (component, _), codec in found.items() if component == name]

    def register(self, cls: ComponentT) -> ComponentT:
        """Add a class by hand, as in a notebook; usable as a decorator.

        Raises:
            DefinitionError: it is no concrete component.
            PluginConflictError: an installed plugin, or another class, has its name.
        """
        from condmod.component import same_class
        from condmod.encoder import Encoder

        role: Role = "encoder" if _is_a(cls, Encoder) else "modulator"
        names = _check(cls, role)
        for name in names:
            if name in self._entries:
                raise PluginConflictError(
                    f"{name!r} is already provided by {self.entry(name).provenance}; choose "
                    "another name, with a namespace as in 'acme.gate'"
                )
            held = self._registered.get(name)
            if held and not same_class(held[1], cls):
                raise PluginConflictError(
                    f"{name!r} is already registered by {held[1].__module__}."
                    f"{held[1].__qualname__}; choose another name"
                )
        for name in names:
            entry = Entry(name, role, cls.__module__, f"registered in {cls.__module__}", "")
            self._registered[name] = (located(entry, cls), cls)
        return cls

    def check(self) -> dict[str, str]:
        """Load everything; name to "" or to what is wrong. This is what `doctor` shows."""
        verdicts = {}
        for name in sorted({*self._entries, *self._registered, *self._shut}):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    self.load(name)
                    self.codecs(name)
                verdicts[name] = ""
            except (PluginError, UnknownNameError) as error:
                verdicts[name] = str(error)
        return verdicts

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let nested specs be looked up here while the context is open."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._registered

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        owners = {entry.distribution for group in self._entries.values() for entry in group}
        owners |= {entry.distribution for entry, _ in self._registered.values()}
        counts = f"{_count(len(self), 'component')} from {_count(len(owners), 'distribution')}"
        broken = f", {_count(len(self.quarantine), 'plugin')} failed" if self.quarantine else ""
        return f"<Registry: {counts}{broken}>"

    def _repr_html_(self) -> str:
        claims = [entry for group in self._entries.values() for entry in group]
        claims += [entry for entry, _ in self._registered.values()]
        rows = sorted((entry.name, entry.role, entry.provenance) for entry in claims)
        return html_table(("name", "role", "from"), rows)


_ACTIVE: ContextVar["Registry | None"] = ContextVar("condmod_registry", default=None)


@cache
def default_registry() -> Registry:
    """The process's registry of what is installed."""
    return Registry()


def active_registry() -> Registry:
    """The registry of the surrounding `active()` context, else the process's."""
    return default_registry() if (registry := _ACTIVE.get()) is None else registry


def an(role: Role) -> str:
    """The role with its article."""
    return "an encoder" if role == "encoder" else "a modulator"


def _check(cls: Any, role: Role) -> list[str]:
    """The names of a concrete component class of this role."""
    from condmod.component import Component
    from condmod.encoder import Encoder
    from condmod.modulator import Modulator, SublayerModulator

    bases = {"modulator": (Modulator, SublayerModulator), "encoder": (Encoder,)}[role]
    words = " or ".join(base.__name__ for base in bases)
    if not _is_a(cls, *bases) or cls in bases:
        hint = "; subclass Modulator" if _is_a(cls, Component) else ""
        raise DefinitionError(f"{cls!r} is no concrete {words} with a `name`{hint}")
    if "name" not in cls.__dict__:
        raise DefinitionError(f"{cls!r} lacks a `name` of its own, as in name = 'acme.gate'")
    if cls.__abstractmethods__:
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise DefinitionError(f"{cls.__name__} ({cls.name!r}) does not implement {missing}")
    names = [cls.name, *cls.aliases, *cls.deprecated]
    for name in names:
        if not is_name(name):
            raise DefinitionError(
                f"{cls.__name__}: a name is plain ASCII words with dots between, as in film or "
                f"acme.gate; got {name!r}"
            )
    return names


def _is_a(cls: Any, *bases: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, bases)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
