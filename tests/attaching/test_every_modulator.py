"""Every shipped modulator either starts as the base, bit for bit, or says that it cannot."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import condmod
from condmod.errors import SiteError

OPTIONS = {
    "ace_layer_norm": "(scalar=4)",
    "ada_group_norm": "(groups=2)",
    "ada_group_norm_diffusers": "(groups=2)",
    "conditional_batch_norm": "(classes=3)",
    "conditional_instance_norm": "(classes=3)",
    "spatial_norm": "(groups=2)",
    "multi_condition": "(encoder=fuse(inputs={'signal': vector(features=8)}))",
}
STARTS = {
    *("adaln_zero", "add", "cft", "cnaps", "concat_project", "dense_film"),
    *("diffusion_policy_film", "film", "multi_condition", "none", "per_timestep", "rt1_film"),
    *("timestep_table", "conditional_conv", "conditional_low_rank", "cross_attention"),
    *("decoupled_attention", "hypernetwork", "spade", "stylegan2", "tanh_gate", "tvfilm"),
    "zero_conv",
}
ALIGNED = {"cft", "spade", "tvfilm", "zero_conv"}  # or a map
SEVERAL = {"cogvideox", "cogview3", "sd35", "stable_audio", "wan"}
PAGE = Path(__file__).parents[2] / "docs" / "attaching.md"


def condition(name, first):
    generator = torch.Generator().manual_seed(1)
    if name in {"cross_attention", "decoupled_attention"}:
        tokens = torch.randn(4, 5, 8, generator=generator)
        return tokens if name == "cross_attention" else {"text": tokens, "image": tokens}
    if name in {"per_timestep", "timestep_table"}:
        return torch.randint(0, 10, (4,), generator=generator)
    shape = ((4, 8, 6) if first else (4, 6, 8)) if name in ALIGNED else (4, 8)
    value = torch.randn(shape, generator=generator)
    return {"signal": value} if name == "multi_condition" else value


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("name", condmod.list_modulators())
def test_a_modulator_starts_as_the_base_or_is_refused(name, first):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 1) if first else nn.Linear(8, 8))
    x = torch.randn(4, 8, 6) if first else torch.randn(4, 6, 8)
    want = net(x)
    owns = {"raw", "self"} & set(condmod.describe(name).kinds)
    options = {} if owns else {"condition_dim": 8}
    spec = {"0": name + OPTIONS.get(name, "")}
    if name in {"conditional_conv", "spade"}:
        spec = {"0": f"{name}(spatial_dims=1)"}
    if name in STARTS:
        conditioned = condmod.attach(net, spec, freeze="none", **options)
        given = condition(name, first) if conditioned.plan.needs_condition else None
        with conditioned.condition(given):
            assert torch.equal(net(x), want)
        return
    reason = "sublayers at once, and a site is around one module" if name in SEVERAL else "start as"
    with pytest.raises(SiteError, match=reason):
        condmod.attach(net, spec, **options)
    if name not in SEVERAL:
        attached = condmod.attach(net, spec, start="published", **options)
        assert len(attached.plan) == 1


def test_the_page_names_those_that_start_as_the_base():
    told = re.search(r"These start as the base: (.+?)\.", PAGE.read_text(), re.DOTALL)
    assert set(re.findall(r"`(\w+)`", told[1])) == STARTS
