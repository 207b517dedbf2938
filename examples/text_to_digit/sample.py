"""Draw digits by captions of your own, with what run.py has trained.

python examples/text_to_digit/sample.py "a bold slanted five" "a thin 2, leaning left"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from generator import GUIDANCE, DigitFlow, Reader, drawn, noise_of, steered
from pictures import draw_rows
from safetensors.torch import load_file

import condmod


def main() -> None:
    """Load both models and the adapter, draw, and write one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--run", type=Path, default=Path("runs/text_to_digit"))
    parser.add_argument("--count", type=int, default=10, help="digits of each caption")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()
    if not (arguments.run / "text").is_dir():
        sys.exit(
            f"{arguments.run} holds no trained adapter; make one, in some minutes: "
            "python examples/text_to_digit/run.py"
        )
    generator = DigitFlow().eval()
    generator.load_state_dict(load_file(arguments.run / "generator.safetensors"))
    conditioned = condmod.load_pretrained(generator, arguments.run / "text").eval()

    captions = list(dict.fromkeys(arguments.captions))
    numbers = torch.arange(len(captions)).repeat_interleave(arguments.count)
    flow = steered(conditioned, Reader()(captions))
    noise = noise_of(arguments.count, arguments.seed).repeat(len(captions), 1, 1, 1)
    images = drawn(flow, numbers, noise, arguments.guidance)
    rows = dict(zip(captions, images.split(arguments.count), strict=True))
    draw_rows(arguments.output, rows, f"guidance {arguments.guidance:g}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
