"""Attached models beside peft's LoRA, and in the loops of Lightning and transformers."""

import copy
from typing import Any

import peft
import pytest
import pytorch_lightning
import torch
import transformers
from torch import Tensor, nn

import condmod
from condmod_hosts.peft import LAYERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks a model of it
)
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
NORMS = {"**.output.LayerNorm": "film"}
QUERIES = {"**.query": "film"}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def adapted(model: nn.Module, **options: Any) -> Any:
    """LoRA on queries and values, drawn so that it acts."""
    targets = {"target_modules": ["query", "value"], **options}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def hidden(model: Any, **options: Any) -> Tensor:
    states: Tensor = model(IDS, **options).last_hidden_state
    return states


def training(model: nn.Module) -> set[str]:
    """What trains: parts of names."""
    parts = ("bank.", "lora_")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {next((part for part in parts if part in name), "base") for name in names}


@pytest.mark.parametrize("patterns", [NORMS, QUERIES])
def test_on_top_of_a_lora_model_it_starts_as_that_model(patterns):
    lora = adapted(bert())
    expected = hidden(lora)
    conditioned = condmod.attach(lora, patterns, condition_dim=5)
    assert torch.equal(hidden(conditioned, condition=torch.randn(2, 5)), expected)


def test_on_top_of_a_lora_model_freeze_says_whether_lora_trains():
    assert training(condmod.attach(adapted(bert()), NORMS, condition_dim=5)) == {"bank."}
    both = condmod.attach(adapted(bert()), NORMS, condition_dim=5, freeze="none")
    assert training(both) == {"bank.", "lora_"}


def test_on_top_of_a_lora_layer_it_modulates_base_and_lora_together(drawn):
    lora = adapted(bert())
    conditioned = drawn(lora, QUERIES)
    condition = torch.randn(2, 5)
    expected = hidden(conditioned, condition=condition)
    lora.merge_adapter()
    torch.testing.assert_close(hidden(conditioned, condition=condition), expected)
    lora.unmerge_adapter()
    with lora.disable_adapter():
        assert not torch.allclose(hidden(conditioned, condition=condition), expected, atol=1e-3)


def test_on_top_of_a_lora_model_it_comes_off(drawn):
    lora = adapted(bert())
    expected, classes = hidden(lora), [type(module) for module in lora.modules()]
    assert drawn(lora, {**NORMS, **QUERIES}).detach() is lora
    assert [type(module) for module in lora.modules()] == classes
    assert torch.equal(hidden(lora), expected)


@pytest.mark.parametrize("patterns", [NORMS, QUERIES])
def test_lora_under_an_attachment_starts_as_the_attached_model_and_trains_with_it(patterns, drawn):
    conditioned = drawn(bert(), patterns)
    condition = torch.randn(2, 5)
    expected = hidden(conditioned, condition=condition)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    lora = peft.get_peft_model(conditioned.base, config)
    assert torch.equal(hidden(conditioned, condition=condition), expected)
    with conditioned.condition(condition):
        assert torch.equal(hidden(lora), expected)
    assert training(conditioned) == {"bank.", "lora_"}


@pytest.mark.parametrize("patterns", [NORMS, QUERIES])
def test_lora_under_an_attachment_stays_when_that_comes_off(patterns, drawn):
    conditioned = drawn(bert(), patterns)
    lora = adapted(conditioned.base)
    with conditioned.disabled():
        expected = hidden(lora)
    conditioned.detach()
    assert torch.equal(hidden(lora), expected)
    assert not any(type(module).__dict__.get("_condmod_base") for module in lora.modules())


def test_lora_under_an_attachment_merges_into_layers_without_sites(drawn):
    conditioned = drawn(bert(), NORMS)
    lora = adapted(conditioned.base)
    condition = torch.randn(2, 5)
    expected = hidden(conditioned, condition=condition)
    assert lora.merge_and_unload() is conditioned.base
    torch.testing.assert_close(hidden(conditioned, condition=condition), expected)


def test_lora_under_a_site_adds_to_what_is_modulated_until_it_is_merged(drawn):
    conditioned = drawn(bert(), QUERIES)
    lora = adapted(conditioned.base)
    condition = torch.randn(2, 5)
    query = conditioned.base.encoder.layer[0].attention.self.query
    x = torch.randn(2, 7, 16)
    with conditioned.condition(condition):
        modulated = query.base_layer(x)
        added = query.lora_B["default"](query.lora_A["default"](x)) * query.scaling["default"]
        torch.testing.assert_close(query(x), modulated + added)
    lora.merge_and_unload()
    with conditioned.condition(condition):
        merged = conditioned.base.encoder.layer[0].attention.self.query(x)
    assert not torch.allclose(merged, modulated + added, atol=1e-3)


def test_lora_of_an_attached_model_freezes_the_bank_unless_it_is_saved_along():
    conditioned = condmod.attach(bert(), NORMS, condition_dim=5)
    assert training(adapted(conditioned)) == {"lora_"}
    conditioned = condmod.attach(bert(), NORMS, condition_dim=5)
    both = adapted(conditioned, modules_to_save=["bank"])
    assert training(both) == {"bank.", "lora_"}
    hidden(both, condition=torch.randn(2, 5)).sum().backward()
    own = dict(conditioned.bank.named_parameters())
    assert own
    assert [name for name, p in own.items() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(6, 8), torch.randn(2, 5, 6)),
        (nn.Embedding(9, 8), torch.arange(10).reshape(2, 5) % 9),
        (nn.Conv1d(6, 8, 3), torch.randn(2, 6, 9)),
        (nn.Conv2d(6, 8, 3), torch.randn(2, 6, 9, 9)),
        (nn.Conv3d(6, 8, 3), torch.randn(2, 6, 9, 9, 9)),
    ],
)
def test_a_known_layer_of_peft_reads_and_gives_what_is_said_of_it(base, x, record, agree):
    lora = adapted(nn.Sequential(base), target_modules=["0"])
    (calls,) = [calls for calls in record([(lora, lambda m: m(x))], LAYERS).values() if calls]
    agree(calls)


class Shifted(pytorch_lightning.LightningModule):
    """Lightning's loop around an attached model: the condition says by how much to shift."""

    def __init__(self, conditioned: condmod.Conditioned) -> None:
        super().__init__()
        self.conditioned = conditioned
        self.losses: list[float] = []

    def training_step(self, batch: Any, _index: int) -> Tensor:
        x, condition = batch
        with torch.no_grad(), self.conditioned.disabled():
            target = self.conditioned.base(x) + condition
        y = self.conditioned(x, condition=condition)
        loss = nn.functional.mse_loss(y, target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.conditioned.bank.parameters(), lr=0.1)


@pytest.mark.filterwarnings(  # of Lightning itself, and of a loader that needs no workers here
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
)
def test_lightning_trains_the_bank_alone(tmp_path):
    base = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 4))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    module = Shifted(condmod.attach(base, {"2": "film"}, condition_dim=4))
    data = [(x, c) for x, c in zip(torch.randn(32, 3), torch.randn(32, 4), strict=True)]
    trainer = pytorch_lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert sum(module.losses[-4:]) < 0.1 * sum(module.losses[:4])
    after = base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class AdapterTrainer(transformers.Trainer):
    """Writes the adapter alone; the Trainer's own would write the base, too."""

    def _save(self, output_dir: str, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir)


def test_the_trainer_of_transformers_trains_and_saves_the_bank_alone(tmp_path):
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(**sizes, **tokens, initializer_range=0.5)
    base = transformers.GPT2LMHeadModel(config)
    untouched = copy.deepcopy(base).eval()
    conditioned = condmod.attach(base, {"transformer.h.*.ln_*": "film"}, condition_dim=2)
    kinds = torch.eye(2)  # the condition says which of two tokens follows
    rows = [
        {"input_ids": ids, "labels": torch.full((6,), 5 + i % 2), "condition": kinds[i % 2]}
        for i, ids in enumerate(torch.randint(3, 20, (16, 6)))
    ]
    trainer = AdapterTrainer(
        model=conditioned,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            remove_unused_columns=False,  # else it drops all that forward does not name
            label_names=["labels"],  # else it evaluates no loss
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=0.05,
            logging_steps=1,
            save_steps=20,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.3 * losses[0]
    after = base.state_dict()
    assert all(torch.equal(after[name], kept) for name, kept in untouched.state_dict().items())
    loaded = condmod.load_pretrained(untouched, tmp_path / "checkpoint-20")
    ids = torch.stack([rows[0]["input_ids"], rows[1]["input_ids"]])
    expected = conditioned.eval()(ids, condition=kinds).logits
    assert torch.equal(loaded(ids, condition=kinds).logits, expected)
