"""Captions of digits, such as "a bold slanted five", and which of them are held out.

A caption may say of a digit its look: which digit it is, how it leans, how heavy its strokes are.
Three things are held out of training: two looks of every digit, with all their pictures; names of
four digits; and words and sentences that no caption of training has.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

SLANTS: Final = ("left", "upright", "right")
WEIGHTS: Final = ("thin", "medium", "bold")
NAMES: Final = tuple(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        "0123456789",
        strict=True,
    )
)
NEW_NAMES: Final = {2: "2", 3: "three", 6: "6", 7: "seven"}
"""In training these digits are always called by their other name."""
GROUPS: Final = ("new words", "new names", "new looks", "all of it new")


class Look(NamedTuple):
    """What a caption can say; slant and weight are places in SLANTS and WEIGHTS."""

    digit: int
    slant: int
    weight: int


class Words(NamedTuple):
    """Words for one slant or weight: those before the name of the digit, those behind it."""

    before: tuple[str, ...]
    behind: tuple[str, ...]


class Language(NamedTuple):
    """Words for every slant and weight, and the sentences that they stand in."""

    slants: tuple[Words, ...]
    weights: tuple[Words, ...]
    sentences: tuple[str, ...]


NO_WORDS: Final = Words((), ())  # who says nothing of the weight may mean a medium one
TRAINED: Final = Language(
    slants=(
        Words(
            ("left-leaning", "backward-slanting", "left-tilted"),
            ("leaning left", "tilted to the left", "falling backwards"),
        ),
        Words(
            ("upright", "straight", "unslanted"),
            ("standing upright", "perfectly straight", "held straight up"),
        ),
        Words(
            ("slanted", "right-leaning", "italic"),
            ("leaning right", "tilted to the right", "falling forwards"),
        ),
    ),
    weights=(
        Words(
            ("thin", "light", "slim"), ("in thin strokes", "drawn lightly", "with a fine pencil")
        ),
        NO_WORDS,
        Words(("bold", "thick", "heavy"), ("in bold strokes", "drawn heavily", "with a thick pen")),
    ),
    sentences=(
        "a {before} {name}",
        "{before} {name}",
        "a {name}, {behind}",
        "the digit {name} {behind}",
    ),
)
NEW: Final = Language(
    slants=(
        Words(("left-sloping", "backward-inclined"), ("inclined to the left", "sloping backwards")),
        Words(("vertical", "erect"), ("standing vertically", "perpendicular to the line")),
        Words(("right-sloping", "forward-inclined"), ("inclined to the right", "sloping forwards")),
    ),
    weights=(
        Words(("skinny", "slender", "delicate"), ("with a narrow nib", "in delicate lines")),
        NO_WORDS,
        Words(("fat", "chunky", "dark"), ("with a broad marker", "in fat lines")),
    ),
    sentences=(
        "please draw a {before} {name}",
        "handwritten {name} {behind}",
        "I would like to see a {before} number {name}",
        "show me the numeral {name}, {behind}",
    ),
)


def held_out_looks(digit: int) -> tuple[Look, ...]:
    """Two of a digit's six looks with words for the weight; every one is seen of other digits."""
    return tuple(Look(digit, *_SAID[(digit + place) % 6]) for place in (0, 4))


def seen_looks(digit: int) -> tuple[Look, ...]:
    """The other four."""
    return tuple(Look(digit, *_SAID[(digit + place) % 6]) for place in (1, 2, 3, 5))


_SAID: Final = tuple((slant, weight) for weight in (0, 2) for slant in range(3))


def write(
    look: Look,
    draws: random.Random,
    language: Language = TRAINED,
    *,
    new_name: bool = False,
    mention: float = 1.0,
) -> str:
    """One caption of a look.

    Args:
        look: what it is of.
        draws: chooses names, words and sentence.
        language: what words and sentence are chosen from.
        new_name: call the digit by its held-out name, if it has one.
        mention: the probability that the caption says the slant, and that it says the weight.
    """
    held_out = NEW_NAMES.get(look.digit)
    names = [name for name in NAMES[look.digit] if name != held_out]
    words = [language.slants[look.slant], language.weights[look.weight]]
    words = [each for each in words if each.before and draws.random() < mention]
    draws.shuffle(words)
    sentence = draws.choice(language.sentences).format(
        name=held_out if new_name and held_out else draws.choice(names),
        before=" ".join(draws.choice(each.before) for each in words),
        behind=" and ".join(draws.choice(each.behind) for each in words),
    )
    sentence = " ".join(sentence.split()).rstrip(",")
    return re.sub(r"\ba (?=[aeiou8])(?!a one)", "an ", sentence)


def held_out_captions(count: int) -> list[tuple[str, Look, str]]:
    """Captions to test with, each with its group and its look; always the same ones.

    The groups in turn, and in each the digits in turn.
    """
    draws = random.Random(0)  # noqa: S311  draws sentences, keeps no secret
    captions = []
    for place in range(count):
        turn, group = place // len(GROUPS), GROUPS[place % len(GROUPS)]
        digits = tuple(NEW_NAMES) if group == "new names" else range(len(NAMES))
        digit = digits[turn % len(digits)]
        new = {
            kind: group in (f"new {kind}", "all of it new") for kind in ("words", "names", "looks")
        }
        look = draws.choice(held_out_looks(digit) if new["looks"] else seen_looks(digit))
        language = NEW if new["words"] else TRAINED
        captions.append((group, look, write(look, draws, language, new_name=new["names"])))
    return captions
