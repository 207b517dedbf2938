"""The kinds of YAML file that plugins read, so that `validate` and `schema` know them."""

from __future__ import annotations

import importlib
from importlib import metadata

import pluggy

from condmod import hooks
from condmod.entries import shut_out
from condmod.errors import PluginError


def documents() -> dict[str, hooks.Document]:
    """Every kind of document of every plugin, by name.

    Raises:
        PluginError: a plugin failed; names its distribution.
    """
    manager = pluggy.PluginManager("condmod")
    manager.add_hookspecs(hooks)
    for point in metadata.entry_points(group="condmod.plugins"):
        owner = point.dist.metadata["Name"] if point.dist else "unknown"
        if shut_out(owner):
            continue
        try:
            manager.register(importlib.import_module(point.module), name=point.module)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"the plugin {point.module} of {owner} failed: {type(error).__name__}: {error}"
            ) from error
    found: dict[str, hooks.Document] = {}
    for kinds in manager.hook.condmod_documents():
        found.update(kinds)
    return found
