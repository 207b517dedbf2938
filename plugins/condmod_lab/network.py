"""The network of a run: encoder and body, every place of which is filled from a spec."""

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from condmod import Condition, CondmodError, Signal, SiteError, create_encoder
from condmod_lab.config import TrainConfig
from condmod_lab.conv import ConvBody
from condmod_lab.places import own_draws, takes_signals
from condmod_lab.sections import TransformerConfig
from condmod_lab.transformer import TransformerBody


class Network(nn.Module):
    """Velocity of the flow, from time and class.

    The encoder turns {'time': t, 'label': class} into one condition (B, D). From it the body's
    bank generates the modulations of all places at once, and each block applies its own.
    Modulators that take raw signals are given that mapping itself, and there is no encoder.

    Under equal seeds, whatever two networks have in common beside their modulators starts equal.

    Args:
        config: the backbone, and the specs of encoder and modulators.
        classes: number of classes of the data.
        shape: of one image, (C, H, W).

    Attributes:
        encoder: None where the modulators take the signals themselves.
        body: the backbone that the config names.

    Raises:
        SiteError: the modulator does not fit a place; says which and why.
        ConfigError: the backbone does not fit the images.
    """

    def __init__(self, config: TrainConfig, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        section, spec = config.backbone, config.modulator
        self.encoder: nn.Module | None = None
        if not takes_signals(spec):
            encoder = config.resolve(classes).encoder
            assert encoder is not None
            with own_draws("encoder"):
                self.encoder = create_encoder(encoder, out_dim=section.condition_dim)
        self.body: TransformerBody | ConvBody = (
            TransformerBody(spec, section, shape)
            if isinstance(section, TransformerConfig)
            else ConvBody(spec, section, shape[0])
        )

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        labels: Int[Tensor, " B"],
        present: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B C H W"]:
        """Velocity at x, of x's shape.

        Args:
            x: (B, C, H, W), a point between noise (t = 0) and data (t = 1).
            t: (B,), from 0 to 1.
            labels: (B,), the class of each sample.
            present: (B,), False where a sample has no label, whatever `labels` says.
        """
        return cast(Tensor, self.body(x, self.condition(t, labels, present)))

    def condition(self, t: Tensor, labels: Tensor, present: Tensor) -> Condition:
        """What every place is given: the embedding (B, D), or the signals by their names."""
        signals = signals_of(t, labels, present)
        return signals if self.encoder is None else cast(Condition, self.encoder(signals))


def signals_of(t: Tensor, labels: Tensor, present: Tensor) -> Condition:
    """Time and class by the names that encoders know them by."""
    return {"time": t, "label": Signal(labels, present=present)}


def build(config: TrainConfig, classes: int, shape: tuple[int, int, int]) -> Network:
    """Build the network in eval mode and try it on one batch, so that a misfit shows early.

    An encoder that nothing reads, as beside `none`, is frozen: distributed training would wait
    for its gradients.

    Args:
        config: the backbone, and the specs of encoder and modulators.
        classes: number of classes of the data.
        shape: of one image, (C, H, W).

    Raises:
        SiteError: an encoder or modulator does not fit; says which place and why.
        ConfigError: the backbone does not fit the images.
    """
    net = Network(config, classes, shape).eval()
    with torch.enable_grad():
        velocity = _try_out(net, config.resolve(classes), classes, shape)
        if net.encoder is not None and not _reads(velocity, net.encoder):
            net.encoder.requires_grad_(False)
    return net


def _try_out(
    net: Network, config: TrainConfig, classes: int, shape: tuple[int, int, int]
) -> Float[Tensor, "B C H W"]:
    """The velocity of the first and the last class, each once with its label and once without."""
    labels = torch.tensor([0, classes - 1] * 2)
    present = torch.tensor([True, True, False, False])
    signals = (
        "{'time': times (B,), 'label': classes (B,) "
        f"from 0 to {classes - 1}, some of them absent}}"
    )
    try:
        condition = net.condition(torch.linspace(0, 1, 4), labels, present)
    except CondmodError as error:
        raise SiteError(
            f"{config.encoder} does not fit the data: as the config's encoder it is given "
            f"{signals}: {error}"
        ) from None
    try:
        return cast(Tensor, net.body(torch.zeros(4, *shape), condition))
    except CondmodError as error:
        given, mend = f"what {config.encoder} makes of {signals}", ""
        if net.encoder is None:
            given, mend = signals, f"; what takes both is, for one, {_owning(classes)}"
        raise SiteError(
            f"{config.modulator} does not fit the places of the network: each gives it "
            f"{given}: {error}{mend}"
        ) from None


def _reads(velocity: Tensor, encoder: nn.Module) -> bool:
    """Whether any of the encoder's parameters has a part in the velocity."""
    weights = list(encoder.parameters())
    grads = torch.autograd.grad(velocity.sum(), weights, allow_unused=True) if weights else ()
    return any(grad is not None for grad in grads)


def _owning(classes: int) -> str:
    """A modulator that takes the signals themselves."""
    return (
        "multi_condition(encoder=fuse(inputs={'time': timestep(scale=1000.0), "
        f"'label': label(classes={classes}, nullable=True)}}))"
    )
