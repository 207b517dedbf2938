"""What adaLN-Zero and AdaGN do at the start, and what they refuse."""

import pytest
import torch

from condmod import ConditionError, SiteError, create


def test_adaln_zero_starts_as_the_identity_of_the_block():
    ours = create("adaln_zero(parts=1)", features=16, condition_dim=8)
    x = torch.randn(2, 5, 16)
    assert torch.equal(ours(x, torch.randn(2, 8), torch.sin), x)


def test_adaln_zero_gives_a_gradient_to_the_gates_alone_at_first():
    ours = create("adaln_zero(parts=1)", features=4, condition_dim=8)
    ours(torch.randn(2, 5, 4), torch.randn(2, 8), torch.sin).square().sum().backward()
    shift, scale, gate = ours.proj.weight.grad.chunk(3)
    assert not shift.any()
    assert not scale.any()
    assert gate.any()


def test_the_number_of_sublayers_is_checked():
    ours = create("adaln_zero", features=4, condition_dim=8, name="blocks.3")
    with pytest.raises(ConditionError) as caught:
        ours(torch.randn(2, 5, 4), torch.randn(2, 8), torch.sin)
    assert str(caught.value) == (
        "adaln_zero at 'blocks.3' serves 2 sublayer(s) at once (option `parts`); "
        "forward(x, condition, *sublayers) got 1"
    )


def test_a_sublayer_that_changes_the_width_is_refused():
    ours = create("adaln_zero(parts=1)", features=4, condition_dim=8, name="blocks.3")
    with pytest.raises(ValueError, match=r"turned features \(2, 5, 4\) into \(2, 5, 8\) in adaln"):
        ours(torch.randn(2, 5, 4), torch.randn(2, 8), torch.nn.Linear(4, 8))


def test_groups_that_do_not_divide_the_features_are_refused():
    with pytest.raises(SiteError) as caught:
        create("ada_group_norm(groups=4)", features=6, condition_dim=8, name="blocks.3")
    assert str(caught.value) == (
        "ada_group_norm at 'blocks.3': groups=4 does not divide features=6; "
        "choose groups from [1, 2, 3, 6]"
    )


@pytest.mark.parametrize("shape", [(2, 16, 5, 6), (2, 16, 3, 5, 6)])
def test_channels_last_memory_trains_without_a_gradient_for_the_features(shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    ours = create("ada_group_norm(groups=4)", features=16, condition_dim=8, channel_dim=1)
    for _ in range(50):
        x = torch.randn(shape).contiguous(memory_format=layout)
        ours(x, torch.randn(2, 8)).square().mean().backward()
    assert ours.norm.weight.grad.isfinite().all()
