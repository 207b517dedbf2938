"""What goes around the sublayers of a block: its starts, its streams, and what blocks share."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import condmod
from condmod import ConditionError, Registry, Site, SiteError, SpecError, create, create_bank
from condmod.functional import Shift, add_shift
from condmod_block.cosmos import FromTrunk

TRUNKS = ["flux2", "adaln_single", "wan", "stable_audio", "cosmos"]
DRAW = torch.Generator().manual_seed(1)
X, C = torch.randn(2, 5, 16, generator=DRAW), torch.randn(2, 8, generator=DRAW)


def bank(spec: str, *names: str, features: int = 16) -> condmod.Bank:
    return create_bank(spec, {name: Site(features, 8) for name in names or ("block",)})


class Recorded:
    """A sublayer that keeps what it read."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.read = torch.empty(0)

    def __call__(self, h: Tensor) -> Tensor:
        self.read = h
        return self.slope * h


class StagesConfig(condmod.ModulatorConfig):
    """Options of `stages`."""


class Stages(condmod.SublayerModulator[StagesConfig, Shift]):
    """x + f(x + shift) for each of four parts, of which the last reads what the second gave."""

    name = "stages"
    Config = StagesConfig
    kinds = frozenset({"global"})
    parts = 4
    reads = (0, 0, 1, 2)

    def reset_parameters(self) -> None:
        """Nothing."""

    def generate(self, condition: Any) -> tuple[Shift, ...]:
        """The condition for every part."""
        return (Shift(self.accept(condition)),) * self.parts

    def enter(self, x: Tensor, modulation: Shift, sublayer: Any) -> Tensor:
        """The sum."""
        return add_shift(x, modulation.shift)

    def exit(self, x: Tensor, y: Tensor, modulation: Shift, sublayer: Any) -> Tensor:
        """The residual."""
        return x + y


def test_a_class_that_changes_a_half_alone_is_not_passed_over_between_parts():
    class Own(type(create("mmdit", features=16, condition_dim=16))):
        def enter(self, x: Tensor, modulation: Any, sublayer: Any) -> Tensor:
            return torch.full_like(x, 5.0)

    ours = Own(condmod.configure("mmdit"), condmod.Site(16, 16))
    sublayers = [Recorded(2.0), Recorded(3.0)]
    ours(X, torch.randn(2, 16), *sublayers)
    for sublayer in sublayers:
        assert torch.equal(sublayer.read, torch.full_like(X, 5.0))


def test_a_part_reads_the_features_before_the_part_that_reads_names():
    registry = Registry([])
    registry.register(Stages)
    ours = create("stages", features=16, condition_dim=16, registry=registry)
    c = torch.randn(2, 16)
    sublayers = [Recorded(slope) for slope in (2.0, 3.0, 5.0, 7.0)]
    y = ours(X, c, *sublayers)
    stages = [X]
    for sublayer, read in zip(sublayers, (0, 0, 1, 2), strict=True):
        entered = stages[read] + c[:, None]
        torch.testing.assert_close(sublayer.read, entered)
        stages.append(stages[-1] + sublayer.slope * entered)
    torch.testing.assert_close(y, stages[-1])
    again = ours.around(X, ours.generate(c), *sublayers)
    assert torch.equal(y, again)


def test_without_reads_a_part_reads_what_the_part_before_it_gave():
    ours = create("mmdit(parts=3, init='identity')", features=16, condition_dim=8)
    assert ours.reads == ()
    sublayers = [Recorded(slope) for slope in (2.0, 3.0, 5.0)]
    y, h = ours(X, C, *sublayers), X
    for sublayer in sublayers:
        entered = F.layer_norm(h, (16,), eps=1e-6)
        torch.testing.assert_close(sublayer.read, entered)
        h = h + sublayer.slope * entered
    torch.testing.assert_close(y, h)


def test_both_attentions_of_sd35_read_the_same_and_the_feed_forward_what_they_gave():
    ours = create("sd35(init='identity')", features=16, condition_dim=8)
    attention, second, feed_forward = (Recorded(slope) for slope in (2.0, 3.0, 5.0))
    y = ours(X, C, attention, second, feed_forward)
    normed = F.layer_norm(X, (16,), eps=1e-6)
    assert torch.equal(attention.read, normed)
    assert torch.equal(second.read, normed)
    h = X + 2 * normed + 3 * normed
    torch.testing.assert_close(feed_forward.read, F.layer_norm(h, (16,), eps=1e-6))
    torch.testing.assert_close(y, h + 5 * feed_forward.read)


def test_the_rows_of_sd35_are_attention_feed_forward_second_attention():
    ours = create("sd35", features=16, condition_dim=8)
    rows = torch.arange(9 * 16.0)[None]
    attention, second, feed_forward = ours.unpack(rows)
    order = [part.shift[0, 0].item() // 16 for part in (attention, feed_forward, second)]
    assert order == [0, 3, 6]
    assert [attention.scale[0, 0].item(), attention.gate[0, 0].item()] == [16, 32]


def test_the_number_of_sublayers_of_sd35_is_checked():
    ours = create("sd35", features=16, condition_dim=8, name="blocks.3")
    with pytest.raises(ConditionError) as caught:
        ours(X, C, torch.sin)
    assert str(caught.value) == (
        "sd35 at 'blocks.3' serves 3 sublayer(s) at once (option `parts`); "
        "forward(x, condition, *sublayers) got 1"
    )


def test_flux_is_another_name_of_mmdit():
    config = condmod.configure("flux(parts=1)")
    assert config == condmod.configure("mmdit(parts=1)")
    assert str(config) == "mmdit(parts=1)"
    assert condmod.describe("flux").name == "mmdit"


@pytest.mark.parametrize(("spec", "rows"), [("mmdit", 6), ("flux(parts=1)", 3), ("sd35", 9)])
def test_mmdit_starts_as_torch_s_linear(spec, rows):
    torch.manual_seed(1)
    ours = create(spec, features=16, condition_dim=8)
    torch.manual_seed(1)
    linear = torch.nn.Linear(8, rows * 16)
    assert torch.equal(ours.proj.weight, linear.weight)
    assert torch.equal(ours.proj.bias, linear.bias)


@pytest.mark.parametrize(("spec", "rows"), [("cogview3", 12), ("cogvideox", 6)])
def test_the_cog_models_start_with_every_branch_closed(spec, rows):
    ours = create(spec, features=16, condition_dim=8)
    assert ours.proj.weight.shape == (rows * 16, 8)
    assert not ours.proj.weight.any()
    assert not ours.proj.bias.any()
    assert torch.equal(ours(X, C, *[torch.sin] * ours.parts), X)


def test_video_and_text_of_cogvideox_share_a_norm_with_weight_and_bias():
    ours = create("cogvideox(init='identity')", features=16, condition_dim=8)
    with torch.no_grad():
        ours.norm.weight.fill_(3.0)
        ours.norm.bias.fill_(0.5)
    video, text = ours.generate(C)
    want = F.layer_norm(X, (16,)) * 3 + 0.5
    torch.testing.assert_close(ours.enter(X, video, None), want)
    torch.testing.assert_close(ours.enter(X, text, None), want)


def test_the_parts_of_cogview3_are_image_then_text():
    ours = create("cogview3", features=16, condition_dim=8)
    parts = ours.unpack(torch.arange(12 * 16.0)[None])
    chunks = [[leaf[0, 0].item() // 16 for leaf in part] for part in parts]
    assert chunks == [[1, 0, 2], [4, 3, 5], [7, 6, 8], [10, 9, 11]]  # scale, shift, gate


@pytest.mark.parametrize("spec", TRUNKS)
def test_what_shares_a_trunk_is_built_as_a_bank(spec):
    with pytest.raises(SiteError) as caught:
        create(spec, features=16, condition_dim=8, name="blocks.0")
    assert str(caught.value) == (
        f"{spec} shares parameters between its sites; build it with "
        f"create_bank('{spec}', {{'blocks.0': site}})"
    )


@pytest.mark.parametrize("spec", TRUNKS)
def test_sites_of_other_sizes_have_another_trunk(spec):
    for field, site in (("features", Site(32, 8)), ("condition_dim", Site(16, 4))):
        with pytest.raises(SiteError) as caught:
            create_bank(spec, {"a": Site(16, 8), "blocks.1": site})
        one, other = getattr(Site(16, 8), field), getattr(site, field)
        assert str(caught.value) == (
            f"{spec} has one trunk for all sites of a bank, whose {field} are thus equal; "
            f"got {one} at 'a' and {other} at 'blocks.1': make a bank for each size"
        )


@pytest.mark.parametrize("spec", TRUNKS)
def test_a_trunk_needs_a_condition(spec):
    with pytest.raises(SiteError) as caught:
        create_bank(spec, {"a": Site(16, 8), "blocks.1": Site(16)})
    told = "needs condition_dim, the width of its condition"
    assert str(caught.value) == f"{spec} at 'blocks.1' {told}"
    with pytest.raises(SiteError) as caught:
        create(spec, features=16)
    assert str(caught.value) == f"{spec} {told}"


@pytest.mark.parametrize("spec", ["flux2", "stable_audio", "cosmos"])
def test_what_never_has_a_gate_of_1_has_no_option_init(spec):
    with pytest.raises(SpecError) as caught:
        condmod.configure(f"{spec}(init='identity')")
    assert str(caught.value).startswith(f"{spec} has no option 'init'; it has ")


def test_every_block_of_flux2_gets_the_same_modulation():
    ours = bank("flux2", "a", "b")
    assert list(ours.state_dict()) == ["shared.proj.weight"]
    torch.manual_seed(1)
    again = bank("flux2", "a", "b")
    torch.manual_seed(1)
    assert torch.equal(again.shared.proj.weight, torch.nn.Linear(8, 96, bias=False).weight)
    modulations = ours(C)
    for one, other in zip(modulations["a"], modulations["b"], strict=True):
        for mine, its in zip(one, other, strict=True):
            assert torch.equal(mine, its)


def test_adaln_single_starts_as_in_pixart():
    ours = create_bank("adaln_single", {"a": Site(400, 300), "b": Site(400, 300)})
    trunk = ours.shared.proj
    assert trunk.weight.shape == (2400, 300)
    assert trunk.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert trunk.weight.abs().max() > 0.07  # normal, not uniform
    assert not trunk.bias.any()
    for site in ("a", "b"):
        assert ours[site].table.shape == (6, 400)
        assert ours[site].table.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert not torch.equal(ours["a"].table, ours["b"].table)


def test_wan_starts_as_in_wan():
    ours = create_bank("wan", {"a": Site(400, 300)})
    trunk, bound = ours.shared.proj, math.sqrt(6 / (2400 + 300))
    assert trunk.weight.abs().max().item() == pytest.approx(bound, rel=0.001)
    assert trunk.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not trunk.bias.any()
    assert ours["a"].table.shape == (1, 6, 400)
    assert ours["a"].table.std().item() == pytest.approx(1 / 20, rel=0.05)


def test_stable_audio_starts_as_in_stable_audio():
    ours = create_bank("stable_audio", {"a": Site(400, 300)})
    assert ours["a"].table.shape == (2400,)
    assert ours["a"].table.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert ours.shared.hidden.weight.abs().max().item() == pytest.approx(300**-0.5, rel=0.01)
    assert ours.shared.proj.weight.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    for norm in (ours["a"].attention_norm, ours["a"].feed_forward_norm):
        assert dict(norm.named_parameters()).keys() == {"weight"}
        assert torch.equal(norm.weight, torch.ones(400))


def test_cosmos_starts_as_in_cosmos():
    ours = create_bank("cosmos(rank=200)", {"a": Site(400, 300), "b": Site(400, 300)})
    trunk, site = ours.shared, ours["a"]
    assert not site.proj[1].weight.any()
    for layer, inputs in ((site.proj[0], 300), (trunk.hidden, 300), (trunk.proj, 400)):
        assert layer.bias is None
        scaled = layer.weight * inputs**0.5
        assert scaled.std().item() == pytest.approx(0.9866, rel=0.02)  # of a cut normal
        assert 2.8 < scaled.abs().max() <= 3.0
    assert torch.equal(trunk.norm.weight, torch.ones(300))
    shapes = [tuple(layer.weight.shape) for layer in site.proj]
    assert shapes == [(200, 300), (1200, 200)]


@pytest.mark.parametrize("spec", ["adaln_single(parts=3, init='identity')", "wan(init='identity')"])
def test_identity_closes_the_trunk_and_opens_the_gates(spec):
    ours = bank(spec)
    assert not ours.shared.proj.weight.any()
    for part in ours(C)["block"]:
        assert not part.scale.any()
        assert not part.shift.any()
        assert torch.equal(part.gate, torch.ones(2, 16))


def test_a_trunk_is_in_the_state_once_and_runs_once():
    ours = bank("adaln_single", "blocks.0", "blocks.1")
    assert sorted(ours.state_dict()) == [
        "modulators.blocks/0.table",
        "modulators.blocks/1.table",
        "shared.proj.bias",
        "shared.proj.weight",
    ]
    runs = []
    ours.shared.register_forward_hook(lambda *_: runs.append(1))
    ours(C)
    assert runs == [1]


@pytest.mark.parametrize("spec", ["adaln_single", "wan", "stable_audio"])
def test_a_table_in_bfloat16_swallows_no_small_output_of_the_trunk(spec):
    ours = bank(spec).bfloat16()
    with torch.no_grad():
        ours.shared.proj.weight.zero_()
        ours.shared.proj.bias.fill_(2**-12)
        ours["block"].table.fill_(1.0)
    for part in ours(C.bfloat16())["block"]:
        for leaf in part:
            assert torch.equal(leaf, torch.full((2, 16), 1 + 2**-12))


def test_the_common_rows_of_cosmos_in_bfloat16_swallow_nothing_of_a_sublayer_s_own():
    ours = bank("cosmos(rank=3)").bfloat16()["block"]
    torch.nn.init.normal_(ours.proj[1].weight, std=2**-12)
    embedding, rows = C.bfloat16(), torch.ones(2, 48).bfloat16()
    own = ours.proj(F.silu(embedding)).float()
    assert own.any()
    assert own.abs().max() < 2**-9  # lost beside 1 in bfloat16
    (part,) = ours.generate(condmod.Shared(FromTrunk(embedding, rows)))
    assert torch.equal(torch.cat([part.shift, part.scale, part.gate], -1), 1 + own)


def test_each_part_of_stable_audio_has_its_own_norm_and_its_gate_is_a_sigmoid():
    ours = bank("stable_audio")
    module = ours["block"]
    with torch.no_grad():
        for parameter in ours.shared.parameters():
            parameter.zero_()
        module.table.zero_()
        module.attention_norm.weight.fill_(2.0)
        module.feed_forward_norm.weight.fill_(3.0)
    attention, feed_forward = ours(C)["block"]
    normed = F.layer_norm(X, (16,), eps=1e-5)
    torch.testing.assert_close(module.enter(X, attention, None), 2 * normed)
    torch.testing.assert_close(module.enter(X, feed_forward, None), 3 * normed)
    y = module.exit(torch.zeros_like(X), X, attention, None)
    torch.testing.assert_close(y, X / (1 + math.exp(-1)))


def test_the_trunk_of_cosmos_gives_the_normed_condition_and_the_common_rows():
    ours = bank("cosmos(rank=3)", "a", "b")
    embedding, rows = ours.shared(C)
    torch.testing.assert_close(embedding, F.rms_norm(C, (8,), eps=1e-6))
    hidden = F.silu(C @ ours.shared.hidden.weight.T)
    torch.testing.assert_close(rows, hidden @ ours.shared.proj.weight.T)
    (one,), (other,) = ours(C).values()
    got = torch.cat([one.shift, one.scale, one.gate], -1)
    torch.testing.assert_close(got, rows)  # a block adds nothing at the start
    assert torch.equal(one.gate, other.gate)


@pytest.mark.parametrize("spec", TRUNKS)
def test_a_condition_per_token_reaches_every_block_of_a_bank(spec):
    ours = bank(spec, "a", "b")
    per_token = torch.randn(2, 5, 8)
    for name, parts in ours(per_token).items():
        for token in range(5):
            alone = ours(per_token[:, token])[name]
            for part, its in zip(parts, alone, strict=True):
                for leaf, mine in zip(part, its, strict=True):
                    torch.testing.assert_close(leaf[:, token], mine)
