"""What modulators that own an encoder share: encode and generate, modulate, name the place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from condmod.errors import CondmodError
from condmod.site import Condition, Signal


def generate_owned(owner: Any, condition: Condition) -> Any:
    """The modulation that `owner.inner` makes of what `owner.encoder` makes of the signals.

    Args:
        owner: a modulator with `encoder` and `inner`, as `create_with_encoder` builds them.
        condition: what the encoder takes.

    Raises:
        CondmodError: what is wrong, with the owner's name and site before it.
    """
    try:
        encoded = owner.encoder(condition)
        value = encoded.value if isinstance(encoded, Signal) else encoded
        if value.ndim > 2 and owner.site.channel_dim == 1:
            value = value.movedim(-1, 1)
        return owner.inner.generate(value)
    except CondmodError as error:
        raise type(error)(f"{owner.where()}: {error}") from error


def modulate_owned(owner: Any, x: Tensor, modulation: Any) -> Tensor:
    """What `owner.inner` makes of the features.

    Raises:
        CondmodError: what is wrong, with the owner's name and site before it.
    """
    try:
        out: Tensor = owner.inner.modulate(x, modulation)
    except CondmodError as error:
        raise type(error)(f"{owner.where()}: {error}") from error
    return out
