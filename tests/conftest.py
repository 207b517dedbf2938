"""What every test shares: fixed seeds, and an environment that shuts no plugin out."""

import random

import numpy
import pytest
import torch
from hypothesis import settings

settings.register_profile("condmod", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("condmod")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed every generator, and let the environment neither allow nor disable plugins."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.delenv("CONDMOD_PLUGINS", raising=False)
    monkeypatch.delenv("CONDMOD_DISABLE", raising=False)
