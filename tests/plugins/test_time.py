"""Mechanisms that run along time: their gates, blocks and states."""

import re

import pytest
import torch
from torch import nn

from condmod import ConditionError, ShapeError, Shared, Site, SiteError, create, create_bank


def build(spec, **site):
    torch.manual_seed(0)
    place = {"features": 6, "channel_dim": 1, "name": "blocks.3"} | site
    return create(spec, **place)


# --- wavenet_gate -----------------------------------------------------------------------------


def gate(**site):
    return build("wavenet_gate", condition_dim=4, **site)


def test_a_gate_gives_half_of_what_its_sublayer_gives_and_of_its_positions():
    x, c = torch.randn(2, 6, 20), torch.randn(2, 4)
    dilated = nn.Conv1d(6, 12, 3, dilation=2, stride=2)
    y = gate()(x, c, dilated)
    assert y.shape == (2, 6, 8)
    shift = gate().proj(c)[..., None]
    a, b = (dilated(x) + shift).chunk(2, 1)
    torch.testing.assert_close(y, a.tanh() * b.sigmoid())


def test_out_features_say_how_wide_the_sublayer_is():
    y = gate(out_features=20)(torch.randn(2, 6, 5), torch.randn(2, 4), nn.Conv1d(6, 20, 1))
    assert y.shape == (2, 10, 5)


def test_an_aligned_condition_has_the_positions_of_what_the_sublayer_gives():
    wavenet, x = gate(), torch.randn(2, 6, 5)
    with pytest.raises(ShapeError, match=re.escape("modulation (2, 5, 12) does not fit")):
        wavenet(x, torch.randn(2, 4, 5), nn.Conv1d(6, 12, 3))


def test_a_gate_of_an_odd_width_is_refused():
    with pytest.raises(SiteError) as caught:
        gate(out_features=7)
    assert str(caught.value) == (
        "wavenet_gate at 'blocks.3' halves what its sublayer gives: out_features is even; got "
        "out_features=7"
    )


def test_a_sublayer_of_another_width_is_refused():
    with pytest.raises(ShapeError) as caught:
        gate()(torch.randn(2, 6, 5), torch.randn(2, 4), nn.Identity())
    assert str(caught.value) == (
        "wavenet_gate at 'blocks.3' halves what its sublayer gives, 12 channels at dim 1; the "
        "sublayer turned features (2, 6, 5) into (2, 6, 5)"
    )


def test_a_sublayer_that_gives_no_tensor_is_refused():
    with pytest.raises(ShapeError, match="gave a tuple in wavenet_gate at"):
        gate()(torch.randn(2, 6, 5), torch.randn(2, 4), lambda h: (h, h))


def test_a_gate_of_half_precision_features_is_computed_in_float32_and_rounded_once():
    x, c = torch.randn(4, 6, 50).bfloat16(), torch.randn(4, 4)
    wavenet = gate()
    y = wavenet(x, c, lambda h: torch.cat([h, h], 1))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wavenet(x.float(), c, lambda h: torch.cat([h, h], 1)).bfloat16())


def test_a_gate_that_starts_closed_to_its_condition_has_no_shift():
    x, c = torch.randn(2, 6, 5), torch.randn(2, 4)
    y = build("wavenet_gate(init='identity')", condition_dim=4)(
        x, c, lambda h: torch.cat([h, h], 1)
    )
    assert torch.equal(y, x.tanh() * x.sigmoid())


# --- by blocks --------------------------------------------------------------------------------

FOLLOWING = ["tfilm(block=4)", "tfilm(block=4, shift=True)", "tiny_tfilm(block=4)"]
CONDITIONAL = "conditional_tfilm(block=4)"


def following(spec, **site):
    width = 3 if spec.startswith("conditional") else None
    return build(spec, condition_dim=width, **site)


def controls(spec, batch=2):
    return torch.randn(batch, 3).double() if spec.startswith("conditional") else None


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("spec", [*FOLLOWING, CONDITIONAL])
def test_a_stream_of_chunks_gives_what_one_pass_gives(spec, channel_dim):
    module = following(spec, channel_dim=channel_dim).double()
    time = 2 if channel_dim == 1 else 1
    shape = (2, 6, 28) if channel_dim == 1 else (2, 28, 6)
    x, modulation = torch.randn(shape).double(), module.generate(controls(spec))
    state, out = None, []
    for chunk in x.split([4, 16, 8], time):
        y, state = module.step(chunk, modulation, state)
        out.append(y)
    whole = module.modulate(x, modulation)
    torch.testing.assert_close(torch.cat(out, time), whole, rtol=0, atol=1e-14)
    forgetful = module.modulate(x.narrow(time, 20, 8), modulation)
    assert not torch.allclose(out[-1], forgetful)  # the state counts


@pytest.mark.parametrize("spec", [*FOLLOWING, CONDITIONAL])
def test_a_state_of_another_batch_is_refused(spec):
    module = following(spec).double()
    x = torch.randn(2, 6, 8).double()
    _, state = module.step(x, module.generate(controls(spec)))
    width = state.hidden.shape[1]
    with pytest.raises(ShapeError) as caught:
        module.step(x[:1], module.generate(controls(spec, 1)), state)
    assert str(caught.value) == (
        f"{module.name} at 'blocks.3' goes on from the state that its step before gave, hidden "
        f"and cell (1, {width}) for features (1, 6, 8); got (2, {width}) and (2, {width}); begin "
        "a new stream with None"
    )


def test_a_step_takes_whole_blocks_alone():
    module = following("tfilm(block=4)")
    with pytest.raises(ShapeError) as caught:
        module.step(torch.randn(2, 6, 10), module.generate(None))
    assert str(caught.value) == (
        "tfilm at 'blocks.3' steps by whole blocks of 4 positions; got features (2, 6, 10): hold "
        "the rest back for the next step, and at the end fill it up with zeros and cut what comes "
        "out"
    )


@pytest.mark.parametrize("spec", FOLLOWING)
def test_a_block_that_is_not_whole_is_as_if_zeros_followed(spec):
    module, x = following(spec), torch.randn(2, 6, 10)
    filled = torch.cat([x, torch.zeros(2, 6, 2)], 2)
    assert torch.equal(module(x), module(filled)[..., :10])


@pytest.mark.parametrize(
    ("channel_dim", "shape", "wanted"),
    [
        (1, (2, 6, 3, 4), "features=6, T"),
        (-1, (2, 6), "T, features=6"),
        (1, (2, 6, 0), "features=6, T"),
    ],
)
def test_features_run_along_one_axis(channel_dim, shape, wanted):
    with pytest.raises(ShapeError) as caught:
        following("tfilm", channel_dim=channel_dim)(torch.randn(shape))
    assert str(caught.value) == (
        "tfilm at 'blocks.3' runs along one axis of one position or more, features "
        f"(B, {wanted}); got {shape}"
    )


def test_tfilm_takes_no_condition():
    with pytest.raises(ConditionError, match="reads the features alone and takes no condition"):
        following("tfilm")(torch.randn(2, 6, 8), torch.randn(2, 3))


def test_the_recurrence_has_the_keys_and_the_numbers_of_torch():
    theirs = nn.LSTM(6, 12, batch_first=True)
    module = following("tfilm(block=1, shift=True)")
    module.lstm.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 9)
    gamma, beta = theirs(x.mT)[0].mT.chunk(2, 1)
    torch.testing.assert_close(module(x), gamma * x + beta)


def test_the_compiled_recurrence_has_the_gradients_of_torch_s():
    module = following("tfilm(block=4, shift=True)").double()
    _, state = module.step(torch.randn(2, 6, 8).double(), module.generate(None))
    first = [part.detach().requires_grad_() for part in state]
    pooled = torch.randn(2, 5, 6).double().requires_grad_()
    learned = [pooled, *first, *module.lstm.parameters()]

    def gradients(lstm):
        y, (hidden, cell) = lstm(pooled, type(state)(*first))
        loss = (y * y.detach().cos()).sum() + hidden.sin().sum() + cell.square().sum()
        return torch.autograd.grad(loss, learned)

    compiled = torch.compile(module.lstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(module.lstm), rtol=1e-12, atol=1e-12)


def test_the_node_of_a_compiled_graph_is_what_torch_asks_of_one():
    lstm = following("tfilm(block=4)").double().lstm
    state = [torch.randn(2, 6).double().requires_grad_() for _ in range(2)]
    given = (torch.randn(2, 5, 6).double().requires_grad_(), *state, *lstm.parameters())
    torch.library.opcheck(torch.ops.condmod_time.lstm.default, given)


def test_tfilm_starts_as_a_lstm_of_keras():
    lstm = following("tfilm").lstm
    forget = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(6)
    assert torch.equal(lstm.bias_ih_l0 + lstm.bias_hh_l0, forget)
    torch.testing.assert_close(lstm.weight_hh_l0.mT @ lstm.weight_hh_l0, torch.eye(6))
    bound = (6 / (6 + 24)) ** 0.5
    assert 0.9 * bound < lstm.weight_ih_l0.abs().max() <= bound


def test_tfilm_with_a_shift_starts_as_a_lstm_of_torch():
    module = following("tfilm(shift=True)")
    torch.manual_seed(0)
    for ours, theirs in zip(module.lstm.parameters(), nn.LSTM(6, 12).parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spec", [*FOLLOWING, CONDITIONAL])
def test_the_recurrence_is_in_float32_for_half_precision_and_under_autocast(spec):
    module = following(spec)
    x, given = torch.randn(2, 6, 40), controls(spec)
    modulation = module.generate(given.float() if given is not None else None)
    want, state = module.step(x, modulation)
    with torch.autocast("cpu", torch.bfloat16):
        got, behind = module.step(x, modulation)
    assert torch.equal(got, want)
    assert torch.equal(behind.cell, state.cell)
    half = x.bfloat16()
    y, behind = module.step(half, modulation)
    assert torch.equal(y, module.step(half.float(), modulation)[0].bfloat16())
    assert behind.cell.dtype == torch.float32


def test_a_pass_that_is_exported_and_not_compiled_holds_torch_s_own_lstm():
    module, x = following("tfilm(block=4)"), torch.randn(2, 6, 10)
    for strict in (False, True):
        program = torch.export.export(module, (x,), strict=strict)
        assert torch.ops.aten.lstm.input in [node.target for node in program.graph.nodes]


def test_controls_of_another_batch_are_refused():
    module = following(CONDITIONAL)
    modulation = module.generate(torch.randn(3, 3))
    with pytest.raises(ShapeError) as caught:
        module.modulate(torch.randn(2, 6, 8), modulation)
    assert str(caught.value) == (
        "modulation (3, 3) does not fit features of a batch of 2 in conditional_tfilm at "
        "'blocks.3'; its controls are (B, condition_dim=3)"
    )


def test_the_parts_of_tiny_tfilm_are_never_negative():
    module = following("tiny_tfilm(block=4)")
    nothing = module.generate(None)
    _, state = module.step(torch.randn(2, 6, 8), nothing)
    parts, _ = module.follow(torch.randn(2, 5, 6), nothing, state)
    assert min(part.min() for part in parts) == 0


# --- tvfilm -----------------------------------------------------------------------------------


def controlled(spec="tvfilm(block=4, width=5)", **sites):
    torch.manual_seed(0)
    places = sites or {"one": Site(6, 3, channel_dim=1), "two": Site(4, 3, channel_dim=1)}
    return create_bank(spec, places)


def test_sites_of_tvfilm_share_a_controller_and_may_differ_in_their_features():
    bank, c = controlled(), torch.randn(2, 3, 10)
    modulations = bank(c)
    h = bank.shared(c.mT)
    for name, features in {"one": 6, "two": 4}.items():
        leaves = modulations[name]
        assert [leaf.shape for leaf in leaves] == [(2, 3, features)] * 2
        torch.testing.assert_close(torch.cat(list(leaves), -1), bank[name].proj(h))


def test_a_last_block_of_a_condition_that_is_not_whole_counts_alone():
    bank, c = controlled(), -torch.rand(2, 3, 10)
    repeated = torch.cat([c, c[..., 8:]], 2)
    assert torch.equal(bank(c)["one"].scale, bank(repeated)["one"].scale)


def test_features_shorter_than_the_condition_take_its_last_blocks():
    bank = controlled()
    modulation = bank(torch.randn(2, 3, 20))["one"]
    x = torch.randn(2, 6, 10)
    last = type(modulation)(*(leaf[:, 2:] for leaf in modulation))
    assert torch.equal(bank["one"].modulate(x, modulation), bank["one"].modulate(x, last))


def test_features_longer_than_the_condition_are_refused():
    bank = controlled()
    with pytest.raises(ShapeError) as caught:
        bank["one"].modulate(torch.randn(2, 6, 13), bank(torch.randn(2, 3, 12))["one"])
    assert str(caught.value) == (
        "modulation (2, 3, 6) does not fit features (2, 6, 13) in tvfilm at 'one'; it has a "
        "vector of C for each block of 4 positions, 4 or more"
    )


def test_a_controller_steps_along_a_stream():
    bank = controlled().double()
    c = torch.randn(2, 28, 3).double()
    state, out = None, []
    for chunk in c.split([4, 16, 8], 1):
        sequence, state = bank.shared.step(chunk, state)
        out.append(bank["one"].generate(Shared(sequence)).scale)
    whole = bank(c.mT)["one"].scale
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "batch", "said"),
    [
        (
            (2, 10, 3),
            2,
            "tvfilm's controller steps by whole blocks of 4 positions of a condition (B, T, 3); "
            "got (2, 10, 3): hold the rest back for the next step",
        ),
        (
            (1, 8, 3),
            2,
            "tvfilm's controller goes on from the state that its step before gave, hidden and "
            "cell (1, 5) for features (1, 8, 3); got (2, 5) and (2, 5); begin a new stream with "
            "None",
        ),
        (
            (2, 0, 3),
            2,
            "tvfilm's controller runs along one axis of one position or more, a condition "
            "(B, T, 3); got (2, 0, 3)",
        ),
    ],
)
def test_a_controller_refuses_what_does_not_fit(shape, batch, said):
    controller = controlled().shared
    _, state = controller.step(torch.randn(batch, 8, 3))
    with pytest.raises(ShapeError) as caught:
        controller.step(torch.randn(shape), state)
    assert str(caught.value) == said


def test_a_condition_of_two_axes_is_refused_by_the_controller():
    with pytest.raises(ShapeError, match=re.escape("a condition (B, T, 3); got (2, 4, 5, 3)")):
        controlled()(torch.randn(2, 3, 4, 5))


def test_sites_of_tvfilm_have_one_width_of_condition():
    with pytest.raises(SiteError) as caught:
        controlled(one=Site(6, 3), two=Site(6, 5))
    assert str(caught.value) == (
        "tvfilm has one trunk for all sites of a bank, whose condition_dim are thus equal; got 3 "
        "at 'one' and 5 at 'two': make a bank for each size"
    )


# --- gpocm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gpocm_mixes_the_channels_of_each_sample_by_its_own_matrix(channel_dim):
    module = build("gpocm", condition_dim=4, channel_dim=channel_dim)
    mix, shift = torch.randn(2, 6, 6), torch.randn(2, 6)
    modulation = type(module.generate(torch.randn(2, 4)))(mix, shift)
    last = torch.randn(2, 5, 6)
    mixed = torch.einsum("bti,bij->btj", last, mix) + shift[:, None]
    x = last.mT if channel_dim == 1 else last
    y = module.modulate(x, modulation)
    torch.testing.assert_close(y.mT if channel_dim == 1 else y, last * mixed.sigmoid())


def test_gpocm_of_half_precision_features_is_computed_in_float32_and_rounded_once():
    module = build("gpocm", condition_dim=4)
    x, c = torch.randn(4, 6, 50).bfloat16(), torch.randn(4, 4)
    y = module(x, c)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.float(), c).bfloat16())


def test_gpocm_refuses_a_modulation_of_another_batch():
    module = build("gpocm", condition_dim=4)
    with pytest.raises(ShapeError) as caught:
        module.modulate(torch.randn(2, 6, 5), module.generate(torch.randn(3, 4)))
    assert str(caught.value) == (
        "modulation (3, 6, 6) and (3, 6) does not fit features (2, 6, 5) in gpocm at 'blocks.3'; "
        "for each sample it has a matrix (C, C) and a shift (C,)"
    )
