"""The door of the passes: how a backend is chosen, and that each gives the same."""

import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import condmod
from condmod import BackendError, functional
from condmod.functional import (
    backend,
    backends,
    eager,
    featurewise_affine,
    gated_residual,
    gated_residual_affine,
    normalisation,
    set_backend,
    use_backend,
)


@pytest.fixture(autouse=True)
def auto():
    yield
    set_backend("auto")


def test_a_backend_is_chosen_everywhere_and_inside_a_block_in_one_thread():
    assert backend() == "auto"
    set_backend("compile")
    assert backend() == "compile"
    other = []
    with use_backend("eager"):
        assert backend() == "eager"
        with use_backend("auto"):
            assert backend() == "auto"
        thread = threading.Thread(target=lambda: other.append(backend()))
        thread.start()
        thread.join()
    assert other == ["compile"]
    assert backend() == "compile"


def test_a_block_that_fails_gives_the_choice_back():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backend() == "auto"


@pytest.mark.parametrize(("value", "said"), [("compile", "compile"), ("", "auto")])
def test_the_environment_chooses_before_anyone_does(value, said):
    code = "from condmod.functional import backend; print(backend())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"CONDMOD_BACKEND": value, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{said}\n"


@pytest.mark.parametrize(
    ("choose", "said_by"), [(set_backend, "set_backend"), (use_backend, "use_backend")]
)
def test_a_backend_that_is_not_known_is_refused(choose, said_by):
    with pytest.raises(BackendError) as caught, choose("cuda"):
        pass
    assert str(caught.value) == (f"{said_by} takes one of auto, eager, compile, triton; got 'cuda'")


def test_an_environment_that_names_no_backend_is_told_at_the_first_pass(monkeypatch):
    monkeypatch.setattr(backends, "_everywhere", ["fast"])
    x = torch.zeros(2, 3, 4)
    with pytest.raises(BackendError) as caught:
        gated_residual(x, x, torch.zeros(2, 4))
    assert str(caught.value) == (
        "CONDMOD_BACKEND takes one of auto, eager, compile, triton; got 'fast'"
    )


def test_kernels_on_a_cpu_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 3, 4)
    with use_backend("triton"), pytest.raises(BackendError) as caught:
        gated_residual(x, x, torch.zeros(2, 4))
    assert str(caught.value) == (
        "the backend triton cannot run: triton kernels run on a GPU, the features are on cpu; move "
        "them, or set TRITON_INTERPRET=1 before triton is imported to try them slowly; or choose "
        "the backend auto"
    )


def test_it_is_chosen_at_the_top_of_the_package():
    assert condmod.set_backend is functional.set_backend
    assert condmod.use_backend is functional.use_backend


def run(kind, aligned):
    torch.manual_seed(0)
    size = (2, 6, 8) if aligned else (2, 8)
    inputs = [torch.randn(2, 6, 8) for _ in range(2)] + [torch.randn(size) for _ in range(3)]
    x, y, gate, scale, shift = (value.requires_grad_() for value in inputs)
    norm = None if kind == "none" else normalisation(kind, 8)
    made = (
        featurewise_affine(x, (scale, shift), norm=norm),
        gated_residual(x, y, gate, form="one_plus"),
        *gated_residual_affine(x, y, gate, (scale, shift), norm=norm),
    )
    total = sum(value.square().sum() for value in made)
    return *made, *torch.autograd.grad(total, (x, y, gate, scale, shift))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", ["none", "layer", "rms"])
def test_a_compiled_backend_gives_what_the_eager_one_gives(monkeypatch, kind, aligned):
    calls = []

    def compiled(inner):
        def called(*given):
            calls.append(inner.__name__)
            return torch.compile(inner, backend="aot_eager", fullgraph=True)(*given)

        return called

    monkeypatch.setattr(backends, "compiled", compiled)
    torch.compiler.reset()
    with use_backend("eager"):
        want = run(kind, aligned)
    assert not calls
    with use_backend("compile"):
        got = run(kind, aligned)
    assert calls == ["plain_affine", "plain_gate", "plain_gate_affine"]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_sites_share_what_was_compiled():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(eager.plain_affine, backend=counter)
    x, pair = torch.randn(2, 6, 8), (torch.randn(2, 8), torch.randn(2, 8))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backends, "compiled", lambda inner: run)
        with use_backend("compile"):
            for site in range(3):
                norm = normalisation("layer", 8)
                featurewise_affine(x, pair, norm=norm, where=lambda site=site: f"adaln at {site}")
    assert counter.frame_count == 1
