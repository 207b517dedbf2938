"""What an attachment costs in eager mode; prints rows, and JSON with --json.

A vision transformer whose norms FiLM steers: attached to it against written into it by hand, and
attached but switched off against the bare model. Both share every parameter and every kernel.

python benchmarks/attach.py
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import faster, interleaved, machine
from torch import Tensor, nn
from torch.nn import functional as F

import condmod

SHAPES = {  # [B, T, C] with the number of blocks; the work of a block does not depend on that
    (2, 16, 64): 4,
    (8, 64, 192): 4,
    (8, 197, 384): 2,
    (8, 197, 512): 1,
}
CONDITION = 256
ROUNDS = 50


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with FiLM behind the norms where there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attention(self, x: Tensor) -> Tensor:
        """Every position reads all of its sample."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Blocks in a row."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Features to features."""
        for block in self.blocks:
            x = block(x)
        return x


class ByHand(nn.Module):
    """The same model with the modulators written into its forward."""

    def __init__(self, model: Model, modulators: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.films = [
            tuple(modulators[f"blocks.{i}.norm{j}"] for j in (1, 2))
            for i in range(len(model.blocks))
        ]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features and condition to features."""
        for block, (one, two) in zip(self.model.blocks, self.films, strict=True):
            x = x + block.attention(one(block.norm1(x), condition))
            x = x + block.mlp(two(block.norm2(x), condition))
        return x


def variants(shape: tuple[int, int, int], depth: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, each a forward pass."""
    torch.manual_seed(0)
    bare = Model(shape[-1], depth)
    base = Model(shape[-1], depth)
    base.load_state_dict(bare.state_dict())
    attached = condmod.attach(base, {"blocks.*.norm*": "film"}, condition_dim=CONDITION)
    switched = Model(shape[-1], depth)
    switched.load_state_dict(bare.state_dict())
    off = condmod.attach(switched, {"blocks.*.norm*": "film"}, condition_dim=CONDITION)
    off.disable()
    plain = Model(shape[-1], depth)
    plain.load_state_dict(bare.state_dict())
    for model in (bare, plain):
        model.requires_grad_(False)
    by_hand = ByHand(plain, attached.bank.modulators())
    x, c = torch.randn(shape, requires_grad=True), torch.randn(shape[0], CONDITION)
    return {
        "by hand": lambda: by_hand(x, c),
        "attached": lambda: attached(x, condition=c),
        "bare": lambda: bare(x),
        "switched off": lambda: off(x),
    }


def run(model: Callable[[], Tensor], *, training: bool) -> None:
    """One pass."""
    if training:
        model().sum().backward()
    else:
        with torch.no_grad():
            model()


def rows(rounds: int) -> list[dict[str, Any]]:
    """Ratios of interleaved rounds, for every shape, in training and in inference."""
    found = []
    for shape, depth in SHAPES.items():
        passes = variants(shape, depth)
        torch.testing.assert_close(passes["attached"](), passes["by hand"]())
        for training in (True, False):
            repeat = max(1, round(2e6 / torch.Size(shape).numel() / shape[-1]))
            timed = {name: partial(run, way, training=training) for name, way in passes.items()}
            seconds = interleaved(timed, rounds, repeat=repeat)
            for one, other, goal in (
                ("attached", "by hand", 1.05),
                ("switched off", "bare", 1.02),
            ):
                found.append(
                    {
                        "shape": list(shape),
                        "mode": "training" if training else "inference",
                        "of": f"{one} / {other}",
                        **faster(seconds, other, one),
                        "ms": 1e3 * median(seconds[other]),
                        "goal": goal if shape[1] >= 197 or one == "switched off" else None,
                    }
                )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is run")
    arguments = parser.parse_args()
    found = rows(arguments.rounds)
    if arguments.json:
        print(json.dumps({**machine(), "rounds": arguments.rounds, "rows": found}, indent=2))
        return
    for row in found:
        goal = f"goal {row['goal']}" if row["goal"] else ""
        print(
            f"{row['shape']!s:<16} {row['mode']:<9} {row['of']:<20} {row['ratio']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]  of {row['ms']:.2f} ms  {goal}"
        )


if __name__ == "__main__":
    main()
