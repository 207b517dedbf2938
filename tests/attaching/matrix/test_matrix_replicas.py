"""Replicas, quantised bases and CUDA graphs."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from condmod import ConditionError, Site

GROUP = "Replicas, quantisation, CUDA graphs"


def replicate(module):
    """What nn.DataParallel makes for one device, on the CPU; its parameters are no leaves."""
    replicas = {id(one): one._replicate_for_data_parallel() for one in module.modules()}
    for one in module.modules():
        replica = replicas[id(one)]
        for name, child in one.named_children():
            replica._modules[name] = replicas[id(child)]
        for name, parameter in one._parameters.items():
            replica._parameters.pop(name, None)
            setattr(replica, name, None if parameter is None else parameter * 1)
    return replicas[id(module)]


def test_replicas_of_data_parallel(cell, attached, gradients, is_clean, c):
    conditioned = attached("blocks")
    x, conditions = torch.randn(4, 4, 8), torch.cat([c[0], c[1]])
    trained = list(conditioned.bank.parameters())
    expected = conditioned(x, condition=conditions, strength=0.5)
    expected.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in trained]
    conditioned.zero_grad()
    outputs = {}

    def work(i):
        part = slice(2 * i, 2 * i + 2)
        outputs[i] = replicas[i](x[part], condition=conditions[part], strength=0.5)

    replicas = [replicate(conditioned) for _ in range(2)]
    assert not list(replicas[0].parameters())
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output = torch.cat([outputs[0], outputs[1]])
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in trained], wanted)
    assert is_clean(conditioned)
    cell(
        GROUP,
        "`nn.DataParallel(conditioned)(x, condition=c)`, with its replicas simulated in threads",
    )
    errors = []

    def bare():
        try:
            replicas[0].base(x)
        except ConditionError as error:
            errors.append(error)

    with conditioned.condition(conditions):
        thread = threading.Thread(target=bare)
        thread.start()
        thread.join()
    assert "has no condition" in str(errors[0])
    cell(
        GROUP,
        "`with conditioned.condition(c):` around `nn.DataParallel(conditioned.base)`",
        refused="its threads have no condition, and each would need its part: hand the condition "
        "to the call",
    )


def quantised(model):
    """Torch's dynamic quantisation to int8, which it has deprecated for torchao."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_a_quantised_base_can_be_attached_to(cell, attached, drawn, x, c):
    x = x.detach()
    expected = attached().eval()(x, condition=c[0])
    base = quantised(copy.deepcopy(attached()).detach().eval())
    sites = {
        "blocks.*.norm": "film",
        "blocks.*.mlp": ("adaln_zero", Site(features=8)),
        "head": ("dense_film", "input", Site(features=8)),
    }
    conditioned = drawn(base, sites)
    conditioned.bank.load_state_dict(attached().bank.state_dict())
    got = conditioned(x, condition=c[0])
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(got, conditioned(x, condition=c[1]))
    assert type(base.head)._condmod_base is torch.ao.nn.quantized.dynamic.Linear
    cell(GROUP, "A base quantised to int8 (dynamic), then attached to, with the features by hand")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
            conditioned(x, condition=c[0]).sum().backward()
    cell(
        GROUP,
        "Training through a base quantised to int8 (dynamic)",
        refused="torch's own: its quantised layers have no gradient, and it warns so",
    )


def test_quantising_an_attached_base_leaves_its_sites_whole(cell, attached, x, c):
    conditioned = attached().eval()
    expected = conditioned(x, condition=c[0])
    smaller = quantised(conditioned)
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    assert type(smaller.base.blocks[0].mlp[0]) is dynamic
    assert isinstance(smaller.base.head, nn.Linear), "a site"
    got = smaller(x.detach(), condition=c[0])
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()
    cell(
        GROUP,
        "An attached model quantised to int8 (dynamic): layers that are sites stay as they are",
    )


def test_cuda_graphs(cell, attached):
    if not torch.cuda.is_available():
        cell(GROUP, "CUDA graphs, `mode='reduce-overhead'`", unmeasured="no GPU was at hand")
        pytest.skip("CUDA graphs need a GPU")
    conditioned = attached().cuda()
    x, c = torch.randn(2, 4, 8, device="cuda"), torch.randn(6, 2, 5, device="cuda")
    compiled = torch.compile(conditioned, mode="reduce-overhead", fullgraph=True)
    for one in c:
        loss = compiled(x, condition=one).square().sum()
        torch.testing.assert_close(loss, conditioned(x, condition=one).square().sum())
        loss.backward()
    cell(GROUP, "CUDA graphs, `mode='reduce-overhead'`")
