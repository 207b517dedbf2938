"""AdaGN against the residual blocks and norms of other packages."""

import torch
from torch.nn.functional import silu

from condmod import create

DTYPE = torch.float64


def test_ada_group_norm_is_the_scale_shift_of_diffusers_residual_block(parity, peer):
    theirs = peer("diffusers.models.resnet").ResnetBlock2D(
        in_channels=16, temb_channels=8, groups=4, eps=1e-5, time_embedding_norm="scale_shift"
    )
    theirs.to(DTYPE)
    ours = create("ada_group_norm(groups=4)", features=16, condition_dim=8, channel_dim=1)
    ours.to(DTYPE).proj.load_state_dict(theirs.time_emb_proj.state_dict())
    torch.nn.init.normal_(theirs.norm2.weight)
    torch.nn.init.normal_(theirs.norm2.bias)
    ours.norm.load_state_dict(theirs.norm2.state_dict())
    x, c = torch.randn(2, 16, 5, 6, dtype=DTYPE), torch.randn(2, 8, dtype=DTYPE)
    h = ours(theirs.conv1(silu(theirs.norm1(x))), c)
    got = x + theirs.conv2(silu(h))
    parity("ada_group_norm", "diffusers", "ResnetBlock2D", got, theirs(x, c), x=x, c=c)


def test_ada_group_norm_is_diffusers_ada_group_norm_with_the_activation_of_adm(parity, peer):
    theirs = peer("diffusers.models.normalization").AdaGroupNorm(8, 16, num_groups=4, act_fn="silu")
    theirs.to(DTYPE)
    ours = create("ada_group_norm(groups=4)", features=16, condition_dim=8, channel_dim=1)
    ours.to(DTYPE).proj.load_state_dict(theirs.linear.state_dict())
    x, c = torch.randn(2, 16, 5, 6, dtype=DTYPE), torch.randn(2, 8, dtype=DTYPE)
    parity("ada_group_norm", "diffusers", "AdaGroupNorm", ours(x, c), theirs(x, c), x=x, c=c)
