"""What runs along time equals the packages that people use, under equal weights."""

import torch

from condmod import Site, create, create_bank

MODELING = "transformers.models.vits.modeling_vits"


def test_wavenet_gate_is_the_gate_of_vits(parity, peer):
    y, g = torch.randn(2, 16, 7).double(), torch.randn(2, 16, 7).double()
    theirs = peer(MODELING).fused_add_tanh_sigmoid_multiply(y, g, torch.tensor(8))
    ours = create("wavenet_gate", features=8, condition_dim=16, channel_dim=1).double()
    with torch.no_grad():
        ours.proj.weight.copy_(torch.eye(16))
        ours.proj.bias.zero_()
    got = ours(y[:, :8], g, lambda _: y)
    parity("wavenet_gate", "transformers", "fused_add_tanh_sigmoid_multiply", got, theirs, y=y, g=g)


def test_wavenet_gates_are_those_of_the_layers_of_vits(parity, peer):
    configuration = peer("transformers.models.vits.configuration_vits").VitsConfig(
        hidden_size=8, speaker_embedding_size=5, wavenet_kernel_size=3, wavenet_dilation_rate=2
    )
    wavenet = peer(MODELING).VitsWaveNet(configuration, num_layers=2).double().eval()
    sites = {str(i): Site(8, 5, channel_dim=1) for i in range(2)}
    bank = create_bank("wavenet_gate", sites).double()
    for i in range(2):
        rows = slice(16 * i, 16 * (i + 1))
        with torch.no_grad():
            bank[str(i)].proj.weight.copy_(wavenet.cond_layer.weight[rows, :, 0])
            bank[str(i)].proj.bias.copy_(wavenet.cond_layer.bias[rows])
    x, speaker = torch.randn(2, 8, 11).double(), torch.randn(2, 5).double()
    theirs = wavenet(x, torch.ones(2, 1, 11).double(), speaker[..., None])

    got, h = torch.zeros_like(x), x
    for i, modulation in enumerate(bank(speaker).values()):
        gated = bank[str(i)].around(h, modulation, wavenet.in_layers[i])
        split = wavenet.res_skip_layers[i](gated)
        if i == 0:
            h = h + split[:, :8]
        got = got + split[:, -8:]
    parity("wavenet_gate", "transformers", "VitsWaveNet", got, theirs, x=x, speaker=speaker)
