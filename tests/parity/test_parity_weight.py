"""What modulates weights equals the packages that people use, under equal weights."""

import pytest
import torch
from torch import nn

from condmod import create


@pytest.mark.parametrize("kernel", [1, 3])
def test_conditional_conv_is_timm_s_cond_conv(parity, timm_layers, kernel):
    cond_conv = timm_layers("cond_conv2d").CondConv2d
    theirs = cond_conv(6, 6, kernel, padding=kernel // 2, num_experts=5)
    routing = nn.Linear(4, 5).double()
    ours = create(
        f"conditional_conv(experts=5, kernel={kernel})",
        features=6,
        condition_dim=4,
        channel_dim=1,
    ).double()
    ours.proj.load_state_dict(routing.state_dict())
    theirs = theirs.double()
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))
    x, c = torch.randn(3, 6, 5, 7).double(), torch.randn(3, 4).double()
    outputs = ours(x, c), theirs(x, torch.sigmoid(routing(c)))
    parity("conditional_conv", "timm", f"CondConv2d(kernel_size={kernel})", *outputs, x=x, c=c)


def test_conditional_low_rank_at_equal_weights_is_peft_s_lora(parity, peer):
    config = peer("peft").LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = peer("peft").get_peft_model(nn.Sequential(nn.Linear(6, 8)), config).double()
    lora = model.base_model.model[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    place = {"features": 6, "condition_dim": 4, "out_features": 8}
    ours = create("conditional_low_rank(rank=3, alpha=6.0)", **place).double()
    ours.down.load_state_dict(lora.lora_A["default"].state_dict())
    ours.up.load_state_dict(lora.lora_B["default"].state_dict())
    nn.init.zeros_(ours.proj.weight)
    x, c = torch.randn(2, 5, 6).double(), torch.randn(2, 4).double()
    outputs = ours(x, c, lora.base_layer), model(x)
    parity("conditional_low_rank", "peft", "LoRA on a Linear", *outputs, x=x, c=c)


def test_hypernetwork_starts_each_sample_with_peft_s_lora(parity, peer):
    config = peer("peft").LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = peer("peft").get_peft_model(nn.Sequential(nn.Linear(6, 8)), config).double()
    lora = model.base_model.model[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    place = {"features": 6, "condition_dim": 4, "out_features": 8}
    ours = create("hypernetwork(rank=3, alpha=6.0)", **place).double()
    factors = lora.lora_A["default"].weight, lora.lora_B["default"].weight.T
    with torch.no_grad():
        ours.proj.bias.copy_(torch.cat([factor.flatten() for factor in factors]))
    x, c = torch.randn(2, 5, 6).double(), torch.randn(2, 4).double()
    outputs = ours(x, c, lora.base_layer), model(x)
    parity("hypernetwork", "peft", "LoRA on a Linear", *outputs, x=x, c=c)
