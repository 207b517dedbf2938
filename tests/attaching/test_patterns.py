"""Which modules a pattern names."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condmod.attaching.patterns import match, named_modules, reader
from condmod.errors import SiteError


@pytest.fixture(scope="module")
def modules():
    def block():
        mlp = nn.Sequential(nn.Linear(4, 4))
        return nn.ModuleDict({"norm1": nn.LayerNorm(4), "mlp": mlp})

    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(block() for _ in range(2)), "norm1": nn.LayerNorm(4)}
    )
    return named_modules(model)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("norm1", ["norm1"]),
        ("blocks.*.norm1", ["blocks.0.norm1", "blocks.1.norm1"]),
        ("**.norm1", ["blocks.0.norm1", "blocks.1.norm1", "norm1"]),
        ("blocks.1.**", ["blocks.1.norm1", "blocks.1.mlp", "blocks.1.mlp.0"]),
        ("blocks.**.0", ["blocks.0", "blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("*.*.n*m1", ["blocks.0.norm1", "blocks.1.norm1"]),
        ("*", ["blocks", "norm1"]),
        ("type:Linear", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("type:torch.nn.modules.linear.Linear", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("type:torch.nn.Linear", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        (r"re:blocks\.[1-9]\.norm\d", ["blocks.1.norm1"]),
        ("re:norm1", ["norm1"]),
    ],
)
def test_a_pattern_names_these_modules_in_the_models_order(modules, pattern, names):
    assert match(pattern, modules) == names


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        (
            "blocks.*.norm2",
            "the pattern 'blocks.*.norm2' matches no module; did you mean 'blocks.*.norm1'?",
        ),
        (
            "blocks.0.attention",
            "the pattern 'blocks.0.attention' matches no module; 'blocks.0' has norm1, mlp",
        ),
        (
            "block.0.norm1",
            "the pattern 'block.0.norm1' matches no module; did you mean 'blocks'?",
        ),
        ("encoder.**", "the pattern 'encoder.**' matches no module; the model has blocks, norm1"),
        (
            "type:layernorm",
            "the pattern 'type:layernorm' matches no module; did you mean 'LayerNorm'?",
        ),
        (
            "type:torch.nn.Conv2d",
            "the pattern 'type:torch.nn.Conv2d' matches no module; it has LayerNorm, Linear, "
            "ModuleDict, ModuleList, Sequential",
        ),
        ("re:(", "the pattern 're:(' is no regular expression: missing ), unterminated "),
        ("blocks..norm1", "'blocks..norm1' is no pattern: a pattern is a dotted name in which * "),
        ("", "'' is no pattern: a pattern is a dotted name in which * stands for a part of one "),
        ("blocks.[01].norm1", "'blocks.[01].norm1' is no pattern: a pattern is a dotted name in "),
        (3, "a pattern is a dotted name in which * stands for a part of one segment and ** for "),
    ],
)
def test_what_matches_nothing_or_is_no_pattern_says_so(modules, pattern, error):
    with pytest.raises(SiteError, match=f"^{re.escape(error)}"):
        match(pattern, modules)


def test_a_compiled_model_has_the_names_of_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1] = torch.compile(model[1], backend="eager")
    assert list(named_modules(torch.compile(model, backend="eager"))) == ["0", "1", "1.0"]


def test_a_module_under_two_names_answers_to_both():
    norm = nn.LayerNorm(2)
    model = nn.ModuleDict({"a": norm, "b": norm})
    modules = named_modules(model)
    assert match("a", modules) == ["a"]
    assert match("b", modules) == ["b"]


segment = st.text("ab1_", min_size=1, max_size=3)


@given(st.lists(segment, min_size=1, max_size=4))
def test_a_name_matches_itself_and_every_glob_made_of_it(segments):
    name = ".".join(segments)
    globs = [name, ".".join("*" for _ in segments), "**", f"**.{segments[-1]}"]
    globs += [".".join([*segments[:-1], segments[-1][0] + "*"]), f"{segments[0]}.**"][
        : len(segments)
    ]
    for glob in globs:
        if glob.startswith(f"{segments[0]}.**") and len(segments) == 1:
            continue
        assert reader(glob)(name, None), glob


@given(st.lists(segment, min_size=2, max_size=4))
def test_one_star_never_crosses_a_dot(segments):
    assert not reader("*")(".".join(segments), None)
