"""The time family against the sinusoids, Fourier features and tables of other packages."""

from itertools import product

import pytest
import torch
from torch import nn

from condmod import create, create_encoder

TIMES = torch.tensor([0, 1, 17, 937, 999, 123_456, 1_000_000])
SCALES = [(1.0, 10000.0), (1000.0, 10000.0), (0.5, 10.0)]
LOG_NORMAL = torch.linspace(-3, 3, 7, dtype=torch.float64).exp()


@pytest.mark.parametrize("times", [TIMES, TIMES / 7, TIMES / 1e6], ids=["int", "real", "unit"])
def test_timestep_is_diffusers_sinusoid_bit_for_bit_under_every_flag(parity, peer, times):
    theirs = peer("diffusers.models.embeddings")
    flags = product([4, 5, 320, 321], [False, True], [0, 1], SCALES)
    for dim, flip, shift, (scale, period) in flags:
        order = "cos_sin" if flip else "sin_cos"
        ours = create_encoder(
            f"timestep(dim={dim}, order={order!r}, endpoint={bool(shift)}, scale={scale}, "
            f"max_period={period})"
        )(times)
        flagged = {"flip_sin_to_cos": flip, "downscale_freq_shift": shift, "scale": scale}
        want = theirs.get_timestep_embedding(times, dim, max_period=period, **flagged)
        parity(
            "timestep", "diffusers", "get_timestep_embedding", ours, want, tolerance=0.0, t=times
        )
        if period == 10000.0:
            want = theirs.Timesteps(dim, **flagged)(times)
            parity("timestep", "diffusers", "Timesteps", ours, want, tolerance=0.0, t=times)


def test_timestep_with_hidden_is_diffusers_timestep_embedding(parity, peer):
    ours = create_encoder("timestep(dim=32, hidden=[64])", 48)
    embeddings = peer("diffusers.models.embeddings")
    theirs = embeddings.TimestepEmbedding(32, 64, out_dim=48)
    theirs.linear_1.load_state_dict(ours.hidden[0].state_dict())
    theirs.linear_2.load_state_dict(ours.proj.state_dict())
    want = theirs(embeddings.Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(TIMES))
    parity("timestep", "diffusers", "TimestepEmbedding", ours(TIMES), want, tolerance=0.0, t=TIMES)


@pytest.mark.parametrize(
    ("package", "module", "name"),
    [
        (
            "denoising-diffusion-pytorch",
            "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
            "SinusoidalPosEmb",
        ),
        ("lerobot", "lerobot.policies.diffusion.modeling_diffusion", "DiffusionSinusoidalPosEmb"),
    ],
)
def test_timestep_with_the_endpoint_is_the_sinusoid_of_ddpm(parity, peer, package, module, name):
    time = torch.arange(0, 1000, 37)
    ours = create_encoder("timestep(dim=64, order='sin_cos', endpoint=True)")(time)
    want = getattr(peer(module), name)(64)(time)
    parity("timestep", package, name, ours, want, tolerance=2e-4, t=time)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_fourier_is_diffusers_gaussian_projection(parity, peer, flip, log):
    form = "cos_sin" if flip else "sin_cos"
    ours = create_encoder(f"fourier(dim=16, form={form!r}, std=1.)").double()
    theirs = peer("diffusers.models.embeddings").GaussianFourierProjection(
        8, log=log, flip_sin_to_cos=flip
    )
    theirs.double().weight.copy_(ours.features.frequencies)
    got = ours(LOG_NORMAL.log() if log else LOG_NORMAL)
    want = theirs(LOG_NORMAL)
    parity("fourier", "diffusers", "GaussianFourierProjection", got, want, t=LOG_NORMAL)


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("k-diffusion", "k_diffusion.layers"),
        ("stable-audio-tools", "stable_audio_tools.models.blocks"),
    ],
)
def test_fourier_with_cosines_first_is_the_fourier_features_of_k_diffusion(
    parity, peer, package, module
):
    ours = create_encoder("fourier(dim=16, form='cos_sin', std=1.)").double()
    theirs = peer(module).FourierFeatures(1, 16).double()
    with torch.no_grad():
        theirs.weight.copy_(ours.features.frequencies[:, None])
    got, want = ours(LOG_NORMAL), theirs(LOG_NORMAL[:, None])
    parity("fourier", package, "FourierFeatures", got, want, t=LOG_NORMAL)


def test_fourier_behind_the_time_is_that_of_lucidrains(parity, peer):
    ours = create_encoder("fourier(dim=16, std=1., with_input=True)").double()
    got = ours(LOG_NORMAL)
    package = "denoising-diffusion-pytorch"
    module = peer("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    theirs = module.RandomOrLearnedSinusoidalPosEmb(16, is_random=True).double()
    theirs.weights.copy_(ours.features.frequencies)
    want = theirs(LOG_NORMAL)
    parity("fourier", package, "RandomOrLearnedSinusoidalPosEmb", got, want, t=LOG_NORMAL)
    theirs = peer("transfusion_pytorch.transfusion").RandomFourierEmbed(16).double()
    theirs.weights.copy_(ours.features.frequencies)
    want = theirs(LOG_NORMAL)[:, 0]
    parity("fourier", "transfusion-pytorch", "RandomFourierEmbed", got, want, t=LOG_NORMAL)


@pytest.mark.parametrize(
    ("package", "module", "name"),
    [
        ("alphafold3-pytorch", "alphafold3_pytorch.alphafold3", "FourierEmbedding"),
        ("x-transformers", "x_transformers.neo_mlp", "RandomFourierEmbed"),
    ],
)
def test_fourier_with_phases_is_that_of_alphafold3_times_the_root_of_two(
    parity, peer, package, module, name
):
    ours = create_encoder("fourier(dim=16, form='cos_phase', std=1.)").double()
    theirs = getattr(peer(module), name)(16).double()
    with torch.no_grad():
        theirs.proj.weight.copy_(ours.features.frequencies[:, None])
        theirs.proj.bias.copy_(ours.features.phases / (2 * torch.pi))
    want = 2**0.5 * theirs(LOG_NORMAL)
    parity("fourier", package, f"√2·{name}", ours(LOG_NORMAL), want, t=LOG_NORMAL)


def test_timestep_table_is_diffusers_ada_layer_norm_behind_a_norm(parity, peer):
    theirs = peer("diffusers.models.normalization").AdaLayerNorm(16, num_embeddings=20).double()
    ours = create("timestep_table(steps=20)", features=16).double()
    with torch.no_grad():
        ours.table.copy_(theirs.linear(nn.functional.silu(theirs.emb.weight)))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for step in range(20):
        t = torch.tensor([step])
        want = theirs(x, t[0])  # one step for the whole batch
        got = ours(theirs.norm(x), t.expand(2))
        parity("timestep_table", "diffusers", "AdaLayerNorm", got, want, x=x, t=t)
