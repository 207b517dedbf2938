"""A digit reader that knows upright digits, and the ways of teaching it to read turned ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import condmod
from condmod_lab.data import Images, load_digits, split

WIDTH, DEPTH, HEADS, PATCH = 48, 3, 4, 2
TURNED: Final = 180.0
"""Adapted models read digits turned by up to so many degrees, either way: by any angle."""
SLIGHTLY: Final = 10.0
"""The base learns from digits that are turned by no more than that."""
ANGLES: Final = tuple(range(0, 360, 15))
BATCH: Final = 64
SHOWN: Final = (2, 5, 6, 8)


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """Tokens to tokens."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Float[Tensor, "B T C"]) -> Tensor:
        """Tokens to tokens."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Reader(nn.Module):
    """A small vision transformer over the 16 patches of a digit; it knows of no condition."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.randn(16, WIDTH) * 0.3)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Float[Tensor, "B 1 8 8"]) -> Tensor:
        """Images to the logits of the ten digits."""
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.blocks(self.embed(patches) + self.place)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@cache
def digits() -> tuple[Images, Images, Images]:
    """Real digits to learn from, to choose learning rates by, and to measure on."""
    whole = load_digits()
    part = split(whole.train.images, whole.train.labels, whole.classes)
    return part.train, part.held_out, whole.held_out


def turn(images: Float[Tensor, "B 1 H W"], angles: Float[Tensor, " B"]) -> Tensor:
    """Digits turned by angles in degrees, on paper (-1)."""
    sin, cos = angles.deg2rad().sin(), angles.deg2rad().cos()
    zero = torch.zeros_like(sin)
    map_back = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(map_back, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


Signal = Literal["patches", "angle"]


def told(angles: Float[Tensor, " B"], signal: Signal) -> Tensor:
    """What a model is told of the angles, in degrees.

    Args:
        angles: by which each digit is turned.
        signal: "angle" is its sine and cosine, (B, 2); "patches" tells every patch these and where
            in the upright digit it was, (B, 16, 4).
    """
    sin, cos = angles.deg2rad().sin()[:, None], angles.deg2rad().cos()[:, None]
    if signal == "angle":
        return torch.cat([sin, cos], dim=1)
    line = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # the middles of the patches
    y, x = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
    parts = (cos * x - sin * y, sin * x + cos * y, sin.expand(-1, 16), cos.expand(-1, 16))
    return torch.stack(parts, dim=2)


@dataclass(frozen=True)
class Method:
    """One way of teaching the base to read turned digits.

    Attributes:
        name: as in the table.
        attached: specs by pattern, as `condmod.attach` takes them; nothing else sees the angle.
        dim: width of the encoded angle.
        signal: what of the angle is told.
        rank: of low-rank adapters (LoRA) in every linear layer of the blocks; 0 for none.
        base_trains: whether the base's own weights train.
        shuffled: whether each digit is told the angle of another one, in training and in tests.
        undone: whether digits are turned back before they are read.
    """

    name: str
    attached: Mapping[str, str] | None = None
    dim: int = 8
    signal: Signal = "patches"
    rank: int = 0
    base_trains: bool = False
    shuffled: bool = False
    undone: bool = False

    @property
    def family(self) -> str:
        """Those that share a learning rate: by what trains."""
        if self.base_trains:
            return "all weights"
        parts = ["LoRA"] * (self.rank > 0) + ["attached"] * (self.attached is not None)
        return " and ".join(parts) or "nothing"

    @property
    def encoder(self) -> str:
        """The spec of what encodes the angle."""
        return f"vector(features={4 if self.signal == 'patches' else 2}, hidden=[32])"

    def plan(self, model: nn.Module) -> condmod.Plan:
        """What is attached where."""
        assert self.attached is not None
        example = torch.zeros(1, 1, 8, 8)  # shows the features of modules of our own, as Attention
        return condmod.plan(
            model, self.attached, encoder=self.encoder, condition_dim=self.dim, example=example
        )

    def prepare(self, base: Reader) -> nn.Module:
        """A copy of the base with what is to train."""
        model: nn.Module = copy.deepcopy(base).requires_grad_(self.base_trains)
        if self.rank:
            layers = ["qkv", "out", "mlp.0", "mlp.2"]
            config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=layers)
            model = get_peft_model(model, config)
        if self.attached is not None:
            others = self.base_trains or self.rank
            model = condmod.attach(model, self.plan(model), freeze="none" if others else "base")
        return model

    def heard(self, angles: Float[Tensor, " B"]) -> Tensor:
        """The angles that digits are said to be turned by."""
        return angles[torch.randperm(len(angles))] if self.shuffled else angles

    def read(self, model: nn.Module, images: Tensor, heard: Float[Tensor, " B"]) -> Tensor:
        """Logits of turned digits; of the model only what is attached is told the angles."""
        if self.attached is None:
            logits: Tensor = model(turn(images, -heard) if self.undone else images)
        else:
            logits = model(images, condition=told(heard, self.signal))
        return logits


FILM: Final = {"**.embed": "film", "**.norm*": "film"}
ADALN_ZERO: Final = {
    "**.embed": "film",
    "blocks.*.attention": "adaln_zero",
    "blocks.*.mlp": "adaln_zero",
}
AS_INPUT: Final = {"**.embed": "add"}  # to every patch, as further channels of the image would be

FULL: Final = Method("all weights", base_trains=True)
LORA: Final = Method("LoRA, rank 4", rank=4)
LORA_TOLD: Final = Method("LoRA, rank 4, told the angle", AS_INPUT, rank=4)
ATTACHED: Final = Method("FiLM attached", FILM)
METHODS: Final = (
    Method("frozen base"),
    Method("frozen base, digits turned back", undone=True),
    FULL,
    Method("all weights, told the angle", AS_INPUT, base_trains=True),
    LORA,
    LORA_TOLD,
    ATTACHED,
    Method("adaLN-Zero attached", ADALN_ZERO, dim=6),
    Method("LoRA, rank 2, and FiLM attached", FILM, dim=4, rank=2),
    Method("FiLM attached, told one angle per digit", FILM, signal="angle"),
    Method("FiLM attached, told another digit's angle", FILM, shuffled=True),
)
SIZES: Final = {
    "LoRA": tuple(Method(f"LoRA, rank {rank}", rank=rank) for rank in (1, 4, 8)),
    "LoRA, told the angle": tuple(
        Method(f"LoRA, rank {rank}, told the angle", AS_INPUT, rank=rank) for rank in (1, 4, 8)
    ),
    "FiLM attached": (
        Method("FiLM attached, D=2", FILM, dim=2),
        ATTACHED,
        Method("FiLM attached, D=16", FILM, dim=16),
    ),
}
"""More sizes of three of the methods, from few parameters to many."""


def fit(
    method: Method, model: nn.Module, *, most: float, rate: float, steps: int, seed: int
) -> None:
    """Train what requires a gradient; the same seed shows every method the same digits.

    Args:
        method: how the model is called.
        model: is trained in place.
        most: degrees by which digits are turned at most, either way.
        rate: the highest learning rate.
        steps: of 64 digits each.
        seed: decides which digits are seen, and how they are turned.
    """
    learn = digits()[0]
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(trained(model), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        places = torch.randint(len(learn), (BATCH,), generator=draws)
        angles = (2 * torch.rand(BATCH, generator=draws) - 1) * most
        turned = turn(learn.images[places], angles)
        logits = method.read(model, turned, method.heard(angles))
        F.cross_entropy(logits, learn.labels[places]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_base(seed: int, steps: int) -> Reader:
    """A reader of upright digits."""
    torch.manual_seed(seed)
    base = Reader()
    fit(Method("base"), base, most=SLIGHTLY, rate=3e-3, steps=steps, seed=seed)
    return base


def adapt(method: Method, base: Reader, *, rate: float, steps: int, seed: int) -> nn.Module:
    """A copy of the base that has learned to read turned digits."""
    torch.manual_seed(seed)
    model = method.prepare(base)
    if trained(model):
        fit(method, model, most=TURNED, rate=rate, steps=steps, seed=seed + 1000)
    return model.eval()


@torch.no_grad()
def readings(method: Method, model: nn.Module, images: Tensor) -> Int[Tensor, "A B"]:
    """What a model takes digits (B, 1, 8, 8) for, at each of ANGLES."""
    angles = torch.tensor(ANGLES, dtype=torch.float32)[:, None].expand(-1, len(images))
    heard = method.heard(angles.flatten()).view_as(angles)
    pairs = zip(angles, heard, strict=True)
    return torch.stack([method.read(model, turn(images, a), h).argmax(1) for a, h in pairs])


def score(method: Method, base: Reader, *, rate: float, steps: int) -> float:
    """The accuracy that a learning rate leads to, on the digits kept for choosing it."""
    model, choose = adapt(method, base, rate=rate, steps=steps, seed=0), digits()[1]
    return float((readings(method, model, choose.images) == choose.labels).float().mean())


def measure(
    method: Method, base: Reader, *, rate: float, steps: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Adapt the base, save what that takes, and measure on digits that nothing was fitted on."""
    model = adapt(method, base, rate=rate, steps=steps, seed=seed)
    parameters = sum(parameter.numel() for parameter in trained(model))
    save(method, model, folder)
    test = digits()[2]
    read = readings(method, model, test.images)
    right = (read == test.labels).float().mean(1)
    with torch.no_grad(), switched_off(model):
        kept = torch.equal(model(test.images), base(test.images))
    return {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "accuracy": float(right.mean()),
        "upright": float(right[0]),
        "by_angle": right.tolist(),
        "base_kept": kept,
        "shown": read[::2, shown(test)].T.tolist(),
    }


def save(method: Method, model: nn.Module, folder: Path) -> None:
    """Write what has to be kept beside the base."""
    model.requires_grad_(False)  # else save_pretrained warns of what trains in the base
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, condmod.Conditioned):
        model.save_pretrained(folder / "attached")
        model = model.base
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / "lora"), save_embedding_layers=False)
    if method.base_trains:
        save_file(model.state_dict(), folder / "model.safetensors")


def slug(method: Method) -> str:
    """A method's name as a folder's."""
    return re.sub(r"\W+", "-", method.name).lower()


def shown(images: Images) -> list[int]:
    """The places of the digits in the figure: the first of each of SHOWN."""
    return [images.labels.tolist().index(label) for label in SHOWN]


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A context in which what can be switched off is."""
    with ExitStack() as stack:
        if isinstance(model, condmod.Conditioned):
            stack.enter_context(model.disabled())
            model = model.base
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        yield
