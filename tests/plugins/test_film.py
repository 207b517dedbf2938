"""FiLM and DenseFiLM equal what people write by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condmod import SpecError, configure, create


class TextbookFilm(nn.Module):
    def __init__(self, features, condition_dim):
        super().__init__()
        self.fc_gamma = nn.Linear(condition_dim, features)
        self.fc_beta = nn.Linear(condition_dim, features)

    def forward(self, x, c):
        return self.fc_gamma(c) * x + self.fc_beta(c)


def test_film_equals_the_textbook_class_under_an_equal_seed():
    torch.manual_seed(0)
    textbook = TextbookFilm(64, 128)
    torch.manual_seed(0)
    film = create("film", features=64, condition_dim=128)
    x, c = torch.randn(1, 64), torch.randn(1, 128)
    assert torch.equal(film.proj.weight[:64], textbook.fc_gamma.weight)
    assert torch.equal(film.proj.bias[64:], textbook.fc_beta.bias)
    assert film(x, c).shape == (1, 64)
    torch.testing.assert_close(film(x, c), textbook(x, c))


def test_film_draws_no_more_random_numbers_than_the_textbook_class():
    torch.manual_seed(0)
    TextbookFilm(64, 128)
    want = torch.rand(())
    torch.manual_seed(0)
    create("film", features=64, condition_dim=128)
    assert torch.rand(()) == want


def test_film_computes_one_matrix_product():
    film = create("film", features=64, condition_dim=128)
    assert [name for name, _ in film.named_parameters()] == ["proj.weight", "proj.bias"]


def test_the_seed_figure_of_dense_film_keeps_its_shape():
    dense = create("dense_film(residual=True)", features=64, condition_dim=64)
    assert dense(torch.randn(2, 80, 64), torch.randn(2, 64)).shape == (2, 80, 64)


SHAPES = {
    "(B,C)": (),
    "(B,T,C)": (7,),
    "(B,C,H,W)": (5, 4),
    "(B,C,T,H,W)": (3, 5, 4),
}


@pytest.mark.parametrize("aligned", [False, True], ids=["global", "aligned"])
@pytest.mark.parametrize("positions", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", ["film", "dense_film", "dense_film(residual=True)"])
def test_both_equal_their_formula_in_float64(spec, positions, aligned):
    first = len(positions) > 1
    torch.manual_seed(1)
    module = create(spec, features=64, condition_dim=32, channel_dim=1 if first else -1).double()
    x = torch.randn(2, *positions, 64, dtype=torch.float64)
    c = torch.randn(2, *(positions if aligned else ()), 32, dtype=torch.float64)
    generated = (F.mish(c) if "dense" in spec else c) @ module.proj.weight.T + module.proj.bias
    if not aligned:
        generated = generated.reshape(2, *[1] * len(positions), 128)
    a, b = generated.chunk(2, -1)
    want = a * x + b if spec == "film" else (a + 1) * x + b
    if "residual" in spec:
        want = x + want
    if first:
        x, want = x.movedim(-1, 1), want.movedim(-1, 1)
        c = c.movedim(-1, 1) if aligned else c
    assert (module(x, c) - want).abs().max() < 1e-12


def test_xavier_is_audio2photoreals_initialisation():
    dense = create("dense_film(init='xavier')", features=64, condition_dim=512)
    assert not dense.proj.bias.any()
    assert abs(dense.proj.weight.std().item() - (2 / (512 + 128)) ** 0.5) < 1e-3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "film(init='identity', scale='sigmoid')",
            "film: init='identity' needs a scale of 1, which a sigmoid never reaches\n"
            "  film(init='identity', scale='sigmoid')\n"
            "  ^^^^",
        ),
        (
            "dense_film(init='identity', scale='exp', residual=True)",
            "dense_film: init='identity' cannot be reached by scale='exp' with residual=True; "
            "choose from one_plus, raw\n"
            "  dense_film(init='identity', scale='exp', residual=True)\n"
            "  ^^^^^^^^^^",
        ),
    ],
)
def test_an_identity_that_cannot_be_is_refused(spec, message):
    with pytest.raises(SpecError) as caught:
        configure(spec)
    assert str(caught.value) == message
