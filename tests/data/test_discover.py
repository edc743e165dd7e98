"""What two folders are seen to hold, on trees whose layout, labels and classes are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nightseg.data.class_list import taxonomy
from nightseg.data.discover import Found, discover
from nightseg.data.images import encode_jpeg, encode_png
from nightseg.data.settings import ClassList
from nightseg.storage import Location, UserError

HEIGHT, WIDTH = 24, 32
ROAD, SKY, CAR = (128, 64, 128), (70, 130, 180), (0, 0, 142)  # of Cityscapes


def photograph(number: int, dark: bool = False) -> np.ndarray:
    """A bright sky over a street, or a dark one over a lit street."""
    rng = np.random.default_rng(number)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    light = 20 + 120 * (rows > 0.5) if dark else 250 - 160 * (rows > 0.4)
    return (light + rng.integers(-20, 5, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)


def label(number: int, ids: tuple[int, ...] = (6, 1, 7)) -> np.ndarray:
    """Bands of ids from the top down, with an edge that moves."""
    rows = (np.arange(HEIGHT) * len(ids) // HEIGHT + number % 2).clip(max=len(ids) - 1)
    return np.repeat(np.array(ids, np.uint8)[rows][:, None], WIDTH, axis=1)


def in_colours(number: int, colours: tuple[tuple[int, int, int], ...] = (SKY, ROAD, CAR)) -> np.ndarray:
    return np.array(colours, np.uint8)[label(number, tuple(range(len(colours))))]


def put(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode_jpeg(pixels) if file.suffix == ".jpg" else encode_png(pixels))


def frames(
    root: Path,
    image: str,
    mask: str,
    make: Any = label,
    names: tuple[str, ...] = ("a1", "a2", "a3", "a4", "a5"),
    first: int = 0,
) -> Path:
    for number, name in enumerate(names, first):
        put(root / image.format(name), photograph(number))
        put(root / mask.format(name), make(number))
    return root


@pytest.fixture
def night(tmp_path: Path) -> Path:
    for number in range(6):
        put(tmp_path / "night" / f"{number}.jpg", photograph(number, dark=True))
    return tmp_path / "night"


def found(day: Path, night: Path, **more: Any) -> Found:
    return discover(Location.of(day), Location.of(night), **more)


@pytest.mark.parametrize(
    ("image", "mask", "images", "labels"),
    [
        ("images/{}.jpg", "labels/{}.png", "images", "labels"),
        ("rgb/{}.jpg", "masks/{}_mask.png", "rgb", "masks/{name}_mask.png"),
        ("rgb/{}_left.jpg", "gt/{}_gt.png", "rgb/{name}_left.jpg", "gt/{name}_gt.png"),
        ("rgb/{}_rgb.png", "gt/{}_label.png", "rgb", "gt"),
        ("{}.jpg", "{}.png", "**/*.jpg", "**/*.png"),
        ("d/{}.png", "d/{}_seg.png", "d", "d/{name}_seg.png"),
        ("imgs/{}.jpg", "gt/mask_{}.png", "imgs", "gt/mask_{name}.png"),
        ("rgb/drive/{}.jpg", "masks/drive/{}.png", "rgb/drive", "masks/drive"),
    ],
)
def test_pairs_without_a_split(tmp_path: Path, night: Path, image: str, mask: str, images: str, labels: str) -> None:
    seen = found(frames(tmp_path / "day", image, mask), night)
    assert seen.day == {"layout": "pairs", "images": images, "labels": labels} == seen.test
    assert {name: len(names) for name, names in seen.lists.items()} == {"day": 4, "test": 1}
    assert seen.lists["test"] == [image.format("a5")], "neighbours look alike, so it is the last one"
    assert seen.num == {"day": 4, "test": 1, "night": 6} and seen.size == (HEIGHT, WIDTH)
    assert seen.is_sorted and "6 of 6 frames" in seen.assumed[-1]


@pytest.mark.parametrize(
    ("image", "mask", "splits"),
    [
        ("{split}/images/{{}}.jpg", "{split}/labels/{{}}.png", ("train", "val")),
        ("images/{split}/{{}}.jpg", "labels/{split}/{{}}.png", ("training", "validation")),
        ("{split}/rgb/cam/{{}}.jpg", "{split}/gt/cam/{{}}.png", ("Train", "Test")),
        ("images/{split}/{{}}.jpg", "labels/{split}/{{}}_labelIds.png", ("train", "test")),
    ],
)
def test_splits_by_folders(tmp_path: Path, night: Path, image: str, mask: str, splits: tuple[str, str]) -> None:
    for split in splits:
        frames(tmp_path / "day", image.format(split=split), mask.format(split=split))
    seen = found(tmp_path / "day", night)
    assert (seen.day["split"], seen.test["split"]) == splits and not seen.lists
    assert "{split}" in seen.day["images"] and "{split}" in seen.day["labels"] and seen.num["test"] == 5


def test_whole_drives_are_kept_for_the_test(tmp_path: Path, night: Path) -> None:
    names = tuple(f"drive{drive}_{number:03d}" for drive in "abcde" for number in range(4))
    seen = found(frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", names=names), night)
    assert seen.lists["test"] == [f"images/drivea_{number:03d}.jpg" for number in range(4)]
    assert "whole drives (5 by the names)" in " ".join(seen.assumed)


def test_labels_elsewhere_may_have_the_names_of_their_images(tmp_path: Path, night: Path) -> None:
    frames(tmp_path / "day", "{}.png", "../annotations/{}.png")
    seen = found(tmp_path / "day", night, labels=Location.of(tmp_path / "annotations"))
    assert seen.day == {"layout": "pairs", "images": ".", "labels": str(tmp_path / "annotations")}


def test_labels_elsewhere_and_the_night_below_the_day(tmp_path: Path) -> None:
    frames(tmp_path / "day", "images/{}.jpg", "../annotations/{}.png")
    for number in range(6):
        put(tmp_path / "day" / "night" / f"{number}.jpg", photograph(number, dark=True))
    seen = found(tmp_path / "day", tmp_path / "day" / "night", labels=Location.of(tmp_path / "annotations"))
    assert seen.day == {"layout": "pairs", "images": "images", "labels": str(tmp_path / "annotations")}


# -- classes -----------------------------------------------------------------------------------------------------------


def test_unknown_ids_become_classes_without_names(tmp_path: Path, night: Path) -> None:
    seen = found(frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", lambda n: label(n, (6, 1, 255))), night)
    assert isinstance(seen.taxonomy, ClassList) and not seen.is_named and seen.encoding == "ids"
    assert [(one.name, one.ids) for one in seen.taxonomy.classes] == [("class_1", 1), ("class_6", 6)]
    assert seen.seen[6].height < 0.35 < 0.65 < seen.seen[255].height and seen.seen[6].files == 0.6
    assert any("give the classes their names" in line for line in seen.to_check)


def test_ids_of_few_frames_are_found(tmp_path: Path, night: Path) -> None:
    names = tuple(f"{index:03d}" for index in range(80))
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", names=names)
    put(day / "labels" / "001.png", label(1, (6, 1, 9)))
    seen = found(day, night)
    assert isinstance(seen.taxonomy, ClassList) and [one.ids for one in seen.taxonomy.classes] == [1, 6, 7, 9]


def test_unknown_colours_become_classes_without_names(tmp_path: Path, night: Path) -> None:
    own = ((1, 2, 3), (0, 0, 0), (9, 9, 9))
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", lambda n: in_colours(n, own))
    seen = found(day, night)
    assert isinstance(seen.taxonomy, ClassList) and seen.encoding == "colors"
    assert [one.color for one in seen.taxonomy.classes] == [(1, 2, 3), (9, 9, 9)]


def test_colours_of_a_published_list_are_known(tmp_path: Path, night: Path) -> None:
    seen = found(frames(tmp_path / "day", "images/{}.jpg", "labels/{}_color.png", in_colours), night)
    assert (seen.taxonomy, seen.encoding, seen.day["label_encoding"]) == ("cityscapes19", "colors", "colors")


def test_palettes_of_a_published_list_are_known(tmp_path: Path, night: Path) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png")
    palette = np.zeros((256, 3), np.uint8)
    palette[[0, 10, 13]] = ROAD, SKY, CAR
    for number, file in enumerate(sorted((day / "labels").iterdir())):
        image = Image.fromarray(label(number, (10, 0, 13)))
        image.putpalette(palette.tobytes())
        image.save(file)
    seen = found(day, night)
    assert (seen.taxonomy, seen.encoding) == ("cityscapes19", "train_ids")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "".join(f"c{index}\n" for index in range(8))),
        ("class_dict.csv", "name,r,g,b\n" + "".join(f"c{index},{index},1,1\n" for index in range(8))),
        ("label_colors.txt", "".join(f"{index} 1 1\tc{index}\n" for index in range(8))),
        ("classes.yaml", "classes: [{name: c1, ids: 1}, {name: c6, ids: 6}, {name: c7, ids: 7}]\n"),
    ],
)
def test_a_class_list_in_the_folder_is_used(tmp_path: Path, night: Path, name: str, text: str) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png")
    (day / name).write_text(text)
    seen = found(day, night)
    assert seen.is_named and seen.encoding == "ids" and any(name in line for line in seen.assumed)
    assert seen.taxonomy == str(day / name) if name.endswith("yaml") else isinstance(seen.taxonomy, ClassList)


def test_other_label_files_are_left_out_and_said(tmp_path: Path, night: Path) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}_gt.png")
    frames(tmp_path / "day", "images/{}.jpg", "color/{}_color.png", in_colours)
    seen = found(day, night)
    assert (seen.day["labels"], seen.encoding) == ("labels", "ids")


def test_cityscapes(tmp_path: Path, night: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            stem = f"{split}/ulm/ulm_{number}"
            put(tmp_path / "cs" / f"leftImg8bit/{stem}_leftImg8bit.png", photograph(number))
            put(tmp_path / "cs" / f"gtFine/{stem}_gtFine_labelIds.png", label(number, (23, 7, 26)))
    seen = found(tmp_path / "cs", night)
    assert seen.day == {"layout": "cityscapes", "split": "train"} and seen.test == {
        "layout": "cityscapes",
        "split": "val",
    }
    assert (seen.taxonomy, seen.encoding) == ("cityscapes19", "label_ids")


def camvid(index: int, void: int) -> np.ndarray:
    """A street with the ids of CamVid's twelve, sky first and void last (11), or one higher with void 0."""
    street = np.repeat(np.array([0, 0, 1, 5, 11, 8, 3, 3], np.uint8), HEIGHT // 8)[:, None] * np.ones(WIDTH, np.uint8)
    return street.astype(np.uint8) if void else np.where(street == 11, 0, street + 1).astype(np.uint8)


@pytest.mark.parametrize(("void", "encoding"), [(11, "camvid12"), (0, "ids_from_one")])
def test_void_first_or_last_in_files_called_like_those_of_camvid(
    tmp_path: Path, night: Path, void: int, encoding: str
) -> None:
    names = tuple(f"0006R0_f{number:05d}" for number in range(8))
    day = frames(tmp_path / "day", "frames/{}.jpg", "gt/{}_semseg.png", lambda n: camvid(n, void), names=names)
    seen = found(day, night)
    assert (seen.taxonomy, seen.encoding) == ("camvid11", encoding)
    assert seen.day["label_encoding"] == encoding == seen.test["label_encoding"], (
        "the layout would not take it for that"
    )
    upside_down = frames(tmp_path / "2", "frames/{}.jpg", "gt/{}.png", lambda n: camvid(n, void)[::-1], names=names)
    assert found(upside_down, night).encoding == "ids", "a sky below the road: nobody knows"


# -- the night, and what is refused ------------------------------------------------------------------------------------


def test_a_pool_that_is_not_sorted(tmp_path: Path, night: Path) -> None:
    for number in range(6):
        put(night / f"day{number}.jpg", photograph(number))
    seen = found(frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png"), night)
    assert not seen.is_sorted and "taken for unsorted" in " ".join(seen.assumed)


def test_nights_that_do_not_look_like_it_are_taken_and_said(tmp_path: Path) -> None:
    for number in range(6):
        put(tmp_path / "bright" / f"{number}.jpg", photograph(number))
    seen = found(frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png"), tmp_path / "bright")
    assert seen.is_sorted and any("does not look like night" in line for line in seen.to_check)


def test_what_cannot_be_found_out_is_refused(tmp_path: Path, night: Path) -> None:
    day = tmp_path / "day"
    with pytest.raises(UserError, match=r"DAY: no such folder: .*day"):
        found(day, night)
    put(day / "labels" / "x1.png", label(1))
    with pytest.raises(UserError, match="DAY: no image in"):
        found(day, night)
    put(day / "images" / "a1.jpg", photograph(1))
    put(day / "images" / "b2.jpg", photograph(2))
    with pytest.raises(UserError, match=r"2 images and 1 labels do not pair by their names: images are images/a1.jpg"):
        found(day, night)
    (day / "labels" / "x1.png").unlink()
    with pytest.raises(
        UserError, match=r"no label files in .*; there are images/\*.jpg \(2\).*say where the labels are"
    ):
        found(day, night)
    with pytest.raises(UserError, match="DAY and NIGHT are one folder"):
        found(day, day)


def test_a_class_list_that_does_not_fit_is_refused_in_its_numbers(tmp_path: Path, night: Path) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", lambda n: label(n, (0, 1, 3)))
    (tmp_path / "mine.txt").write_text("road\nsky\ncar\n")
    with pytest.raises(
        UserError, match=r"DAY: .*ids 3 \(\d+ pixels\).*the labels hold 0..1, 3, and mine has 3 classes"
    ):
        found(day, night, classes=str(tmp_path / "mine.txt"))


def with_list(tmp_path: Path, name: str, text: str, ids: tuple[int, ...]) -> Path:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", lambda n: label(n, ids))
    (day / name).write_text(text)
    return day


NAMED = "".join(f"c{index}\n" for index in range(8))
TENS = "id,name\n" + "".join(f"{10 * index},c{index}\n" for index in range(1, 9))


@pytest.mark.parametrize(
    ("name", "text", "ids", "cure"),
    [
        ("classes.txt", NAMED, (1, 2, 3, 4, 5, 6, 7, 8, 255), "`name,id`, `c0,1`, ..."),
        ("classes.txt", NAMED, (0, 1, 2, 3, 4, 5, 6, 7, 8), "`name,id`, `void,0`, `c0,1`, ..."),
        ("classes.txt", NAMED, (0, 1, 30), "`name,id`, `c0,0`, ..."),
        (
            "classes.csv",
            TENS,
            (0, 10, 99),
            "add a row with the id 0 to classes.csv, with the name of its class or `void`; l",
        ),
        ("classes.csv", TENS, (10, 99), "add a row with the id 99 to classes.csv"),
        (
            "classes.yaml",
            "classes: [{name: a, ids: 1}, {name: b, ids: 2}]",
            (0, 1, 2),
            "in classes.yaml, .* ignore: {ids: .0.}",
        ),
    ],
)
def test_the_cure_fits_the_class_list(
    tmp_path: Path, night: Path, name: str, text: str, ids: tuple[int, ...], cure: str
) -> None:
    day = with_list(tmp_path, name, text, ids)
    with pytest.raises(UserError) as refused:
        found(day, night)
    assert re.search(cure, refused.value.cure) and "label_encoding" not in refused.value.cure
    if text == TENS:
        assert "knows 10, 20, 30, 40, 50, 60, 70, 80, 255 (ids)" in refused.value.what


def test_colours_that_a_list_lacks_are_told_in_its_terms(tmp_path: Path, night: Path) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", in_colours)
    (day / "label_colors.txt").write_text("70 130 180 firmament\n128 64 128 tarmac\n")
    with pytest.raises(
        UserError, match=r"Cure: add the colour \[0, 0, 142\] to label_colors.txt, with the name of its"
    ):
        found(day, night)


def test_an_id_0_without_a_row_is_void_and_said(tmp_path: Path, night: Path) -> None:
    seen = found(with_list(tmp_path, "classes.csv", TENS, (0, 10, 80, 255)), night)
    assert isinstance(seen.taxonomy, ClassList) and seen.taxonomy.ignore == {"ids": [0]}
    assert any("id 0 is in no row of" in line and "taken for void" in line for line in seen.assumed)
    assert taxonomy(seen.taxonomy).encodings["ids"] == {**{10 * i: i - 1 for i in range(1, 9)}, 0: 255, 255: 255}


def test_frames_without_label_and_labels_of_another_size_are_counted(tmp_path: Path, night: Path) -> None:
    day = frames(tmp_path / "day", "images/{}.jpg", "labels/{}.png", names=tuple(f"a{n}" for n in range(9)))
    assert not [line for line in found(day, night).to_check if "max_bad_fraction" in line]
    (day / "labels" / "a3.png").unlink()
    for name in ("a1", "a5", "a7"):
        put(day / "labels" / f"{name}.png", label(0)[::2])
    missing, odd = (line for line in found(day, night).to_check if "`max_bad_fraction`" in line)
    assert missing.startswith("1 of 9 day frames have no label (a3.jpg)")
    assert odd.startswith("3 of 8 labels looked at have another size than their image (a1.jpg, a5.jpg, ...)")
