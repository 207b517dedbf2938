"""The FiLM family equals the packages that people use, under equal weights."""

import pytest
import torch

from condmod import Signal, create


@pytest.mark.parametrize("predicted", [False, True])
def test_diffusion_policy_film_is_that_of_lerobot_s_residual_block(parity, peer, predicted):
    modeling = peer("lerobot.policies.diffusion.modeling_diffusion")
    block = modeling.DiffusionConditionalResidualBlock1d(
        8, 16, cond_dim=5, n_groups=4, use_film_scale_modulation=predicted
    ).double()
    spec = f"diffusion_policy_film(cond_predict_scale={predicted})"
    ours = create(spec, features=16, condition_dim=5, channel_dim=1).double()
    ours.proj.load_state_dict(block.cond_encoder[1].state_dict())
    x, c = torch.randn(2, 8, 12).double(), torch.randn(2, 5).double()
    got = block.conv2(ours(block.conv1(x), c)) + block.residual_conv(x)
    what = f"DiffusionConditionalResidualBlock1d(use_film_scale_modulation={predicted})"
    parity("diffusion_policy_film", "lerobot", what, got, block(x, c), x=x, c=c)


def test_t5_film_is_diffusers_t5_film_layer_behind_a_norm(parity, peer):
    film = peer("diffusers.models.transformers.t5_film_transformer").T5FiLMLayer(32, 8).double()
    ours = create("t5_film", features=8, condition_dim=32).double()
    ours.proj.load_state_dict(film.scale_bias.state_dict())
    x, c = torch.randn(2, 6, 8).double(), torch.randn(2, 32).double()
    theirs = film(ours.norm(x), c[:, None])
    parity("t5_film", "diffusers", "T5FiLMLayer", ours(x, c), theirs, x=x, c=c)


def test_t5_film_is_the_front_of_diffusers_conditional_feed_forward(parity, peer):
    transformer = peer("diffusers.models.transformers.t5_film_transformer")
    layer = transformer.T5LayerFFCond(8, 16, dropout_rate=0.0, layer_norm_epsilon=1e-6).double()
    with torch.no_grad():
        layer.layer_norm.weight.normal_()
    ours = create("t5_film", features=8, condition_dim=32).double()
    ours.proj.load_state_dict(layer.film.scale_bias.state_dict())
    ours.norm.load_state_dict(layer.layer_norm.state_dict())
    x, c = torch.randn(2, 6, 8).double(), torch.randn(2, 32).double()
    got = x + layer.DenseReluDense(ours(x, c))
    # T5LayerNorm takes the mean square in float32, also of float64
    theirs = layer(x, c[:, None])
    parity("t5_film", "diffusers", "T5LayerFFCond", got, theirs, tolerance=1e-6, x=x, c=c)


@pytest.mark.parametrize("relations", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gnn_film_gives_the_messages_of_torch_geometric(parity, peer, activation, relations):
    act = {"relu": torch.nn.ReLU(), "none": None}[activation]
    conv = peer("torch_geometric.nn").FiLMConv(5, 8, num_relations=relations, act=act).double()
    nodes = torch.randn(7, 5).double()
    source, target = torch.randint(7, (2, 20))
    kind = torch.randint(relations, (20,))

    def ours(film):
        made = create(f"gnn_film(activation='{activation}')", features=8, condition_dim=5).double()
        with torch.no_grad():
            made.proj.bias.zero_()  # that of the nodes themselves has none
        made.proj.load_state_dict(film.state_dict(), strict=film.bias is not None)
        return made

    got = ours(conv.film_skip)(conv.lin_skip(nodes), nodes)
    for number, (lin, film) in enumerate(zip(conv.lins, conv.films, strict=True)):
        chosen = kind == number
        index = target[chosen]
        messages = lin(nodes)[source[chosen]][None]
        modulated = ours(film)(messages, Signal(nodes[None], index=index[None]))[0]
        arriving = torch.bincount(index, minlength=7).clamp(min=1)[:, None]
        got = got + torch.zeros(7, 8).double().index_add(0, index, modulated) / arriving
    theirs = conv(nodes, torch.stack([source, target]), kind if relations > 1 else None)
    what = f"FiLMConv(num_relations={relations}, act={act})"
    parity("gnn_film", "torch-geometric", what, got, theirs, nodes=nodes, edges=source)


def test_rt1_film_is_that_of_lucidrains_behind_its_hidden_layer(parity, peer):
    module = peer("classifier_free_guidance_pytorch.classifier_free_guidance_pytorch")
    film = module.FiLM(5, 8).double()
    ours = create("rt1_film", features=8, condition_dim=32).double()
    assert all(not p.any() for p in (*film.net[2].parameters(), *ours.parameters()))
    for parameter in film.net[2].parameters():
        torch.nn.init.normal_(parameter)
    ours.proj.load_state_dict(film.net[2].state_dict())
    x, c = torch.randn(2, 6, 8).double(), torch.randn(2, 5).double()
    got = ours(x, film.net[:2](c))
    peer_name = "classifier-free-guidance-pytorch"
    parity("rt1_film", peer_name, "FiLM", got, film(c, x), x=x, c=c)
