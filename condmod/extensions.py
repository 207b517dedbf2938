"""What the plugins of the group `condmod.plugins` bring, hook by hook."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pluggy

from condmod import hooks
from condmod.entries import module_of, owner, provenance, shut_out
from condmod.errors import PluginError, told


def brought(hook: str) -> dict[str, Any]:
    """Everything that plugins bring by a hook, by name; a plugin that fails brings nothing."""
    found: dict[str, Any] = {}
    for point in _points():
        try:
            found.update(_asked(point, hook))
        except PluginError:  # `check` tells of it
            continue
    return found


def check() -> dict[str, PluginError | None]:
    """Load every plugin of the group `condmod.plugins`, by module; gives what is wrong with it."""
    verdicts: dict[str, PluginError | None] = {}
    for point in _points():
        verdicts.setdefault(module_of(point), None)
        for hook in ("condmod_documents", "condmod_layers"):
            try:
                _asked(point, hook)
            except PluginError as error:
                verdicts[module_of(point)] = error
    return verdicts


def _points() -> list[metadata.EntryPoint]:
    points = metadata.entry_points(group="condmod.plugins")
    return [point for point in points if not shut_out(owner(point)[0])]


def _asked(point: metadata.EntryPoint, hook: str) -> Mapping[str, Any]:
    """What one plugin brings, asked alone."""
    manager = pluggy.PluginManager("condmod")
    manager.add_hookspecs(hooks)
    found: dict[str, Any] = {}
    try:
        manager.register(importlib.import_module(module_of(point)))
        for brings in getattr(manager.hook, hook)():
            found.update(brings)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the plugin {point.name!r} comes from {provenance(point)}, whose module "
            f"{module_of(point)} failed: {told(error)}; `condmod doctor` shows the traceback"
        ) from error
    return found
