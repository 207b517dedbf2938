"""`condmod.inspect` says what each condition does, and names those that do nothing."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import nn

import condmod
from condmod import ConditionError, Signal
from condmod_lab.config import TrainConfig
from condmod_lab.data import load_digits
from condmod_lab.network import build

ENCODER = "fuse(inputs={'time': timestep(dim=16), 'text': vector(features=6, nullable=True)})"


class Steered(nn.Module):
    """A model of one's own, in which one argument is forgotten."""

    def __init__(self):
        super().__init__()
        self.film = condmod.create("film", features=8, condition_dim=4)

    def forward(self, x, style, pose):
        return self.film(x, style).tanh()


@pytest.fixture
def own():
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 5, 8), "style": torch.randn(8, 4), "pose": torch.randn(8, 4)}
    return Steered(), batch


@pytest.fixture
def attached():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    conditioned = condmod.attach(
        net, {"0": "film"}, encoder=ENCODER, condition_dim=12, start="published"
    )
    condition = {"time": torch.arange(8) * 100, "text": torch.randn(8, 6)}
    return conditioned, {"input": torch.randn(8, 3, 8), "condition": condition}


def effects(found):
    return {effect.condition: effect for effect in found.effects}


def test_a_condition_that_the_model_forgot_is_named(own):
    model, batch = own
    found = condmod.inspect(model, batch, ["style", "pose"])
    style, pose = effects(found).values()
    assert pose == type(pose)("pose", 0.0, None, 0.0)
    assert pose.ignored
    assert not style.ignored
    assert style.swap > 0.1
    assert style.gradient > 0.1
    assert found.alarms == [
        "the condition 'pose' is ignored: the output is the same with another sample's; is it "
        "wired in, and past a start at zero?"
    ]


def test_a_swap_is_the_change_of_the_output_as_a_share_of_its_size(own):
    model, batch = own
    y = model(**batch)
    other = model(**{**batch, "style": batch["style"].roll(1, 0)})
    want = (other - y).square().mean().sqrt() / y.square().mean().sqrt()
    swap = effects(condmod.inspect(model, batch, ["style"]))["style"].swap
    assert swap == pytest.approx(want.item(), rel=1e-5)


def test_the_gradient_is_the_change_under_small_random_changes_of_the_condition(own):
    model, batch = own
    model, batch = model.double(), {name: value.double() for name, value in batch.items()}
    y = model(**batch)
    generator = torch.Generator().manual_seed(1)
    shares = []
    for _ in range(200):
        noise = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        step = 1e-5 * noise * batch["style"].square().mean().sqrt()
        moved = model(**{**batch, "style": batch["style"] + step})
        shares.append(((moved - y).square().mean() / y.square().mean()).item() / 1e-10)
    want = (sum(shares) / len(shares)) ** 0.5
    gradient = effects(condmod.inspect(model, batch, ["style"]))["style"].gradient
    assert gradient == pytest.approx(want, rel=0.3)  # one probe of it


def test_every_signal_of_an_attachment_is_a_condition_of_its_own(attached):
    conditioned, batch = attached
    found = effects(condmod.inspect(conditioned, batch))
    assert found.keys() == {"time", "text"}
    assert found["text"].drop > 0.01
    assert found["time"].drop is None  # it has no null
    assert found["time"].gradient is None  # integers
    assert not found["time"].ignored
    assert not found["text"].ignored


def test_a_signal_that_is_given_with_presence_can_be_dropped_too(attached):
    conditioned, batch = attached
    text = Signal(batch["condition"]["text"], present=torch.arange(8) > 2)
    given = {**batch, "condition": {**batch["condition"], "text": text}}
    assert effects(condmod.inspect(conditioned, given))["text"].drop > 0.01


def test_an_attachment_at_its_start_is_told_to_do_nothing_yet():
    net = nn.Sequential(nn.Linear(8, 8))
    conditioned = condmod.attach(net, {"0": "film"}, condition_dim=4)
    batch = {"input": torch.randn(4, 8), "condition": torch.randn(4, 4)}
    assert condmod.inspect(conditioned, batch).alarms == [
        "the condition 'condition' is ignored: the output is the same with another sample's; is "
        "it wired in, and past a start at zero?",
        "every sample gets the same modulation: 0",
    ]


def test_the_digits_network_names_the_condition_that_was_cut():
    split = load_digits()
    config = TrainConfig(modulator="dense_film").resolve(10)
    torch.manual_seed(0)
    net = build(config, 10, (1, 8, 8))
    generator = torch.Generator().manual_seed(1)
    x, labels = split.train.images[:48], split.train.labels[:48]
    t = torch.rand(48, generator=generator)
    present = torch.ones(48, dtype=torch.bool)
    batch = {"x": x, "t": t, "labels": labels, "present": present}
    named = {"t": None, "labels": "present"}
    whole = condmod.inspect(net, batch, named)
    assert not [effect.condition for effect in whole.effects if effect.ignored]
    assert effects(whole)["labels"].drop > 0.01
    with torch.no_grad():
        for name, parameter in net.encoder.named_parameters():
            if "label" in name:
                parameter.copy_(parameter[:1].expand_as(parameter))  # all classes become one
    cut = condmod.inspect(net, batch, named)
    assert [effect.condition for effect in cut.effects if effect.ignored] == ["labels"]
    assert "the condition 'labels' is ignored" in str(cut)


def test_parts_tell_what_every_site_generates(attached):
    conditioned, batch = attached
    found = condmod.inspect(conditioned, batch)
    scale, shift = found.parts
    assert (scale.site, scale.component, scale.part) == ("0", "film", "scale")
    with torch.no_grad():
        made = conditioned.eval().bank(batch["condition"])["0"]
    for part, leaf in (scale, made.scale), (shift, made.shift):
        numbers = (leaf.mean(), leaf.std(correction=0), leaf.std(0, correction=0).mean())
        want = [float(number) for number in (*numbers, leaf.min(), leaf.max())]
        assert list(part.numbers) == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert part.closed is None


def test_gates_that_let_nothing_through_are_counted_whatever_their_form():
    sublayers = nn.Linear(8, 8), nn.Linear(8, 8)
    batch = torch.randn(4, 3, 8), torch.randn(4, 6)

    class Block(nn.Module):
        def __init__(self, spec):
            super().__init__()
            self.around = condmod.create(spec, features=8, condition_dim=6)

        def forward(self, x, c):
            return self.around(x, c, *sublayers[: self.around.parts])

    shut = condmod.inspect(Block("adaln_zero"), batch, ["c"])
    assert [part.closed for part in shut.parts if part.part.endswith("gate")] == [1.0, 1.0]
    assert "gates let nothing through: around 0 gate, around 1 gate" in shut.alarms
    open_gates = condmod.inspect(Block("adaln_zero(gate='one_plus')"), batch, ["c"])
    assert [part.closed for part in open_gates.parts if part.closed is not None] == [0.0, 0.0]
    half = Block("adaln_zero(parts=1)")
    with torch.no_grad():
        half.around.proj.bias[-4:].fill_(0.5)  # the last four of eight channels' gates
    found = condmod.inspect(half, batch, ["c"])
    assert [part.closed for part in found.parts if part.closed is not None] == [0.5]


def test_nothing_of_the_model_is_changed(attached):
    conditioned, batch = attached
    conditioned.train()
    conditioned.base[1].eval()
    before = {key: value.clone() for key, value in conditioned.state_dict().items()}
    modes = {name: module.training for name, module in conditioned.named_modules()}
    state = torch.get_rng_state()
    condmod.inspect(conditioned, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in conditioned.named_modules()} == modes
    for key, value in conditioned.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in conditioned.parameters())
    assert not any("generate" in vars(module) for module in conditioned.modules())


def test_a_compiled_model_is_inspected_as_it_is(own):
    model, batch = own
    want = condmod.inspect(model, batch, ["style", "pose"])
    compiled = torch.compile(model, backend="aot_eager")
    assert condmod.inspect(compiled, batch, ["style", "pose"]).to_dict() == want.to_dict()


def test_noise_that_the_model_draws_is_no_effect_of_a_condition(own):
    model, batch = own

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, style, pose):
            return self.inner(x, style, pose) + torch.randn_like(x)

    found = effects(condmod.inspect(Noisy(), batch, ["style", "pose"]))
    assert (found["pose"].swap, found["pose"].ignored) == (0.0, True)
    assert found["style"].swap > 0.1


def test_a_loss_beside_the_output_is_not_looked_at(own):
    model, batch = own

    @dataclass
    class Output:
        loss: torch.Tensor
        sample: torch.Tensor

    class Hub(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.inner, self.kind = model, kind

        def forward(self, **batch):
            return self.kind(loss=torch.zeros(()), sample=self.inner(**batch))

    want = effects(condmod.inspect(model, batch, ["style"]))["style"]
    for kind in dict, Output:
        assert effects(condmod.inspect(Hub(kind), batch, ["style"]))["style"] == want


def test_several_conditions_in_one_argument_are_swapped_together(own):
    model, batch = own

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, both):
            style, pose = both
            return self.inner(x, style, pose)

    x, *both = batch.values()
    want = effects(condmod.inspect(model, batch, ["style"]))["style"]
    found = effects(condmod.inspect(Pair(), (x, tuple(both)), ["both"]))["both"]
    assert found.swap == want.swap


def test_two_banks_with_sites_of_one_name_are_both_told():
    sites = {"block": condmod.Site(8, 4, name="block")}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = condmod.create_bank("film", sites)
            self.two = condmod.create_bank("rt1_film", sites)

        def forward(self, x, c):
            for bank in self.one, self.two:
                x = bank["block"].modulate(x, bank(c)["block"])
            return x

    found = condmod.inspect(Twice(), (torch.randn(4, 8), torch.randn(4, 4)), ["c"])
    assert [(part.site, part.component) for part in found.parts[::2]] == [
        ("one.modulators.block", "film"),
        ("two.modulators.block", "rt1_film"),
    ]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="aot_eager")]
)
def test_a_wrapped_model_takes_its_arguments_in_order_as_the_bare_one(own, attached, wrap):
    model, batch = own
    want = condmod.inspect(model, batch, ["style"])
    assert condmod.inspect(wrap(model), tuple(batch.values()), ["style"]) == want
    conditioned, batch = attached
    want = condmod.inspect(conditioned, batch)
    assert condmod.inspect(wrap(conditioned), batch) == want
    alone = condmod.attach(
        nn.Sequential(nn.Linear(8, 16)), {"0": "squeeze_excite"}, start="published"
    )
    assert condmod.inspect(wrap(alone), (batch["input"],)).effects == ()


def test_no_gradient_is_told_of_a_model_that_runs_without(own):
    model, batch = own
    model.forward = torch.no_grad()(model.forward)
    style = effects(condmod.inspect(model, batch, ["style"]))["style"]
    assert style.gradient is None
    assert style.swap > 0.1


def test_the_arguments_of_a_compiled_base_are_those_of_the_model():
    net = torch.compile(nn.Sequential(nn.Linear(8, 16)), backend="aot_eager")
    alone = condmod.attach(net, {"0": "squeeze_excite"}, start="published")
    assert condmod.inspect(alone, (torch.randn(4, 8),)).effects == ()


def test_an_inspection_is_data_a_table_and_a_picture(attached, tmp_path):
    conditioned, batch = attached
    found = condmod.inspect(conditioned, batch)
    data = json.loads(json.dumps(found.to_dict()))
    assert [effect["condition"] for effect in data["effects"]] == ["time", "text"]
    head, time, text, blank, parts, *_, last = str(found).splitlines()
    assert head.split() == ["condition", "swap", "drop", "gradient"]
    assert (time.split()[0], text.split()[0], blank) == ("time", "text", "")
    assert parts.split()[:4] == ["site", "modulator", "part", "mean"]
    assert last == "no alarm"
    assert found._repr_html_().startswith("<pre>condition")
    found.plot(tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 500
    whole = condmod.inspect(
        Steered(),
        {"x": torch.randn(2, 8), "style": torch.randn(2, 4)} | {"pose": torch.randn(2, 4)},
        ["pose"],
    )
    whole.plot(tmp_path / "ignored.png")


def test_a_plot_without_matplotlib_says_what_to_install(own, monkeypatch, tmp_path):
    model, batch = own
    found = condmod.inspect(model, batch, ["style"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'condmod\[lab\]'"):
        found.plot(tmp_path / "found.png")


def test_wrong_input_says_what_to_do(own):
    model, batch = own
    for given, names, text in (
        (
            batch,
            ["text"],
            "inspect is to look at the condition 'text', and the batch has x, style, pose; name "
            "the arguments that are conditions: inspect(model, batch, conditions=[...])",
        ),
        (
            {**batch, "style": torch.ones(8, 4)},
            ["style"],
            "every sample of the batch has the same condition 'style', so nothing tells what it "
            "does; give a batch of two or more with conditions that differ",
        ),
        (
            batch,
            "style",
            "conditions are names in a list, or in a mapping with what tells who has them; got "
            "'style': say conditions=['style']",
        ),
    ):
        with pytest.raises(ConditionError) as error:
            condmod.inspect(model, given, names)
        assert str(error.value) == text


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([1, 2], "the condition 'steps' holds no tensor whose samples could be swapped; got list"),
        (
            torch.tensor(3),
            "every sample of the batch has the same condition 'steps', so nothing tells what it "
            "does; give a batch of two or more with conditions that differ",
        ),
    ],
)
def test_a_condition_that_no_sample_has_of_its_own_is_refused(steps, text):
    class Stepped(nn.Module):
        def forward(self, x, steps):
            return x * torch.as_tensor(steps).reshape(-1, 1)

    with pytest.raises(ConditionError) as error:
        condmod.inspect(Stepped(), (torch.ones(2, 3), steps), ["steps"])
    assert str(error.value) == text


def test_an_output_that_is_not_finite_is_an_alarm(own):
    model, batch = own
    with torch.no_grad():
        model.film.proj.bias.fill_(float("nan"))
    found = condmod.inspect(model, batch, ["style"])
    assert found.alarms[0] == "the output has NaN or infinite values, so no effect is known"
