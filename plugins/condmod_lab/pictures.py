"""Pictures from disk: a folder per class, or a CSV file that says what each one shows.

A picture is what Pillow can read, by the end of its name: turned upright as its EXIF says, without
alpha (white shows through), cropped to a centred square and resized. Names are read in sorted
order, so that the same files give the same tensors.
"""

import csv
import difflib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from condmod_lab.data import listed
from condmod_lab.errors import DataError
from condmod_lab.sections import CsvConfig, FolderConfig

# Pillow hands these to another program (Ghostscript) or knows no more than their headers.
_NO_PICTURES: Final = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_JPEG_BY_ANOTHER_NAME: Final = "MPO"  # what phones write; the JPEG reader opens it
_BRIGHTEST_16: Final = 65_535


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that could be read, with their labels.

    Attributes:
        images: (B, C, S, S), from -1 (black) to 1 (white); C is 3 in colour and 1 in gray.
        labels: (B,), places in the classes.
        classes: every class, sorted, also one whose pictures were all left out.
        skipped: what was left out, each with its reason.
    """

    images: Float[Tensor, "B C S S"]
    labels: Int[Tensor, " B"]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A picture to read, what it shows, and what an error calls it."""

    path: Path
    text: str
    name: str


def read_folder(section: FolderConfig) -> Pictures:
    """Read the pictures of `path/<class>/`; the class is the name of its folder.

    Folders within a class's folder belong to that class; links to folders are not followed there,
    for they can lead in circles. Hidden files and folders are ignored, and so are files that are
    no pictures by the end of their names. Pictures beside the classes' folders are left out and
    told of.

    Args:
        section: the folder, and how to read its pictures.

    Raises:
        DataError: there is no such folder, it is arranged otherwise, or pictures are broken.
    """
    root = Path(section.path)
    if not os.path.isdir(root):  # where Path.is_dir raises for names that are too long
        what = "is a file" if os.path.exists(root) else "cannot be found"
        raise DataError(
            f"data.path {str(root)!r} {what}; name a folder that holds one folder per class"
            + (", or set data.name to csv" if root.suffix.lower() == ".csv" else "")
        )
    beside = _entries(root)
    folders = [entry for entry in beside if entry.is_dir()]
    flat = [entry.name for entry in beside if not entry.is_dir() and _is_picture(entry)]
    if not folders:
        raise DataError(
            f"every class is a folder of its own in data.path; got 0 folders and {len(flat)} "
            f"pictures in {str(root)!r}; arrange them as in {root / 'cat' / '1.png'} and "
            f"{root / 'dog' / '1.png'}"
        )
    entries = [
        _Entry(file, folder.name, str(file.relative_to(root)))
        for folder in folders
        for file in _files(folder)
    ]
    classes = tuple(folder.name for folder in folders)
    if not entries:
        raise DataError(
            f"the pictures of a class lie in its folder; got none in {listed(classes)} of "
            f"data.path {str(root)!r}; put files there such as 1.png or 1.jpg"
        )
    aside = tuple(f"{name} (lies in no class's folder)" for name in flat)
    return _read_all(entries, classes, section, aside)


def read_csv(section: CsvConfig) -> Pictures:
    """Read the pictures that a CSV file names; each distinct text is a class.

    The file is UTF-8, separated by commas, with a header, as the metadata.csv of Hugging Face's
    imagefolder. Paths are relative to its folder. Spaces around a text do not count.

    Args:
        section: the file, its columns, and how to read its pictures.

    Raises:
        DataError: the file is missing or malformed, or pictures are missing or broken.
    """
    file = Path(section.path)
    lines = _lines(_text(file), file)
    _, header = next(lines, (0, []))
    header = [column.strip() for column in header]
    if not header:
        raise DataError(
            "a CSV file begins with a header such as "
            f"{section.image_column},{section.text_column}; got nothing in {str(file)!r}"
        )
    image_place = _place(section.image_column, header, "data.image_column", file)
    text_place = _place(section.text_column, header, "data.text_column", file)
    entries = []
    for number, fields in lines:
        _check_fields(fields, header, (image_place, text_place), f"line {number} of {str(file)!r}")
        path = file.parent / fields[image_place]
        entries.append(_Entry(path, fields[text_place].strip(), f"line {number}: {path}"))
    if not entries:
        raise DataError(
            f"each line after the header names a picture and its text; got no line in "
            f"{str(file)!r}; add one per picture"
        )
    classes = tuple(sorted({entry.text for entry in entries}))
    return _read_all(entries, classes, section)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for what is hidden."""
    try:
        found = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"the folders of data.path must be readable; got {error.strerror!r} for "
            f"{str(folder)!r}; change its permissions or move it away"
        ) from None
    return [entry for entry in found if not entry.name.startswith(".")]


def _files(folder: Path) -> Iterator[Path]:
    """Every picture of a class."""
    for entry in _entries(folder):
        if not entry.is_dir():
            if _is_picture(entry):
                yield entry
        elif not entry.is_symlink():
            yield from _files(entry)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _extensions()


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NO_PICTURES)


@cache
def _extensions() -> frozenset[str]:
    readable = {*_formats(), _JPEG_BY_ANOTHER_NAME}
    return frozenset(end for end, name in Image.registered_extensions().items() if name in readable)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"a CSV file is UTF-8; got other bytes in line {line} of {str(file)!r}; "
            "save it again as UTF-8"
        ) from None
    except IsADirectoryError:
        raise DataError(
            f"data.path {str(file)!r} is a folder; name a CSV file, or set data.name to folder"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot read data.path {str(file)!r}: {error.strerror}; name a CSV file"
        ) from None


def _lines(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, each with the number that an editor shows where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"line {number} of {str(file)!r} is no line of a CSV file: {error}; "
                "close its double quotes, and write those within a text twice"
            ) from None
        if fields is None:
            return
        if fields:
            yield number, fields


def _place(column: str, header: list[str], field: str, file: Path) -> int:
    """Where a column stands in the header."""
    if column in header:
        return header.index(column)
    close = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
    mend = f"did you mean {close[0]!r}?" if close else f"set {field} to one of them"
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        mend = "separate the columns by commas"
    raise DataError(
        f"{field} is a column of {str(file)!r}; got {column!r}, and its header holds "
        f"{listed([repr(name) for name in header])}; {mend}"
    )


def _check_fields(
    fields: list[str], header: list[str], needed: tuple[int, ...], where: str
) -> None:
    if len(fields) != len(header):
        raise DataError(
            f"a line has as many fields as the header, {len(header)}; got {len(fields)} in "
            f"{where}; put a text that holds commas into double quotes"
        )
    for place in needed:
        if not fields[place].strip():
            raise DataError(
                f"a line names a picture and its text; got an empty {header[place]!r} in {where}; "
                "fill it in or remove the line"
            )


def _read_all(
    entries: Sequence[_Entry],
    classes: tuple[str, ...],
    section: FolderConfig | CsvConfig,
    aside: tuple[str, ...] = (),
) -> Pictures:
    images, texts, broken = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as corrupt EXIF: the picture itself can be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for entry in entries:
            try:
                images.append(_read(entry.path, section.size, color=section.color))
            except Exception as error:  # noqa: BLE001  broken files make decoders raise anything
                broken.append(f"{entry.name} ({_reason(error)})")
            else:
                texts.append(entry.text)
    if broken and (not images or not section.skip_broken):
        raise DataError(_complain(broken, len(entries), section))
    places = {name: place for place, name in enumerate(classes)}
    labels = torch.tensor([places[text] for text in texts])
    return Pictures(torch.stack(images), labels, classes, (*aside, *broken))


def _complain(broken: Sequence[str], count: int, section: FolderConfig | CsvConfig) -> str:
    if len(broken) == count:
        return (
            f"none of the {count} pictures of data.path {section.path!r} can be read: "
            f"{listed(broken)}; replace them"
        )
    return (
        f"{len(broken)} of the {count} pictures of data.path {section.path!r} cannot be read: "
        f"{listed(broken)}; replace them, or set data.skip_broken to true to leave them out"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _read(path: Path, size: int, *, color: bool) -> Float[Tensor, "C S S"]:
    """One picture, from -1 to 1."""
    with Image.open(path, formats=_formats()) as image:
        opaque = _opaque(_eight_bits(ImageOps.exif_transpose(image)))
    square = ImageOps.fit(opaque.convert("RGB" if color else "L"), (size, size))
    pixels = torch.from_numpy(numpy.array(square)).view(size, size, -1).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip 16-bit pictures to white, where they are to be scaled."""
    if image.mode == "F":
        raise ValueError("its values are floating-point, and none of them is known to be white")
    if not image.mode.startswith("I"):
        return image
    values = numpy.array(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > _BRIGHTEST_16:
        raise ValueError("its values have more than 16 bits")
    return Image.fromarray((values >> 8).astype(numpy.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """The picture on white paper, where it has transparent parts."""
    if not image.has_transparency_data:
        return image
    ours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", ours.size, "white"), ours)
