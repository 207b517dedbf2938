"""A folded model gives what it gave under its condition, and unfolds bit for bit."""

import copy
import re

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import ConditionError, FoldError

C = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))


def drawn(conditioned):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in conditioned.bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return conditioned


class One(nn.Module):
    """One layer under a name."""

    def __init__(self, it):
        super().__init__()
        self.it = it
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, *args):
        y = self.it(*args)
        return self.gain * (y[0] if isinstance(y, tuple) else y)


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def mlp():
    return nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 6))


EXACT = {
    "linear": (lambda: nn.Linear(6, 8), "output", (3, 5, 6)),
    "linear read": (lambda: nn.Linear(6, 8), "input", (3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), "output", (3, 5, 6)),
    "linear without bias read": (lambda: nn.Linear(6, 8, bias=False), "input", (3, 5, 6)),
    "conv1d groups": (lambda: nn.Conv1d(6, 8, 3, padding=1, groups=2), "output", (3, 6, 5)),
    "conv2d read unpadded": (lambda: nn.Conv2d(6, 8, 3, groups=2), "input", (3, 6, 5, 5)),
    "conv2d read reflected": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        "input",
        (3, 6, 5, 5),
    ),
    "conv1d valid": (lambda: nn.Conv1d(6, 8, 3, padding="valid"), "input", (3, 6, 5)),
    "conv transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
        "output",
        (3, 6, 4, 4),
    ),
    "layer norm": (lambda: nn.LayerNorm(6), "output", (3, 5, 6)),
    "layer norm plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), "output", (3, 5, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), "output", (3, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), "output", (3, 6, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(6), "output", (3, 6, 4, 4)),
    "batch norm plain": (lambda: nn.BatchNorm1d(6, affine=False), "output", (3, 6, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(6), "output", (3, 6, 4)),
    "sequential": (mlp, "output", (3, 5, 6)),
    "sequential read": (mlp, "input", (3, 5, 6)),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("spec", ["film", "dense_film", "film(scale='exp')"])
def test_a_folded_layer_gives_what_it_gave(case, spec):
    build, placement, shape = EXACT[case]
    torch.manual_seed(0)
    net = One(build()).double().eval()
    before = copy.deepcopy(net)
    x = features(*shape).double()
    conditioned = drawn(condmod.attach(net, {"it": (spec, placement)}, condition_dim=4)).eval()
    with torch.no_grad():
        want = conditioned(x, condition=C.expand(3, -1))
        half = conditioned(x, condition=C.expand(3, -1), strength=0.5)
    assert not torch.allclose(want, before(x))
    assert conditioned.fold(C) is net
    torch.testing.assert_close(conditioned(x), want, rtol=1e-6, atol=1e-6)
    conditioned.unfold()
    assert list(net.state_dict()) == list(before.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)
    )
    conditioned.fold(C, strength=0.5)
    torch.testing.assert_close(net(x), half, rtol=1e-6, atol=1e-6)
    plain = conditioned.detach()
    torch.testing.assert_close(plain(x), half, rtol=1e-6, atol=1e-6)
    assert [type(m) for m in plain.modules()] == [type(m) for m in before.modules()]


def test_what_acts_around_a_sublayer_folds_into_both_its_ends():
    torch.manual_seed(0)
    net = One(mlp()).double()
    x = features(3, 5, 6).double()
    conditioned = drawn(condmod.attach(net, {"it": "adaln_zero"}, condition_dim=4))
    want = conditioned(x, condition=C.expand(3, -1))
    conditioned.fold(C)
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)


def test_both_ends_of_one_linear_fold_one_upon_the_other():
    torch.manual_seed(0)
    net = One(nn.Linear(6, 6)).double()
    x = features(3, 5, 6).double()
    conditioned = drawn(condmod.attach(net, {"it": "adaln_zero"}, condition_dim=4))
    want = conditioned(x, condition=C.expand(3, -1))
    conditioned.fold(C)
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)


def test_attention_and_embeddings_fold():
    torch.manual_seed(0)
    attention = One(nn.MultiheadAttention(6, 2, batch_first=True)).double()
    x = features(3, 5, 6).double()
    conditioned = drawn(condmod.attach(attention, {"it": "film"}, condition_dim=4))
    want = conditioned(x, x, x, condition=C.expand(3, -1))
    conditioned.fold(C)
    torch.testing.assert_close(attention(x, x, x), want, rtol=1e-6, atol=1e-6)
    table = One(nn.Embedding(7, 6)).double()
    ids = torch.tensor([[0, 3], [6, 6], [1, 2]])
    conditioned = drawn(condmod.attach(table, {"it": "film"}, condition_dim=4))
    want = conditioned(ids, condition=C.expand(3, -1))
    conditioned.fold(C)
    torch.testing.assert_close(table(ids), want, rtol=1e-6, atol=1e-6)


def test_an_encoders_signal_folds_without_its_dropout():
    torch.manual_seed(0)
    net = One(nn.Linear(6, 6)).double()
    conditioned = drawn(
        condmod.attach(
            net,
            {"it": "film"},
            encoder="label(classes=3, nullable=True, drop=0.9)",
            condition_dim=4,
        )
    ).eval()
    x = features(2, 6).double()
    want = conditioned(x, condition=torch.tensor([1, 1]))
    conditioned.train().fold(torch.tensor([1]))
    assert conditioned.bank.training
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("net", "spec", "condition", "reason"),
    [
        (nn.RMSNorm(6), "film", C, "a RMSNorm has no bias, which the shift would go into"),
        (nn.LayerNorm(6), ("film", "input"), C, "the LayerNorm normalises what it reads"),
        (
            nn.Conv1d(6, 6, 3, padding=1),
            ("film", "input"),
            C,
            "zeros that the convolution pads with would be shifted, too",
        ),
        (
            nn.Conv1d(6, 6, 3, padding="same"),
            ("film", "input"),
            C,
            "zeros that the convolution pads with would be shifted, too",
        ),
        (
            nn.ConvTranspose1d(6, 6, 3),
            ("film", "input"),
            C,
            "a shift of what a transposed convolution reads differs at its borders",
        ),
        (
            nn.LSTM(6, 6, batch_first=True),
            "film",
            C,
            "a LSTM has no weight of its own that a scale and shift of what it gives could go into",
        ),
        (nn.Linear(6, 6), "adaln", C, "adaln is no fixed scale and shift of each channel"),
        (
            nn.Linear(6, 6),
            "concat_project",
            C,
            "concat_project has parameters that read the features",
        ),
        (
            nn.Linear(6, 6),
            "adaln_zero(norm='none')",
            C,
            "adaln_zero adds what the module reads to what it gives",
        ),
        (
            nn.Embedding(6, 6, max_norm=1.0),
            "film",
            C,
            "the embedding renormalises its weight in use (max_norm)",
        ),
        (nn.Linear(6, 6), "film", C.expand(2, -1), "the condition has more than one sample"),
        (
            nn.Linear(6, 6),
            "film",
            C[:, None].expand(1, 3, -1),
            "the condition differs between positions",
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            ("film", condmod.Site(6)),
            C,
            "a ParametrizedLinear has no weight of its own that a scale and shift of what it gives "
            "could go into",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_folded_exactly_is_refused_with_its_reason(net, spec, condition, reason):
    conditioned = drawn(condmod.attach(One(net), {"it": spec}, condition_dim=4, start="published"))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        FoldError, match=f"^the condition cannot be folded: it: {re.escape(reason)}$"
    ):
        conditioned.fold(condition)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert conditioned.is_on


def test_all_sites_fold_or_none():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    before = copy.deepcopy(net.state_dict())
    conditioned = drawn(condmod.attach(net, {"*": "film"}, condition_dim=4))
    with pytest.raises(
        FoldError,
        match=re.escape(
            "the condition cannot be folded: 0, 2: its weight is shared: 0.weight, 2.weight; 1: a "
            "RMSNorm has no bias, which the shift would go into"
        ),
    ):
        conditioned.fold(C)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_two_attachments_on_one_module_do_not_fold():
    net = One(nn.Linear(6, 6))
    one = condmod.attach(net, {"it": "film"}, condition_dim=4, name="one")
    condmod.attach(net, {"it": "film"}, condition_dim=4, name="two")
    with pytest.raises(FoldError, match=r"it: another site acts where it would go$"):
        one.fold(C)


def test_a_folded_attachment_takes_no_condition():
    conditioned = condmod.attach(One(nn.Linear(6, 6)), {"it": "film"}, condition_dim=4)
    conditioned.fold(C)
    for call in (lambda: conditioned(features(1, 6), condition=C), lambda: conditioned.fold(C)):
        with pytest.raises(
            ConditionError,
            match=r"^the attachment 'default' is folded into the weights; call unfold\(\) first$",
        ):
            call()
    with pytest.raises(FoldError, match=r"^the attachment 'default' is folded; call unfold\(\) in"):
        conditioned.enable()
    conditioned.unfold()
    with pytest.raises(FoldError, match=r"^the attachment 'default' is not folded$"):
        conditioned.unfold()
