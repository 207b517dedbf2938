"""Pictures are read as they look, always in the same order, and broken ones are all told of."""

import csv
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from condmod_lab.errors import DataError
from condmod_lab.pictures import Pictures, read_csv, read_folder
from condmod_lab.sections import CsvConfig, FolderConfig

Paint = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `pets`, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    Path("pets").mkdir()
    return Path("pets")


@pytest.fixture
def paint(root: Path) -> Paint:
    """Write a picture of one colour, or bytes that are none."""

    def write(name: str, content: Any = 0, mode: str = "L", size: tuple[int, int] = (8, 8)) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Image.Image):
            content.save(path)
        else:
            Image.new(mode, size, content).save(path)
        return path

    return write


def _folder(**options: Any) -> Pictures:
    return read_folder(FolderConfig(name="folder", path="pets", **{"size": 4, **options}))


def _csv(text: str | bytes, **options: Any) -> Pictures:
    raw = text if isinstance(text, bytes) else text.encode()
    Path("pets/data.csv").write_bytes(raw)
    return read_csv(CsvConfig(name="csv", path="pets/data.csv", **{"size": 4, **options}))


def _refusal(read: Callable[..., Pictures], *args: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a picture becomes


def test_gray_pictures_have_one_channel_and_black_is_minus_one(paint: Paint) -> None:
    paint("a/1.png", 0)
    paint("b/1.png", 255)
    found = _folder()
    assert found.images.shape == (2, 1, 4, 4)
    assert found.images.dtype == torch.float32
    assert found.images.flatten(1).tolist() == [[-1.0] * 16, [1.0] * 16]
    assert torch.equal(found.labels, torch.tensor([0, 1]))
    assert (found.classes, found.skipped) == (("a", "b"), ())


def test_colour_pictures_have_three_channels(paint: Paint) -> None:
    paint("a/1.png", (255, 0, 0), "RGB")
    found = _folder(color=True)
    assert found.images.amin((2, 3)).tolist() == [[1, -1, -1]]
    assert torch.equal(found.images.amin((2, 3)), found.images.amax((2, 3)))


def test_a_gray_picture_in_colour_has_three_equal_channels(paint: Paint) -> None:
    paint("a/1.png", 51)
    red, green, blue = _folder(color=True).images[0]
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    assert red.unique().tolist() == pytest.approx([-0.6])


@pytest.mark.parametrize(
    ("content", "mode"),
    [((0, 0, 0, 0), "RGBA"), ((0, 0), "LA")],
)
@pytest.mark.parametrize("color", [False, True])
def test_white_shows_through_where_a_picture_is_transparent(
    paint: Paint, content: Any, mode: str, color: bool
) -> None:
    paint("a/1.png", content, mode)
    assert _folder(color=color).images.unique().tolist() == [1]


def test_white_shows_through_the_transparent_entry_of_a_palette(paint: Paint) -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.info["transparency"] = 0
    paint("a/1.gif", picture)
    assert _folder().images.unique().tolist() == [1]


def test_sixteen_bits_are_scaled_and_not_clipped(paint: Paint) -> None:
    paint("a/1.png", Image.fromarray(numpy.full((8, 8), 51 * 257, dtype=numpy.uint16)))
    paint("a/2.tif", Image.fromarray(numpy.full((8, 8), 51 * 257, dtype=numpy.int32)))
    assert _folder().images.unique().tolist() == pytest.approx([-0.6])


def test_a_picture_is_cropped_to_its_middle_and_resized(paint: Paint) -> None:
    wide = Image.new("L", (24, 8), 255)
    ImageDraw.Draw(wide).rectangle((8, 0, 15, 7), fill=0)
    paint("a/1.png", wide)
    paint("a/2.png", wide.rotate(90, expand=True))
    found = _folder()
    assert found.images.shape == (2, 1, 4, 4)
    assert found.images[:, :, 1:3, 1:3].unique().tolist() == [-1]


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
def test_narrow_and_tiny_pictures_can_be_read(paint: Paint, size: tuple[int, int]) -> None:
    paint("a/1.png", 255, size=size)
    assert _folder().images.unique().tolist() == [1]


def test_a_picture_is_turned_as_its_exif_says(paint: Paint) -> None:
    picture = Image.new("L", (8, 8), 255)
    ImageDraw.Draw(picture).rectangle((0, 0, 7, 3), fill=0)  # the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top is on the right
    picture.save(paint("a/1.png"), exif=exif)
    image = _folder(size=8).images[0, 0]
    assert image[0].tolist() == [1] * 4 + [-1] * 4


def test_of_an_animation_the_first_picture_counts(paint: Paint) -> None:
    first, second = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    first.save(paint("a/1.gif", first), save_all=True, append_images=[second])
    assert _folder().images.unique().tolist() == [-1]


def test_what_pillow_only_warns_of_neither_breaks_a_picture_nor_is_printed(paint: Paint) -> None:
    file = paint("a/1.jpg", 0)
    raw = file.read_bytes()
    segment = b"Exif\0\0" + b"MM\0*" + b"\0\0\0\x08" + b"\xff\xff"  # 65,535 entries, and none
    file.write_bytes(
        raw[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + raw[2:]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(_folder().images) == 1
    assert caught == []


# Which files count


def test_folders_are_classes_in_sorted_order_and_names_are_read_in_sorted_order(
    paint: Paint,
) -> None:
    for name, gray in (
        ("dog/2.png", 255),
        ("cat/b.png", 102),
        ("dog/1.png", 204),
        ("cat/a.png", 0),
    ):
        paint(name, gray)
    found = _folder()
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.images[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.2, 0.6, 1])


def test_the_order_is_not_the_file_systems(paint: Paint, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(9):
        paint(f"{place % 3}/{place}.png", place)
    before, listing = _folder(), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: reversed(list(listing(folder))))
    after = _folder()
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


@pytest.mark.parametrize("name", ["1.PNG", "1.Jpg", "1.JPEG", "1.bmp", "1.webp", "1.tiff", "1.ppm"])
def test_the_usual_extensions_count_in_either_case(paint: Paint, name: str) -> None:
    paint(f"a/{name}", 255)
    assert _folder().images.unique().tolist() == [1]


def test_hidden_and_other_files_are_ignored(paint: Paint) -> None:
    paint("a/1.png", 0)
    for name in ("a/.2.png", "a/notes.txt", "a/scan.pdf", "a/figure.eps", "a/clip.mpg", "a/png"):
        paint(name, b"no picture")
    paint(".cache/1.png", b"no picture")
    paint("a/.thumbnails/1.png", b"no picture")
    paint("readme.txt", b"text")
    found = _folder()
    assert (len(found.images), found.classes, found.skipped) == (1, ("a",), ())


def test_folders_within_a_class_belong_to_it(paint: Paint) -> None:
    paint("a/young/small/1.png", 0)
    paint("a/1.png", 255)
    paint("b/1.png", 0)
    found = _folder()
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 0, 1]


def test_a_link_may_be_a_class_and_links_that_lead_in_circles_are_not_followed(
    paint: Paint, tmp_path: Path
) -> None:
    paint("a/1.png", 0)
    (tmp_path / "pets" / "a" / "again").symlink_to(tmp_path / "pets", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (8, 8), 255).save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "pets" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = _folder()
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 1]


def test_pictures_beside_the_classes_folders_are_left_out_and_told_of(paint: Paint) -> None:
    paint("a/1.png")
    paint("cover.png")
    assert _folder().skipped == ("cover.png (lies in no class's folder)",)


def test_a_class_without_pictures_stays_a_class(root: Path, paint: Paint) -> None:
    paint("a/1.png")
    (root / "b").mkdir()
    assert _folder().classes == ("a", "b")


# Folders that cannot be read


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere", "cannot be found; name a folder that holds one folder per class"),
        ("x" * 5000, "cannot be found; name a folder that holds one folder per class"),
        ("pets/1.png", "is a file; name a folder that holds one folder per class"),
        (
            "pets/data.csv",
            "is a file; name a folder that holds one folder per class, or set data.name to csv",
        ),
    ],
)
def test_a_path_that_is_no_folder_is_refused(paint: Paint, path: str, what: str) -> None:
    paint("1.png")
    paint("data.csv", b"file_name,text\n")
    section = FolderConfig(name="folder", path=path)
    text = _refusal(read_folder, section)
    assert text == f"data.path {path!r} {what}"


def test_pictures_that_lie_flat_are_refused_with_how_to_arrange_them(paint: Paint) -> None:
    paint("1.png")
    paint("2.png")
    paint("labels.txt", b"cat\ndog\n")
    assert _refusal(_folder) == (
        "every class is a folder of its own in data.path; got 0 folders and 2 pictures in 'pets'; "
        f"arrange them as in {Path('pets/cat/1.png')} and {Path('pets/dog/1.png')}"
    )


def test_folders_without_any_picture_are_refused(root: Path, paint: Paint) -> None:
    paint("cat/notes.txt", b"")
    (root / "dog").mkdir()
    assert _refusal(_folder) == (
        "the pictures of a class lie in its folder; got none in cat, dog of data.path 'pets'; "
        "put files there such as 1.png or 1.jpg"
    )


def test_a_folder_that_may_not_be_read_is_refused(
    paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("cat/1.png")
    listing = Path.iterdir

    def locked(folder: Path) -> Any:
        if folder.name == "cat":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", locked)
    assert _refusal(_folder) == (
        "the folders of data.path must be readable; got 'Permission denied' for "
        f"{str(Path('pets/cat'))!r}; change its permissions or move it away"
    )


# Broken pictures


def _truncated() -> bytes:
    whole = io.BytesIO()
    noise = numpy.random.randint(0, 256, (14, 14), dtype=numpy.uint8)
    Image.fromarray(noise).save(whole, "BMP")
    return whole.getvalue()[:1200]


def _break(paint: Paint, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six pictures that are broken, each in its own way, and what is said of them."""
    paint("cat/bomb.png", size=(30, 30))
    paint("cat/empty.png", b"")
    paint("cat/text.jpg", b"I am no picture")
    paint("cat/truncated.bmp", _truncated())
    paint("cat/warned.png", size=(15, 15))
    (paint("cat/1.png").parent / "gone.png").symlink_to("nowhere.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    folder = Path("cat")
    return [
        f"{folder / 'bomb.png'} (more than 200 pixels)",
        f"{folder / 'empty.png'} (not a picture that Pillow can read)",
        f"{folder / 'gone.png'} (No such file or directory)",
        f"{folder / 'text.jpg'} (not a picture that Pillow can read)",
        f"{folder / 'truncated.bmp'} (image file is truncated (10 bytes not processed))",
        f"{folder / 'warned.png'} (more than 200 pixels)",
    ]


def test_all_broken_pictures_are_listed_with_their_reasons(
    paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _break(paint, monkeypatch)
    assert _refusal(_folder) == (
        f"6 of the 7 pictures of data.path 'pets' cannot be read: {', '.join(broken)}; "
        "replace them, or set data.skip_broken to true to leave them out"
    )


def test_broken_pictures_are_left_out_where_that_is_asked_for_and_told_of(
    paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _break(paint, monkeypatch)
    paint("cow/1.png")
    paint("cover.png")
    found = _folder(skip_broken=True)
    assert found.skipped == ("cover.png (lies in no class's folder)", *broken)
    assert found.labels.tolist() == [0, 1]
    assert len(found.images) == 2


def test_a_picture_that_may_not_be_read_is_broken(
    paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("a/1.png")
    paint("a/2.png")
    opening = Image.open

    def locked(path: Path, **options: Any) -> Image.Image:
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, **options)

    monkeypatch.setattr(Image, "open", locked)
    assert _folder(skip_broken=True).skipped == (f"{Path('a/2.png')} (Permission denied)",)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_picture_without_the_permission_to_read_it_is_broken(paint: Paint) -> None:
    paint("a/1.png")
    paint("a/2.png").chmod(0)
    assert _folder(skip_broken=True).skipped == (f"{Path('a/2.png')} (Permission denied)",)


def test_of_many_broken_pictures_eight_are_named(paint: Paint) -> None:
    paint("a/whole.png")
    for place in range(12):
        paint(f"a/{place:02}.png", b"")
    text = _refusal(_folder)
    assert text.startswith("12 of the 13 pictures of data.path 'pets' cannot be read: ")
    assert (
        f"{Path('a/07.png')} (not a picture that Pillow can read) and 4 more; replace them" in text
    )


@pytest.mark.parametrize("skip_broken", [False, True])
def test_where_no_picture_can_be_read_none_can_be_skipped(paint: Paint, skip_broken: bool) -> None:
    paint("a/1.png", b"")
    assert _refusal(_folder, skip_broken=skip_broken) == (
        "none of the 1 pictures of data.path 'pets' can be read: "
        f"{Path('a/1.png')} (not a picture that Pillow can read); replace them"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            numpy.full((8, 8), 0.5, dtype=numpy.float32),
            "its values are floating-point, and none of them is known to be white",
        ),
        (numpy.full((8, 8), 70_000, dtype=numpy.int32), "its values have more than 16 bits"),
        (numpy.full((8, 8), -1, dtype=numpy.int32), "its values have more than 16 bits"),
    ],
)
def test_values_of_an_unknown_scale_are_broken(paint: Paint, values: Any, reason: str) -> None:
    paint("a/1.png")
    paint("a/2.tif", Image.fromarray(values))
    assert _folder(skip_broken=True).skipped == (f"{Path('a/2.tif')} ({reason})",)


@given(data=st.binary(max_size=300), kind=st.sampled_from(["PNG", "GIF", "BMP", "TIFF", "JPEG"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_read_or_told_of_and_raise_nothing_else(
    paint: Paint, data: bytes, kind: str
) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(whole, kind)
    raw = whole.getvalue()
    place = len(data) % len(raw)
    paint("a/1.png")
    paint("a/2.png", raw[:place] + data + raw[place + len(data) // 2 :])
    found = _folder(skip_broken=True)
    assert len(found.images) + len(found.skipped) == 2


def test_no_other_program_is_started_for_postscript_behind_another_name(paint: Paint) -> None:
    paint("a/1.png")
    paint("a/2.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert _folder(skip_broken=True).skipped == (
        f"{Path('a/2.png')} (not a picture that Pillow can read)",
    )


# CSV files


def test_each_distinct_text_is_a_class(paint: Paint) -> None:
    paint("1.png", 0)
    paint("deep/2.png", 102)
    paint("3.png", 255)
    found = _csv("file_name,text\n1.png,a red car\ndeep/2.png,a blue car\n3.png,a red car\n")
    assert found.classes == ("a blue car", "a red car")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.images[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.2, 1])
    assert found.skipped == ()


@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_blank_lines_and_any_ends_of_lines_are_understood(
    paint: Paint, start: str, end: str
) -> None:
    paint("1.png")
    text = end.join(["text, file_name ", '"red, small", 1.png', "", "  blue ,1.png", ""])
    assert _csv(start + text).classes == ("blue", "red, small")


def test_columns_are_named_in_the_config_and_others_are_ignored(paint: Paint) -> None:
    paint("1.png")
    text = "id,picture,split,caption\n7,1.png,,a cat\n"
    assert _csv(text, image_column="picture", text_column="caption").classes == ("a cat",)


def test_an_absolute_path_is_taken_as_it_is(paint: Paint, tmp_path: Path) -> None:
    paint("1.png", 255)
    (tmp_path / "pets" / "1.png").rename(tmp_path / "moved.png")
    found = _csv(f"file_name,text\n{tmp_path / 'moved.png'},a\n")
    assert found.images.unique().tolist() == [1]


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=1,
        max_size=8,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_that_the_csv_module_writes_is_read_back_stripped(
    paint: Paint, texts: list[str]
) -> None:
    paint("1.png")
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["file_name", "text"], *[["1.png", text] for text in texts]])
    found = _csv(file.getvalue())
    assert found.classes == tuple(sorted({text.strip() for text in texts}))
    assert [found.classes[label] for label in found.labels] == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "nowhere.csv",
            "cannot read data.path 'nowhere.csv': No such file or directory; name a CSV file",
        ),
        (
            "pets",
            "data.path 'pets' is a folder; name a CSV file, or set data.name to folder",
        ),
    ],
)
def test_a_path_that_is_no_csv_file_is_refused(root: Path, path: str, text: str) -> None:
    assert _refusal(read_csv, CsvConfig(name="csv", path=path)) == text


_FILE = repr(str(Path("pets/data.csv")))


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ("", "a CSV file begins with a header such as file_name,text; got nothing in {}"),
        ("\ufeff\n\n", "a CSV file begins with a header such as file_name,text; got nothing in {}"),
        (
            "file_name,text\n\n",
            "each line after the header names a picture and its text; got no line in {}; "
            "add one per picture",
        ),
        (
            "filename,text\n1.png,a\n",
            "data.image_column is a column of {}; got 'file_name', and its header holds "
            "'filename', 'text'; did you mean 'filename'?",
        ),
        (
            "file_name,label\n1.png,a\n",
            "data.text_column is a column of {}; got 'text', and its header holds "
            "'file_name', 'label'; set data.text_column to one of them",
        ),
        (
            "1.png,a\n2.png,b\n",
            "data.image_column is a column of {}; got 'file_name', and its header holds "
            "'1.png', 'a'; set data.image_column to one of them",
        ),
        (
            "file_name;text\n1.png;a\n",
            "data.image_column is a column of {}; got 'file_name', and its header holds "
            "'file_name;text'; separate the columns by commas",
        ),
        (
            "file_name,text\n1.png,a\n\n1.png\n",
            "a line has as many fields as the header, 2; got 1 in line 4 of {}; "
            "put a text that holds commas into double quotes",
        ),
        (
            "file_name,text\n1.png,red, small\n",
            "a line has as many fields as the header, 2; got 3 in line 2 of {}; "
            "put a text that holds commas into double quotes",
        ),
        (
            'file_name,text\n1.png,"two\nlines"\n1.png, \n',
            "a line names a picture and its text; got an empty 'text' in line 4 of {}; "
            "fill it in or remove the line",
        ),
        (
            "file_name,text\n,a\n",
            "a line names a picture and its text; got an empty 'file_name' in line 2 of {}; "
            "fill it in or remove the line",
        ),
        (
            'file_name,text\n1.png,a\n1.png,"b\n1.png,c\n',
            "line 3 of {} is no line of a CSV file: unexpected end of data; "
            "close its double quotes, and write those within a text twice",
        ),
        (
            b"file_name,text\n1.png,caf\xe9\n",
            "a CSV file is UTF-8; got other bytes in line 2 of {}; save it again as UTF-8",
        ),
    ],
)
def test_a_malformed_csv_file_is_refused_with_the_line(
    paint: Paint, content: str | bytes, refusal: str
) -> None:
    paint("1.png")
    assert _refusal(_csv, content) == refusal.replace("{}", _FILE)


def test_pictures_that_do_not_exist_are_listed_with_their_lines(paint: Paint) -> None:
    paint("1.png")
    text = "file_name,text\n1.png,a\n2.png,b\nsub/3.png,a\n"
    two, three = Path("pets/2.png"), Path("pets/sub/3.png")
    broken = (
        f"line 3: {two} (No such file or directory)",
        f"line 4: {three} (No such file or directory)",
    )
    assert _refusal(_csv, text) == (
        f"2 of the 3 pictures of data.path 'pets/data.csv' cannot be read: {', '.join(broken)}; "
        "replace them, or set data.skip_broken to true to leave them out"
    )
    found = _csv(text, skip_broken=True)
    assert found.skipped == broken
    assert (found.classes, found.labels.tolist()) == (("a", "b"), [0])
