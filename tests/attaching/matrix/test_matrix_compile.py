"""torch.compile: whole, block by block, before and after attaching; one graph for everything."""

import copy
import shutil
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from condmod import Signal

# torch hides this of its own from users; a modulation is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
GROUP = "torch.compile"
ENCODER = "fuse(inputs={'time': timestep(dim=4), 'text': vector(features=6, nullable=True)})"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def operators(counter):
    """How often each operator stands in all captured graphs."""
    nodes = (node for graph in counter.graphs for node in graph.graph.nodes)
    return Counter(str(node.target) for node in nodes if node.op.startswith("call"))


def whole(model, backend, **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def regional(model, counter):
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    return model


def test_a_whole_model_has_one_graph_for_every_condition(cell, attached, counter, x, c):
    conditioned = attached()
    compiled = whole(conditioned, counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one in c:
            torch.testing.assert_close(compiled(x, condition=one), conditioned(x, condition=one))
    assert counter.frame_count == 1
    cell(GROUP, "The whole model, `torch.compile(conditioned, fullgraph=True)`: one graph")


def test_strengths_do_not_recompile(cell, attached, counter, x, c):
    conditioned = attached()
    compiled = whole(conditioned, counter)
    compiled(x, condition=c[0], strength=torch.tensor(0.3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.0, 0.5, 1.0):
            got = compiled(x, condition=c[0], strength=torch.tensor(strength))
            torch.testing.assert_close(got, conditioned(x, condition=c[0], strength=strength))
    assert counter.frame_count == 1
    cell(GROUP, "Strengths that are tensors without dims: one graph")
    for strength in (0.1, 0.2):  # a number, and then any number
        compiled(x, condition=c[0], strength=strength)
    before = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.0, 0.5, 1.0):
            got = compiled(x, condition=c[0], strength=strength)
            torch.testing.assert_close(got, conditioned(x, condition=c[0], strength=strength))
    assert counter.frame_count == before
    cell(GROUP, "Strengths that are numbers: torch compiles once more, then for all numbers")


def test_presence_does_not_recompile(cell, attached, counter, x):
    conditioned = attached(condition_dim=None, encoder=ENCODER)
    compiled = whole(conditioned, counter)

    def raw(*present):
        text = Signal(torch.randn(2, 6), present=torch.tensor(present))
        return {"time": torch.randint(50, (2,)), "text": text}

    compiled(x, condition=raw(True, False))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for present in ((True, True), (False, True), (False, False)):
            one = raw(*present)
            torch.testing.assert_close(compiled(x, condition=one), conditioned(x, condition=one))
    assert counter.frame_count == 1
    cell(GROUP, "An encoder and presence masks, `Signal(value, present=...)`: one graph")


def test_batch_sizes_do_not_recompile_when_they_are_dynamic(cell, attached):
    conditioned = attached(blocks=1)
    compiled = whole(conditioned, "eager", dynamic=True)
    compiled(torch.randn(2, 4, 8), condition=torch.randn(2, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 7):
            x, c = torch.randn(batch, 4, 8), torch.randn(batch, 5)
            torch.testing.assert_close(compiled(x, condition=c), conditioned(x, condition=c))
    cell(GROUP, "Batch sizes that change, with `dynamic=True`: no recompile")


def test_twelve_blocks_share_one_graph(cell, attached, counter, x, c):
    conditioned = attached(blocks=12)
    expected = [conditioned(x, condition=one) for one in c]
    regional(conditioned.base, counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one, output in zip(c, expected, strict=True):
            torch.testing.assert_close(conditioned(x, condition=one), output)
    assert counter.frame_count == 1
    cell(GROUP, "Block by block, `block.compile(fullgraph=True)`: 12 equal blocks share one graph")


def test_attaching_after_compiling_is_seen(cell, attached, drawn, net, counter, x, c):
    patterns = {"blocks.*.norm": "film", "blocks.*.mlp": "adaln_zero"}
    for way, says in (
        (whole, "Compiled whole before it was attached to, `attach(torch.compile(model), ...)`"),
        (regional, "Blocks compiled before they were attached to"),
    ):
        torch._dynamo.reset()
        counter.clear()
        torch.manual_seed(0)
        eager = drawn(net(), patterns)
        model = net()
        model.load_state_dict(eager.base.state_dict())
        compiled = way(model, counter)
        compiled(x)
        conditioned = drawn(compiled, patterns)
        conditioned.bank.load_state_dict(eager.bank.state_dict())
        got = conditioned(x, condition=c[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for one in c[1:]:
                torch.testing.assert_close(conditioned(x, condition=one), eager(x, condition=one))
        torch.testing.assert_close(got, eager(x, condition=c[0]))
        assert counter.frame_count == 2, "one without the attachment, one with it"
        with conditioned.disabled():
            torch.testing.assert_close(compiled(x), conditioned.base(x))
        cell(GROUP, f"{says}: one graph more")


def test_a_condition_around_a_compiled_base_does_not_recompile(cell, attached, counter, x, c):
    conditioned = attached()
    compiled = whole(conditioned.base, counter)
    with conditioned.condition(c[0]):
        compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one in c:
            with conditioned.condition(one):
                torch.testing.assert_close(compiled(x), conditioned.base(x))
    assert counter.frame_count == 1
    cell(
        GROUP,
        "`with conditioned.condition(c):` around `torch.compile(conditioned.base)`: one graph",
    )


class ByHand(nn.Module):
    """The attached model as one would write it without attach."""

    def __init__(self, conditioned):
        super().__init__()
        self.base = copy.deepcopy(conditioned).detach()
        self.bank = conditioned.bank

    def forward(self, x, condition):
        made, modulators = self.bank(condition), self.bank.modulators()
        for i, block in enumerate(self.base.blocks):
            norm, around = f"blocks.{i}.norm", f"blocks.{i}.mlp"
            h = modulators[norm].modulate(block.norm(x), made[norm])
            y = block.mlp(modulators[around].enter(h, made[around][0], block.mlp))
            x = x + modulators[around].exit(h, y, made[around][0], block.mlp)
        return self.base.head(modulators["head"].modulate(x, made["head"]))


def test_the_graph_is_that_of_the_model_written_by_hand(cell, attached, counter, x, c):
    conditioned = attached()
    other = CompileCounterWithBackend("aot_eager")
    by_hand = ByHand(conditioned)
    got = whole(conditioned, counter)(x, condition=c[0])
    torch.testing.assert_close(got, whole(by_hand, other)(x, c[0]))
    assert operators(counter) == operators(other)
    assert operators(counter).total() > 40
    cell(
        GROUP, "The graph has the operators of the same model with the conditioning written by hand"
    )


def test_a_model_with_graph_breaks_is_conditioned_and_checkpointed(
    cell, attached, net, gradients, is_clean, counter, x, c
):
    class Broken(net):
        def trunk(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return super().trunk(x)

    conditioned = attached("blocks", net=Broken)
    compiled = torch.compile(conditioned, backend=counter)

    def step(model):
        outputs = [model(x, condition=one) for one in c[:2]]  # two, so that no state serves both
        (outputs[0].square() + outputs[1].sin()).sum().backward()

    expected = gradients(conditioned, lambda: step(conditioned))
    got = gradients(conditioned, lambda: step(compiled))
    torch.testing.assert_close(got, expected)
    assert counter.frame_count > 1
    assert is_clean(conditioned)
    cell(GROUP, "Graph breaks in the base, without `fullgraph`: compiled in pieces")


def test_a_training_step_compiled_as_a_function(cell, attached, gradients, counter, x, c):
    conditioned = attached()

    def step():
        with conditioned.condition(c[0]):
            conditioned.base(x).square().sum().backward()

    expected = gradients(conditioned, step)
    got = gradients(conditioned, torch.compile(step, backend=counter))
    torch.testing.assert_close(got, expected)
    cell(GROUP, "A training step as one compiled function, condition and backward inside")


def test_a_compiled_graph_has_one_backward_unless_it_keeps_its_buffers(
    cell, attached, gradients, counter, x, c
):
    conditioned = attached("blocks")

    def step():
        loss = conditioned(x, condition=c[0]).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    expected = gradients(conditioned, step)
    regional(conditioned.base, counter)
    conditioned(x, condition=c[0]).sum().backward()  # compiles what gives its buffers away
    with pytest.raises(RuntimeError, match="compiled with non-empty donated buffers"):
        gradients(conditioned, step)
    cell(
        GROUP,
        "A second backward pass, `backward(retain_graph=True)`, of a compiled model",
        refused="torch's own: backward passes compiled before give their buffers away",
    )
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        torch.testing.assert_close(gradients(conditioned, step), expected)
        cell(GROUP, "The same under `torch._functorch.config.donated_buffer = False`")
        loss = conditioned(x, condition=c[0]).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            gradient.sum().backward()
    cell(
        GROUP,
        "A gradient of a gradient through a compiled model",
        refused="torch's own: torch.compile with AOT autograd has no double backward",
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor on a CPU needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_inductor_gives_the_same(cell, attached, gradients, x, c):
    conditioned = attached(blocks=1)
    compiled = torch.compile(conditioned, fullgraph=True)
    expected = gradients(conditioned, lambda: conditioned(x, condition=c[0]).sin().sum().backward())
    got = gradients(conditioned, lambda: compiled(x, condition=c[0]).sin().sum().backward())
    torch.testing.assert_close(got, expected)
    cell(GROUP, "The default compiler, inductor, forward and backward")
