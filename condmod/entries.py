"""What is installed, read from entry-point metadata alone, and what the environment shuts out."""

import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from typing import Any

from condmod.config import Role

GROUPS: dict[Role, str] = {"modulator": "condmod.modulators", "encoder": "condmod.encoders"}
HOOKS: dict[Role, str] = {"modulator": "condmod_modulators", "encoder": "condmod_encoders"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One name and where it comes from; `file` and `line` are known once it is loaded."""

    name: str
    role: Role
    module: str
    distribution: str
    version: str
    file: str = ""
    line: int = 0

    @property
    def provenance(self) -> str:
        """Distribution and version, or the notebook's module, for people to read."""
        return f"{self.distribution} {self.version}".strip()


def installed_state() -> tuple[Any, ...]:
    """What decides which components there are: the import path with its times, the environment."""
    lists = [os.environ.get(variable) for variable in ("CONDMOD_PLUGINS", "CONDMOD_DISABLE")]
    return (*lists, *((folder, _changed(folder)) for folder in sys.path))


def installed_entries() -> tuple[Entry, ...]:
    """Every component entry of every installed distribution; scanned again when one changes."""
    return _entries(installed_state())


@lru_cache(maxsize=1)
def _entries(_state: tuple[Any, ...]) -> tuple[Entry, ...]:
    importlib.invalidate_caches()
    return tuple(
        Entry(point.name, role, module_of(point), *owner(point))
        for role, group in GROUPS.items()
        for point in metadata.entry_points(group=group)
    )


def by_name(
    given: tuple[Entry, ...] | None = None,
) -> tuple[dict[str, list[Entry]], dict[str, str]]:
    """Entries by name, and why others are shut out; of all that is installed unless given."""
    entries: dict[str, list[Entry]] = {}
    shut: dict[str, str] = {}
    for entry in installed_entries() if given is None else given:
        reason = shut_out(entry.distribution) if given is None else ""
        if reason:
            shut.setdefault(entry.name, f"{entry.provenance} ({reason})")
        elif entry not in entries.get(entry.name, []):
            entries.setdefault(entry.name, []).append(entry)
    return entries, shut


def owner(point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of an entry point's distribution; half removed, it may lack its metadata."""
    fields: Any = (point.dist and point.dist.metadata) or {}
    return fields.get("Name") or "unknown", fields.get("Version") or ""


def provenance(point: metadata.EntryPoint) -> str:
    """Name and version of an entry point's distribution, for people to read."""
    return " ".join(owner(point)).strip()


def module_of(point: metadata.EntryPoint) -> str:
    """The module that an entry point names, even where that is no name and `point.module` fails."""
    return point.value.partition(":")[0].partition("[")[0].strip()


def shut_out(distribution: str) -> str:
    """Why the environment does not let a distribution in, or ""."""
    name = _normal(distribution)
    if name in _listed("CONDMOD_DISABLE"):
        return "shut out by CONDMOD_DISABLE"
    allowed = os.environ.get("CONDMOD_PLUGINS")
    if allowed is not None and name != "condmod" and name not in _listed("CONDMOD_PLUGINS"):
        return "not among CONDMOD_PLUGINS"
    return ""


def located(entry: Entry, cls: type) -> Entry:
    """The entry with the file and line of its class, where Python knows them."""
    try:
        file, line = inspect.getsourcefile(cls) or "", inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        file, line = getattr(sys.modules.get(cls.__module__), "__file__", None) or "", 0
    return replace(entry, file=file, line=line)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except (OSError, ValueError):
        return 0


def _listed(variable: str) -> set[str]:
    return {_normal(item) for item in os.environ.get(variable, "").split(",") if item.strip()}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()
