"""Every law again on a CUDA device, where one is at hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from condmod.testing import conformance

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is at hand", allow_module_level=True)

_FOUND = importlib.util.spec_from_file_location(
    "condmod_law_tables", Path(__file__).with_name("test_laws.py")
)
tables = importlib.util.module_from_spec(_FOUND)
sys.modules[_FOUND.name] = tables
_FOUND.loader.exec_module(tables)


@conformance(tables.CASES)
def test_a_shipped_component_keeps_the_law_on_cuda(law, case):
    with torch.device("cuda"):
        law(case)
