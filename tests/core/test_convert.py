"""Parameters move between a published layout and ours; nothing is guessed and nothing changes."""

import re
import sys

import pytest
import torch
from torch import Tensor, nn

import condmod
from condmod import CodecError, Site, convert, create, create_bank
from condmod.codec import Codec, linear
from condmod.entries import Entry, installed_entries

ROWS = torch.arange(36.0)


class Textbook(nn.Module):
    """FiLM as everybody writes it."""

    def __init__(self, features: int, condition_dim: int) -> None:
        super().__init__()
        self.fc_gamma = nn.Linear(condition_dim, features)
        self.fc_beta = nn.Linear(condition_dim, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.fc_gamma(c)[:, None] * x + self.fc_beta(c)[:, None]


@pytest.fixture
def textbook() -> Textbook:
    torch.manual_seed(0)
    return Textbook(6, 4)


def refused(words: str):
    return pytest.raises(CodecError, match=f"^{re.escape(words)}$")


def test_a_handwritten_layer_moves_over_and_computes_the_same(textbook):
    film = create("film", features=6, condition_dim=4)
    film.load_state_dict(convert(film, "textbook", textbook.state_dict()))
    x, c = torch.randn(2, 5, 6), torch.randn(2, 4)
    torch.testing.assert_close(film(x, c), textbook(x, c))


@pytest.mark.parametrize("component", ["film", {"name": "film"}, condmod.configure("film")])
def test_a_spec_converts_as_the_built_component_does(textbook, component):
    built = create("film", features=6, condition_dim=4)
    theirs = textbook.state_dict()
    for key, value in convert(component, "textbook", theirs).items():
        assert torch.equal(value, convert(built, "textbook", theirs)[key])


def test_there_and_back_is_bit_for_bit_the_same(textbook):
    theirs = textbook.state_dict()
    ours = convert("film", "textbook", theirs)
    again = convert("film", "textbook", ours, inverse=True)
    assert again.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(again[key], value)


def test_a_bank_takes_the_keys_of_every_site(textbook):
    sites = {"blocks.0": Site(6, 4), "blocks.1": Site(6, 4)}
    bank = create_bank("film", sites)
    theirs = {
        f"{site}.{key}": value for site in sites for key, value in textbook.state_dict().items()
    }
    bank.load_state_dict(convert(bank, "textbook", theirs))
    x, c = torch.randn(2, 5, 6), torch.randn(2, 4)
    assert torch.equal(bank["blocks.0"](x, c), bank["blocks.1"](x, c))
    torch.testing.assert_close(bank["blocks.1"](x, c), textbook(x, c))
    back = convert(bank, "textbook", bank.state_dict(), inverse=True)
    assert back.keys() == theirs.keys()


def test_missing_and_unknown_keys_are_all_listed(textbook):
    theirs = textbook.state_dict()
    theirs["fc_delta.bias"] = theirs.pop("fc_beta.bias")
    theirs["fc_delta.weight"] = theirs.pop("fc_beta.weight")
    film = create("film", features=6, condition_dim=4, name="blocks.3")
    with refused(
        "film at 'blocks.3': these are not its parameters as textbook has them; missing: "
        "fc_beta.bias, fc_beta.weight; unknown: fc_delta.bias, fc_delta.weight"
    ):
        convert(film, "textbook", theirs)
    with refused(
        "film: these are not its parameters of condmod, to be laid out as textbook's; missing: "
        "proj.bias, proj.weight; unknown: fc_delta.bias, fc_delta.weight, fc_gamma.bias, "
        "fc_gamma.weight"
    ):
        convert("film", "textbook", theirs, inverse=True)


def test_parameters_of_another_size_are_refused_with_both_shapes(textbook):
    film = create("film", features=8, condition_dim=4, name="blocks.3")
    with refused(
        "film at 'blocks.3': proj.weight is (16, 4) here; got fc_gamma.weight (6, 4), "
        "fc_beta.weight (6, 4)"
    ):
        convert(film, "textbook", textbook.state_dict())
    with refused("film at 'blocks.3': proj.weight is (16, 4) here; got proj.weight (12, 4)"):
        convert(film, "textbook", convert("film", "textbook", textbook.state_dict()), inverse=True)


def test_shares_of_unlike_shapes_are_refused(textbook):
    theirs = textbook.state_dict()
    theirs["fc_beta.weight"] = theirs["fc_beta.weight"][:3]
    with refused(
        "film: the shares of fc_gamma.weight, fc_beta.weight differ in shape: scale (6, 4), "
        "shift (3, 4)"
    ):
        convert("film", "textbook", theirs)


def test_rows_that_do_not_split_are_refused():
    with refused(
        "dense_film: the rows of block.1.weight (7, 4) are no 2 equal shares (scale, shift)"
    ):
        convert(
            "dense_film",
            "edge",
            {"block.1.weight": torch.ones(7, 4), "block.1.bias": torch.ones(7)},
        )


def test_an_option_that_the_source_reads_otherwise_is_refused(textbook):
    with refused(
        "film(scale='exp') reads textbook's parameters otherwise: its codec is for scale='raw', "
        "not scale='exp'"
    ):
        convert("film(scale='exp')", "textbook", textbook.state_dict())


def test_an_unknown_source_names_what_there_is():
    with refused("film has no codec for 'text_book'; did you mean 'textbook'?"):
        convert("film", "text_book", {})
    with refused("none has no codec for 'dit': it has none"):
        convert("none", "dit", {})


def test_the_catalogue_tells_the_sources():
    assert "textbook" in condmod.describe("film").sources
    assert condmod.describe("none").sources == ()


def test_shares_of_two_dtypes_are_refused_and_not_joined(textbook):
    theirs = textbook.state_dict()
    theirs["fc_beta.bias"] = theirs["fc_beta.bias"].half()
    with refused(
        "film: the shares of fc_gamma.bias, fc_beta.bias differ in kind: scale torch.float32 on "
        "cpu, shift torch.float16 on cpu"
    ):
        convert("film", "textbook", theirs)


def test_what_is_converted_follows_no_later_training(textbook):
    film = create("film", features=6, condition_dim=4)
    theirs = convert(film, "textbook", film.state_dict(), inverse=True)
    before = film.proj.weight.clone()
    for value in theirs.values():
        value.zero_()
    assert torch.equal(film.proj.weight, before)


def test_what_is_no_state_dict_is_refused(textbook):
    with refused("parameters come as a state dict; got Textbook"):
        convert("film", "textbook", textbook)
    with refused("film: fc_gamma.weight is a tensor; got NoneType"):
        convert("film", "textbook", dict.fromkeys(textbook.state_dict()))


def test_very_many_unknown_keys_are_counted(textbook):
    model = {f"blocks.{i:03}.qkv.weight": torch.zeros(1) for i in range(100)}
    with pytest.raises(CodecError) as caught:
        convert("film", "textbook", textbook.state_dict() | model)
    assert str(caught.value).endswith("blocks.039.qkv.weight and 60 more")


class Layer(nn.Module):
    """A layer with a modulator, which its model holds twice."""

    def __init__(self, film: nn.Module) -> None:
        super().__init__()
        self.linear, self.film = nn.Linear(6, 6), film
        self.norm = nn.BatchNorm1d(6)


class Model(nn.Module):
    """Two layers with one modulator between them."""

    def __init__(self) -> None:
        super().__init__()
        film = create("film", features=6, condition_dim=4)
        self.layers = nn.ModuleList([Layer(film), Layer(film)])


def test_a_model_converts_its_modulators_where_they_stand_and_keeps_every_other_key(textbook):
    model = Model()
    theirs = {
        key: value for key, value in Model().state_dict().items() if not key.endswith("proj.weight")
    }
    for layer in ("layers.0", "layers.1"):
        del theirs[f"{layer}.film.proj.bias"]
        theirs |= {f"{layer}.film.{key}": value for key, value in textbook.state_dict().items()}
    model.load_state_dict(convert(model, "textbook", theirs))
    assert torch.equal(model.layers[1].film.proj.bias[:6], textbook.fc_gamma.bias)
    assert torch.equal(model.layers[1].linear.weight, theirs["layers.1.linear.weight"])
    back = convert(model, "textbook", model.state_dict(), inverse=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


def test_what_a_source_keeps_in_the_block_itself_is_looked_for_there():
    block = nn.ModuleDict({"modulator": create("adaln_zero", features=6, condition_dim=4)})
    theirs = {"adaLN_modulation.1.weight": torch.randn(36, 4), "adaLN_modulation.1.bias": ROWS}
    ours = convert(block, "dit", theirs)
    assert ours.keys() == {"modulator.proj.weight", "modulator.proj.bias"}
    assert torch.equal(ours["modulator.proj.bias"], ROWS)
    named = {f"blocks.3.{key}": value for key, value in theirs.items()}
    model = nn.ModuleDict({"blocks": nn.ModuleDict({"3": block})})
    assert convert(model, "dit", named).keys() == {f"blocks.3.{key}" for key in ours}


def test_the_sites_of_a_bank_are_named_from_the_module_that_holds_it():
    bank = create_bank("adaln_single", {"blocks.0": Site(6, 4), "blocks.1": Site(6, 4)})
    model = nn.ModuleDict({"dit": nn.ModuleDict({"bank": bank, "final": nn.Linear(6, 6)})})
    theirs = convert(model, "pixart", model.state_dict(), inverse=True)
    assert theirs.keys() == {
        *("dit.t_block.1.weight", "dit.t_block.1.bias", "dit.final.weight", "dit.final.bias"),
        *("dit.blocks.0.scale_shift_table", "dit.blocks.1.scale_shift_table"),
    }
    ours = convert(model, "pixart", theirs)
    assert ours.keys() == model.state_dict().keys()


def test_missing_and_unknown_keys_of_a_model_are_listed_by_their_place(textbook):
    model = nn.ModuleDict({"film": create("film", features=6, condition_dim=4)})
    theirs = {f"film.{key}": value for key, value in textbook.state_dict().items()}
    theirs["head.weight"] = theirs.pop("film.fc_beta.weight")
    with refused(
        "ModuleDict: these are not its parameters as textbook has them; missing: "
        "film.fc_beta.weight; unknown: head.weight"
    ):
        convert(model, "textbook", theirs)


def test_a_parameter_of_a_model_has_its_shape_checked():
    model = nn.ModuleDict({"film": create("film", features=6, condition_dim=4)})
    theirs = {f"film.{key}": value for key, value in Textbook(3, 4).state_dict().items()}
    with refused(
        "ModuleDict: film.proj.weight is (12, 4) here; got film.fc_gamma.weight (3, 4), "
        "film.fc_beta.weight (3, 4)"
    ):
        convert(model, "textbook", theirs)


@pytest.mark.parametrize("inverse", [False, True])
def test_one_tensor_with_two_values_is_refused(inverse):
    model = Model()
    given = model.state_dict()
    given["layers.1.film.proj.bias"] = given["layers.1.film.proj.bias"] + 1
    if not inverse:
        film = model.layers[0].film
        given = {key: value for key, value in given.items() if "film" not in key}
        for layer in ("layers.0", "layers.1"):
            own = convert(film, "textbook", film.state_dict(), inverse=True)
            given |= {f"{layer}.film.{key}": value for key, value in own.items()}
        given["layers.1.film.fc_gamma.bias"] = given["layers.1.film.fc_gamma.bias"] + 1
    with refused(
        "Model: layers.0.film.proj.bias and layers.1.film.proj.bias are one tensor here; got two "
        "that differ"
    ):
        convert(model, "textbook", given, inverse=inverse)


def test_one_tensor_without_values_has_none_that_differ():
    model = Model()
    theirs = convert(model, "textbook", model.state_dict(), inverse=True)
    shapes = {key: value.to("meta") for key, value in theirs.items()}
    assert all(value.is_meta for value in convert(model, "textbook", shapes).values())


def test_an_extra_state_that_is_no_tensor_is_named():
    class Calibrated(Model):
        def get_extra_state(self):
            return {"scale": 3}

    model = Calibrated()
    with refused("Calibrated: _extra_state is a tensor; got dict"):
        convert(model, "textbook", model.state_dict(), inverse=True)


def test_a_model_from_before_batches_were_counted_converts():
    model = Model()
    given = convert(model, "textbook", model.state_dict(), inverse=True)
    old = {key: value for key, value in given.items() if "num_batches" not in key}
    assert given.keys() - old.keys() == {f"layers.{i}.norm.num_batches_tracked" for i in range(2)}
    model.load_state_dict(convert(model, "textbook", old))


def test_two_parameters_under_one_key_of_the_source_are_refused():
    block = nn.ModuleDict({"modulator": create("adaln_zero", features=6, condition_dim=4)})
    block["adaLN_modulation"] = nn.ModuleList([nn.SiLU(), nn.Linear(4, 36, bias=False)])
    with refused(
        "ModuleDict: two of its parameters are adaLN_modulation.1.weight as dit has them; give the "
        "modulator or the other module another place"
    ):
        convert(block, "dit", {})


def test_a_model_without_a_modulator_has_nothing_to_convert():
    with refused(
        "Linear holds no modulator, so it has no keys to convert: load the state dict as it is, or "
        "give the model that holds the modulators"
    ):
        convert(nn.Linear(2, 2), "dit", {})


def test_a_modulator_in_a_model_that_the_source_does_not_know_is_named():
    model = nn.ModuleDict({"film": create("film", features=6, condition_dim=4)})
    with refused("film has no codec for 'dit'; it has textbook, film"):
        convert(model, "dit", {})


class Brought(condmod.Registry):
    """A registry in which film has one codec more."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def codecs(self, name):
        return [*super().codecs(name), self.codec]


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (
            linear({"proj": ("scale", "shift")}, {"mod": ("scale", "shft")}),
            "proj.weight has the shares ['scale', 'shift'] here, ['scale', 'shft'] there; "
            "proj.bias has the shares ['scale', 'shift'] here, ['scale', 'shft'] there",
        ),
        (
            linear({"prj": ("scale", "shift")}, {"mod": ("scale", "shift")}),
            "its keys and the component's differ in prj.bias, prj.weight, proj.bias, proj.weight",
        ),
    ],
)
def test_a_codec_that_does_not_fit_its_component_is_told(layout, told):
    film = create("film", features=6, condition_dim=4)
    registry = Brought(Codec("film", "mine", lambda _: layout))
    with refused(f"the codec of film for 'mine' is wrong: {told}"):
        convert(film, "mine", {}, registry=registry)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return [1]", "DefinitionError: condmod_codecs gives Codecs; got 1"),
        (
            "return [Codec('film', 'mine')]",
            "DefinitionError: bad_codecs brings a codec for 'film', which is not its own component",
        ),
        (
            "return [Codec('bad.gate', 'mine'), Codec('bad.gate', 'mine')]",
            "DefinitionError: bad_codecs brings two codecs of 'bad.gate' for 'mine'",
        ),
    ],
)
def test_a_plugin_whose_codecs_fail_is_told_and_harms_no_other(answer, told, tmp_path, monkeypatch):
    (tmp_path / "bad_codecs.py").write_text(f"""
import condmod
from condmod.codec import Codec
from condmod_film.film import Film, FilmConfig

class Options(condmod.ModulatorConfig):
    pass

class Gate(condmod.Modulator):
    name = "bad.gate"
    Config = Options
    kinds = frozenset({{"global"}})
    def generate(self, condition): return condition
    def modulate(self, x, modulation): return x
    def reset_parameters(self): pass

@condmod.hookimpl
def condmod_modulators():
    return [Gate]

@condmod.hookimpl
def condmod_codecs():
    {answer}
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_codecs", raising=False)
    entry = Entry("bad.gate", "modulator", "bad_codecs", "bad-codecs", "1.0")
    registry = condmod.Registry([*installed_entries(), entry])
    with pytest.raises(condmod.PluginError) as caught:
        condmod.describe("bad.gate", registry=registry)
    assert str(caught.value) == f"bad-codecs 1.0 failed to give the codecs of 'bad.gate': {told}"
    assert registry.check()["bad.gate"] == str(caught.value)
    assert "textbook" in condmod.describe("film", registry=registry).sources
