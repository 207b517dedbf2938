"""The whole plugin contract: what a plugin may implement. Importing this imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

if TYPE_CHECKING:
    from pydantic import BaseModel

    from condmod.codec import Codec
    from condmod.component import Component
    from condmod.encoder import Encoder
    from condmod.layer import Layer


class Document(NamedTuple):
    """A kind of YAML file: the pydantic model of its content, and what reads and checks a file."""

    model: "type[BaseModel]"
    load: "Callable[[Path], BaseModel]"


hookspec = pluggy.HookspecMarker("condmod")
hookimpl = pluggy.HookimplMarker("condmod")


@hookspec
def condmod_modulators() -> "Sequence[type[Component[Any, Any]]]":
    """Return the modulator classes of a plugin.

    Each name (and alias) of each class is also an entry of the plugin's distribution in the
    group `condmod.modulators`, whose value is the module that holds this hookimpl.
    """
    return ()


@hookspec
def condmod_encoders() -> "Sequence[type[Encoder[Any]]]":
    """Return the encoder classes of a plugin; the group is `condmod.encoders`."""
    return ()


@hookspec
def condmod_codecs() -> "Sequence[Codec]":
    """Return the layouts of published checkpoints that a plugin knows for its own components.

    The module is the one that holds the plugin's `condmod_modulators`.
    """
    return ()


@hookspec
def condmod_documents() -> "Mapping[str, Document]":
    """Return the kinds of YAML file that a plugin reads, by name, for `condmod validate`.

    The plugin is an entry of its distribution in the group `condmod.plugins`, whose value is the
    module that holds this hookimpl.
    """
    return {}


@hookspec
def condmod_layers() -> "Mapping[str, Layer]":
    """Return how classes of layers read and give features, by dotted path, for `condmod.attach`.

    As in "acme.nn.Norm2d"; the class need not be installed. It holds for a subclass, too, unless
    that has a forward of its own. The plugin is an entry of the group `condmod.plugins`.
    """
    return {}
