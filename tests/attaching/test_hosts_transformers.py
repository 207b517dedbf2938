"""Attached to models of transformers: what is promised, and what is known of their layers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import condmod
from condmod.errors import ConditionError, SiteError
from condmod_hosts.transformers import LAYERS

IDS = torch.arange(14).reshape(2, 7) + 3
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 1}
VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 4,
}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def gpt2() -> Any:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **TOKENS))


def hidden(model: Any, **options: Any) -> Tensor:
    states: Tensor = model(IDS, **options).last_hidden_state
    return states


def logits(model: Any, **options: Any) -> Tensor:
    scores: Tensor = model(IDS, **options).logits
    return scores


BERT = {"encoder.layer.*.output": "film", "encoder.layer.*.attention": "adaln_zero"}
GPT2 = {"transformer.h.*.ln_*": "film", "transformer.h.*.mlp.c_fc": "dense_film"}


def test_a_bert_is_promised(law):
    law((bert(), BERT, hidden))


def test_a_gpt2_is_promised(law):
    law((gpt2(), GPT2, logits))


def test_plan_reads_the_features_of_a_bert():
    layer = "encoder.layer.0"
    names = ("embeddings", layer, f"{layer}.attention", f"{layer}.intermediate", "pooler.dense")
    plan = condmod.plan(bert(), dict.fromkeys(names, "film"), condition_dim=5)
    assert [site.site.features for site in plan] == [16, 16, 16, 24, 16]
    assert {site.site.channel_dim for site in plan} == {-1}
    assert [site.argument for site in plan][1:4] == ["hidden_states"] * 3


def test_plan_reads_the_features_of_a_gpt2():
    names = ("transformer.wte", "transformer.h.0", "transformer.h.0.attn.c_attn")
    plan = condmod.plan(gpt2(), dict.fromkeys(names, "film"), condition_dim=5)
    assert [site.site.features for site in plan] == [16, 16, 48]


def test_what_embeddings_read_is_refused():
    with pytest.raises(SiteError) as caught:
        condmod.plan(bert(), {"embeddings": ("film", "input")}, condition_dim=5)
    assert str(caught.value) == (
        "no site can stand at 'embeddings' (input): it reads ids; its output can be conditioned"
    )


@pytest.mark.parametrize(("made", "patterns", "run"), [(bert, BERT, hidden), (gpt2, GPT2, logits)])
def test_gradient_checkpointing_gives_the_same_gradients(made, patterns, run, drawn):
    conditioned = drawn(made(), patterns)
    condition = torch.randn(2, 5, requires_grad=True)

    def gradients(seed: int = 3) -> list[Tensor]:
        torch.manual_seed(seed)  # dropout draws alike
        loss = run(conditioned.train(), condition=condition).square().mean()
        return list(torch.autograd.grad(loss, [condition, *conditioned.bank.parameters()]))

    expected = gradients()
    conditioned.activation_checkpointing_enable({"use_reentrant": False})
    assert conditioned.base.is_activation_checkpointing
    got = gradients()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert expected[0].any()


@pytest.mark.parametrize(("made", "patterns", "run"), [(bert, BERT, hidden), (gpt2, GPT2, logits)])
def test_reentrant_checkpointing_is_refused(made, patterns, run, drawn):
    conditioned = drawn(made(), patterns).train()
    conditioned.activation_checkpointing_enable({"use_reentrant": True})
    loss = run(conditioned, condition=torch.randn(2, 5)).sum()
    with pytest.raises(ConditionError, match=r"lies inside reentrant activation checkpointing"):
        loss.backward()


def test_generate_keeps_its_cache_under_a_condition(drawn):
    conditioned = drawn(gpt2().eval(), GPT2)
    one, other = torch.randn(2, 1, 5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = IDS[:1]

    def generated(condition: Tensor, **more: Any) -> Tensor:
        with conditioned.condition(condition):
            ids: Tensor = conditioned.base.generate(prompt, **options, **more)
        return ids

    cached = generated(one, use_cache=True)
    assert torch.equal(cached, generated(one, use_cache=False))
    assert not torch.equal(cached, generated(other))
    with conditioned.condition(one):  # read through
        assert torch.equal(conditioned.generate(prompt, **options), cached)


def test_generate_of_several_sequences_takes_a_condition_of_each(drawn):
    conditioned = drawn(gpt2().eval(), GPT2)
    condition = torch.randn(1, 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with conditioned.condition(condition.expand(2, 5)):
        found = conditioned.generate(IDS[:1], **options)
    assert found.shape == (1, 11)
    with conditioned.condition(condition), pytest.raises(condmod.errors.ShapeError):
        conditioned.generate(IDS[:1], **options)


@pytest.mark.parametrize("before", [True, False])
def test_recorded_hidden_states_are_those_under_the_condition(before, drawn):
    model = bert().eval()
    if before:  # transformers hooks what it records when it is first asked to
        model(IDS, output_hidden_states=True)
    conditioned = drawn(model, {"encoder.layer.*": "film"})
    condition = torch.randn(2, 5)
    outputs = conditioned(IDS, condition=condition, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    plain = conditioned.detach()(IDS, output_hidden_states=True)
    assert not torch.allclose(plain.hidden_states[1], outputs.hidden_states[1])


def models() -> Iterator[tuple[nn.Module, Callable[[Any], Any]]]:
    """Models that hold every class that is known."""
    seq = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    images = torch.randn(2, 3, 16, 16)

    def made(name: str, config: str = "", **options: Any) -> Any:
        made_config = getattr(transformers, config or name.removesuffix("Model") + "Config")
        return getattr(transformers, name)(made_config(**options))

    for name in ("Bert", "Roberta", "XLMRoberta", "MPNet"):
        yield made(f"{name}Model", **SIZES), lambda model: model(IDS)
    yield made("ElectraModel", **SIZES, embedding_size=10), lambda model: model(IDS)
    distil = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    yield made("DistilBertModel", **distil), lambda model: model(IDS)
    special = {**TOKENS, "cls_token_id": 1, "sep_token_id": 2}
    yield made("ModernBertModel", **{**SIZES, **special}), lambda model: model(IDS)
    yield gpt2(), lambda model: model(IDS)
    yield made("GPTNeoXModel", **{**SIZES, **TOKENS}), lambda model: model(IDS)
    for name in ("Llama", "Mistral", "Qwen2", "Phi3"):
        yield made(f"{name}Model", **GROUPED), lambda model: model(IDS)
    for name in ("Qwen3Model", "GemmaModel", "Gemma2Model"):
        yield made(name, **GROUPED, head_dim=8), lambda model: model(IDS)
    yield made("Gemma3TextModel", **GROUPED, head_dim=8), lambda model: model(IDS)
    yield made("MixtralModel", **GROUPED, num_local_experts=2), lambda model: model(IDS)
    opt = {key: SIZES[key] for key in SIZES if key != "intermediate_size"}
    yield made("OPTModel", **{**opt, **TOKENS}, ffn_dim=24), lambda model: model(IDS)
    t5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    for gate in ("relu", "gated-gelu"):
        yield made("T5Model", **t5, feed_forward_proj=gate), lambda model: model(**seq)
    bart = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    bart |= {"vocab_size": 50, "d_model": 16, **TOKENS, "decoder_start_token_id": 2}
    yield made("BartModel", **bart, max_position_embeddings=32), lambda model: model(**seq)
    whisper = {"max_source_positions": 10, "max_target_positions": 12, "num_mel_bins": 9}
    sounds = {"input_features": torch.randn(2, 9, 20), "decoder_input_ids": IDS[:, :5]}
    yield made("WhisperModel", **bart, **whisper), lambda model: model(**sounds)
    yield made("ViTModel", **VISION), lambda model: model(images)
    yield made("Dinov2Model", **VISION), lambda model: model(images)
    yield made("CLIPVisionModel", **VISION), lambda model: model(images)
    yield made("SiglipVisionModel", **VISION), lambda model: model(images)
    wave = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": (8, 10),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 8),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    yield made("Wav2Vec2Model", **wave), lambda model: model(torch.randn(2, 400))
    stages = {"hidden_sizes": [6, 9, 12, 14], "depths": [1, 1, 1, 1]}
    wide = torch.randn(2, 3, 80, 104)
    yield made("ConvNextModel", **stages), lambda model: model(wide)
    residual = {"embedding_size": 8, "hidden_sizes": [6, 9], "depths": [1, 1]}
    yield made("ResNetModel", **residual), lambda model: model(wide)


@pytest.fixture(scope="module")
def seen(record):
    return record(models(), LAYERS)


@pytest.mark.parametrize("path", LAYERS)
def test_a_known_layer_reads_and_gives_what_is_said_of_it(path, seen, agree):
    agree(seen[path])
