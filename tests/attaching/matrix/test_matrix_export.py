"""Exported models take the condition as an input."""

import io
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from condmod import Signal, SiteError

GROUP = "Exporting"
ENCODER = "fuse(inputs={'time': timestep(dim=4), 'text': vector(features=6, nullable=True)})"


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_condition_and_the_strength(cell, attached, x, c, strict):
    conditioned = attached()
    half = torch.tensor(0.5)
    program = export(
        conditioned, (x,), {"condition": c[0], "strength": half}, strict=strict
    ).module()
    for one, strength in zip(c, (0.0, 0.3, 0.7, 1.0), strict=True):
        given = {"condition": one, "strength": torch.tensor(strength)}
        torch.testing.assert_close(program(x, **given), conditioned(x, **given))
    how = ", strict=True" if strict else ""
    cell(
        GROUP,
        f"`torch.export.export(conditioned, (x,), {{'condition': c, 'strength': s}}{how})`: both "
        "are inputs of the program",
    )


def test_export_with_a_batch_of_any_size_saves_and_loads(cell, attached):
    conditioned = attached()
    batch = Dim("batch", min=2, max=64)
    program = export(
        conditioned,
        (torch.randn(2, 4, 8),),
        {"condition": torch.randn(2, 5)},
        dynamic_shapes={"args": ({0: batch},), "condition": {0: batch}},
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5):
        x, c = torch.randn(size, 4, 8), torch.randn(size, 5)
        torch.testing.assert_close(loaded(x, condition=c), conditioned(x, condition=c))
    cell(GROUP, "An exported program with a dynamic batch, saved and loaded")


def test_export_with_an_encoder_takes_raw_signals_and_presence(cell, attached, x):
    conditioned = attached(condition_dim=None, encoder=ENCODER)

    def raw(*present):
        text = Signal(torch.randn(2, 6), present=torch.tensor(present))
        return {"time": torch.randint(50, (2,)), "text": text}

    program = export(conditioned, (x,), {"condition": raw(True, False)}).module()
    for present in ((True, True), (False, True), (False, False)):
        one = raw(*present)
        torch.testing.assert_close(program(x, condition=one), conditioned(x, condition=one))
    cell(GROUP, "An exported program of a model with an encoder: raw signals and presence masks")


def test_a_disabled_model_exports_as_the_base(cell, attached, x):
    conditioned = attached()
    with conditioned.disabled():
        expected = conditioned(x)
        program = export(conditioned, (x,)).module()
    assert torch.equal(program(x), expected)
    cell(GROUP, "Exported while it is disabled: the base")


@pytest.fixture
def _quiet(monkeypatch):
    """The exporter tells that torchvision is not there."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    monkeypatch.setattr(logger, "disabled", True)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings(  # the exporter's own
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name:UserWarning"
)
def test_onnx_takes_the_condition(cell, attached, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    conditioned = attached().eval()
    batch = Dim("batch", min=2, max=64)
    path = tmp_path / "conditioned.onnx"
    torch.onnx.export(
        conditioned,
        (torch.randn(2, 4, 8),),
        path,
        kwargs={"condition": torch.randn(2, 5)},
        dynamic_shapes={"args": ({0: batch},), "condition": {0: batch}},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features, condition = (given.name for given in session.get_inputs())
    assert condition == "condition"
    for size in (2, 5):
        x, c = torch.randn(size, 4, 8), torch.randn(size, 5)
        (got,) = session.run(None, {features: x.numpy(), condition: c.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(got), conditioned(x, condition=c).detach(), rtol=1e-4, atol=1e-5
        )
    cell(
        GROUP,
        "`torch.onnx.export(..., dynamo=True)`, run by ONNX Runtime: the condition is an input",
    )


class Positional(nn.Module):
    """What torch.jit.trace wants: tensors as positional arguments with names."""

    def __init__(self, conditioned):
        super().__init__()
        self.conditioned = conditioned

    def forward(self, x, condition):
        return self.conditioned(x, condition=condition)


def test_torchscript(cell, attached, x, c):
    conditioned = attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes are checked once
        traced = torch.jit.trace(Positional(conditioned).eval(), (x, c[0]))
        for one in c:
            torch.testing.assert_close(traced(x, one), conditioned(x, condition=one))
        cell(GROUP, "`torch.jit.trace` of a module that hands the condition on")
        for model in (conditioned, conditioned.base):
            with pytest.raises(SiteError) as caught:
                torch.jit.script(model)
            assert str(caught.value) == (
                "torch.jit.script cannot read the site 'blocks.0.norm', whose condition is set "
                "while the model runs; detach first, or use torch.export.export(conditioned, "
                "args, kwargs), torch.jit.trace or torch.compile"
            )
        torch.jit.script(conditioned.detach().blocks[0].norm)
    cell(
        GROUP,
        "`torch.jit.script`",
        refused="it reads source and cannot see a condition that is set while the model runs; "
        "torch has deprecated it for `torch.export`",
    )
