"""Two frozen models joined by FiLM: MiniLM reads a caption, a generator of digits draws it.

python examples/text_to_digit/run.py
python examples/text_to_digit/run.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captions import GROUPS, Look, held_out_captions, held_out_looks, write
from generator import GUIDANCE, DigitFlow, Reader, drawn, fit, noise_of, steered
from looks import Thirds
from pictures import draw_numbers, draw_rows
from torch import Tensor, nn

import condmod
from condmod_lab.data import Images, load_digits
from condmod_lab.flow import Velocity
from condmod_lab.metrics import Judge
from condmod_lab.writing import save_json, save_tensors

PATTERNS = {"blocks.*.norm*": "film"}
ENCODER = (
    "fuse(inputs={'time': timestep(dim=64, scale=1000.0, hidden=[128]), "
    "'text': vector(features=384, nullable=True)}, hidden=[128])"
)
WIDTH = 128
BASE_RATE, TEXT_RATE = 3e-3, 4e-3
GUIDANCES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)
MENTION = 0.8
SHOWN = 10
SAID = ("a left-leaning five", "an upright five", "a slanted five", "a thin five", "a bold five")


class Texts(NamedTuple):
    """Captions as a reader's vectors, and which of them go where, by number."""

    vectors: Tensor  # (captions, 384)
    training: Tensor  # (pictures, K), those of each training picture
    test: Tensor  # (B,), held out
    said: Tensor  # those of the figure


def seen(real: Images, thirds: Thirds) -> tuple[Images, list[Look]]:
    """The training pictures whose looks are not held out, and their looks."""
    looks = thirds.looks(real)
    kept = [place for place, look in enumerate(looks) if look not in held_out_looks(look.digit)]
    return Images(real.images[kept], real.labels[kept]), [looks[place] for place in kept]


def embed(reader: Reader, training: list[list[str]], test: list[str]) -> Texts:
    """Read every caption once."""
    distinct = {caption for row in training for caption in row} | {*test, *SAID}
    captions = sorted(distinct, key=lambda caption: (len(caption), caption))  # little padding
    number = {caption: place for place, caption in enumerate(captions)}
    return Texts(
        reader(captions),
        torch.tensor([[number[caption] for caption in row] for row in training]),
        torch.tensor([number[caption] for caption in test]),
        torch.tensor([number[caption] for caption in SAID]),
    )


def pretrained(pictures: Images, *, steps: int, seed: int) -> DigitFlow:
    """A generator that has never seen a caption."""
    torch.manual_seed(seed)
    net = DigitFlow()
    no_captions = torch.zeros(len(pictures), 1, dtype=torch.long)
    fit(
        net,
        lambda x, t, _captions, _present: net(x, t),
        pictures.images,
        no_captions,
        steps=steps,
        rate=BASE_RATE,
        seed=seed,
    )
    return net


def attached(
    net: DigitFlow, texts: Texts, pictures: Images, *, steps: int, seed: int
) -> condmod.Conditioned:
    """The generator, frozen, with FiLM on its norms, which alone is trained."""
    torch.manual_seed(seed)
    conditioned = condmod.attach(net, PATTERNS, encoder=ENCODER, condition_dim=WIDTH)
    fit(
        conditioned,
        steered(conditioned, texts.vectors),
        pictures.images,
        texts.training,
        steps=steps,
        rate=TEXT_RATE,
        seed=seed,
    )
    return conditioned


class Examiner:
    """Tells how many pictures have the digit, the slant and the weight that were asked for.

    Args:
        judge: reads digits, and compares pictures with real ones.
        thirds: tells slants and weights.
        asked: the group and the look of every held-out caption.
    """

    def __init__(self, judge: Judge, thirds: Thirds, asked: list[tuple[str, Look]]) -> None:
        self.judge, self.thirds = judge, thirds
        groups, looks = zip(*asked, strict=True)
        self.rows = {"all": torch.ones(len(looks), dtype=torch.bool)} | {
            group: torch.tensor([each == group for each in groups]) for group in GROUPS
        }
        self.looks = torch.tensor(looks)
        self.shuffle = torch.randperm(len(looks), generator=torch.Generator().manual_seed(0))

    def shares(self, images: Tensor, digits: Tensor) -> dict[str, dict[str, float]]:
        """Shares by group; slant and weight are measured among real `digits` (B,)."""
        thirds = self.thirds.of(Images(images, digits))
        found = torch.column_stack((self.judge.read(images), thirds))
        right = (found == self.looks).double()
        return {
            group: dict(zip(Look._fields, right[rows].mean(0).tolist(), strict=True))
            for group, rows in self.rows.items()
        }

    def examine(self, flow: Velocity, captions: Tensor, *, seed: int) -> dict[str, Any]:
        """Pictures drawn by their own captions, and by captions that belong to others."""
        digits, others = self.looks[:, 0], self.shuffle
        noise = noise_of(len(digits), seed)
        own = drawn(flow, captions, noise)
        shuffled = drawn(flow, captions[others], noise)
        return {
            "own": self.shares(own, digits),
            "shuffled": self.shares(shuffled, digits[others])["all"],
            "quality": self.judge.measure(own, digits),
        }

    def sweep(self, flow: Velocity, captions: Tensor, *, seed: int) -> list[dict[str, float]]:
        """The share of digits read right at every guidance, by own and by shuffled captions."""
        noise = noise_of(len(captions), seed)

        def share(given: Tensor, guidance: float) -> float:
            images = drawn(flow, given, noise, guidance)
            return float((self.judge.read(images) == self.looks[:, 0]).double().mean())

        return [
            {
                "guidance": guidance,
                "own": share(captions, guidance),
                "shuffled": share(captions[self.shuffle], guidance),
            }
            for guidance in GUIDANCES
        ]


def keep(conditioned: condmod.Conditioned, folder: Path) -> int:
    """Save the generator and the adapter for sample.py; gives the adapter's size in bytes."""
    save_tensors(folder / "generator.safetensors", conditioned.base.state_dict())
    conditioned.save_pretrained(folder / "text")
    return sum(file.stat().st_size for file in (folder / "text").iterdir())


def show(
    flow: Velocity,
    texts: Texts,
    held_out: list[tuple[str, Look, str]],
    folder: Path,
    *,
    seed: int,
) -> None:
    """Draw held-out captions of every group, and one digit said in several ways."""
    chosen = [
        len(GROUPS) * (first + turn) + first for first in range(len(GROUPS)) for turn in (0, 3, 6)
    ]
    new = {f"{held_out[place][0]}: {held_out[place][2]}": texts.test[place] for place in chosen}
    said = dict(zip(SAID, texts.said, strict=True))
    for name, captions, title in (
        ("samples", new, "captions that were held out, and what they drew"),
        ("said", said, "the same noise in every column"),
    ):
        noise = noise_of(SHOWN, seed).repeat(len(captions), 1, 1, 1)
        numbers = torch.stack(list(captions.values())).repeat_interleave(SHOWN)
        images = drawn(flow, numbers, noise).split(SHOWN)
        draw_rows(folder / f"{name}.png", dict(zip(captions, images, strict=True)), title)


def table(seeds: Mapping[int, Any]) -> str:
    """What was asked for and is there, by seed, reader and group of captions."""
    lines = [f"{'seed':4}  {'MiniLM':10}  {'captions':14}  digit  slant  weight"]
    for seed, readers in seeds.items():
        for reader, found in readers.items():
            for group, shares in {**found["own"], "shuffled": found["shuffled"]}.items():
                values = "  ".join(f"{value:5.3f}" for value in shares.values())
                lines.append(f"{seed:4}  {reader:10}  {group:14}  {values}")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Every float with four decimals."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def count(net: nn.Module) -> int:
    """The number of parameters."""
    return sum(weight.numel() for weight in net.parameters())


def main() -> None:
    """Train, draw, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500, help="of each training")
    parser.add_argument("--phrasings", type=int, default=8, help="captions of a training picture")
    parser.add_argument("--captions", type=int, default=1200, help="held-out captions to test with")
    parser.add_argument("--output", type=Path, default=Path("runs/text_to_digit"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)

    split = load_digits()
    thirds = Thirds(split.train)
    pictures, looks = seen(split.train, thirds)
    draws = random.Random(0)  # noqa: S311  draws captions, keeps no secret
    training = [
        [write(look, draws, mention=MENTION) for _ in range(arguments.phrasings)] for look in looks
    ]
    held_out = held_out_captions(arguments.captions)
    test = [caption for _, _, caption in held_out]
    examiner = Examiner(Judge(split), thirds, [(group, look) for group, look, _ in held_out])
    readers = {"pretrained": Reader(), "random": Reader(pretrained=False)}
    texts = {name: embed(reader, training, test) for name, reader in readers.items()}

    results: dict[str, Any] = {
        "torch": torch.__version__,
        "steps": arguments.steps,
        "guidance": GUIDANCE,
        "pictures": {"training": len(split.train), "seen": len(pictures)},
        "captions": {
            "training": len({caption for row in training for caption in row}),
            "test": len(test),
        },
        "seeds": {},
    }
    for seed in arguments.seeds:
        generator = pretrained(pictures, steps=arguments.steps, seed=seed)
        print(f"seed {seed}: {time.perf_counter() - start:4.0f} s, the generator draws", flush=True)
        found = results["seeds"][seed] = {}
        for name, each in texts.items():
            conditioned = attached(generator, each, pictures, steps=arguments.steps, seed=seed)
            flow = steered(conditioned, each.vectors)
            found[name] = examiner.examine(flow, each.test, seed=seed)
            if (seed, name) == (arguments.seeds[0], "pretrained"):
                results["sweep"] = examiner.sweep(flow, each.test, seed=seed)
                results["parameters"] = {
                    "MiniLM": count(readers[name].model),
                    "generator": count(conditioned.base),
                    "adapter": count(conditioned.bank),
                }
                results["adapter_bytes"] = keep(conditioned, arguments.output)
                show(flow, each, held_out, arguments.output, seed=seed)
            conditioned.detach()  # which leaves the generator as it was
            print(f"seed {seed}: {time.perf_counter() - start:4.0f} s, {name} MiniLM", flush=True)
    results["seconds"] = time.perf_counter() - start
    save_json(arguments.output / "results.json", rounded(results))
    draw_numbers(arguments.output / "numbers.png", results)
    print(table(results["seeds"]))
    print(f"{results['seconds']:.0f} s; figures and weights lie in {arguments.output}")


if __name__ == "__main__":
    main()
