"""What attach knows of the layers of timm, transformers, diffusers and peft."""

from collections.abc import Mapping

import condmod
from condmod_hosts import diffusers, peft, timm, transformers


@condmod.hookimpl
def condmod_layers() -> Mapping[str, condmod.Layer]:
    """How their layers read and give features."""
    return {**timm.LAYERS, **transformers.LAYERS, **diffusers.LAYERS, **peft.LAYERS}
