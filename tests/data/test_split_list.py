"""Split lists: frames by name, as data sets publish them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.data.split_list import chosen, read_split_list
from nightseg.storage import Entry, Location, UserError


def written(folder: Path, name: str, text: str) -> Location:
    (folder / name).write_text(text, encoding="utf-8")
    return Location.of(folder / name)


def entries(*names: str) -> list[Entry]:
    return [Entry(name, 1, 0, False) for name in names]


def test_text(tmp_path: Path) -> None:
    file = written(
        tmp_path, "train.txt", "# the train set\na/1\n\nrgb/2.png gt/2.png\nwith blank 3.png\n4.jpg\t4.png\n"
    )
    listed = read_split_list(file)
    assert [(one.image, one.label, one.line) for one in listed] == [
        ("a/1", None, 2), ("rgb/2.png", "gt/2.png", 4), ("with blank 3.png", None, 5), ("4.jpg", "4.png", 6),
    ]  # fmt: skip


def test_csv(tmp_path: Path) -> None:
    text = "Image_Filename;lighting;split\na.jpg;Day;train\nb.jpg;Night;val\nc.jpg;Twilight;train\nd.jpg;?;train\n"
    file = written(tmp_path, "list.csv", text)
    assert [(one.image, one.domain) for one in read_split_list(file, "train")] == [
        ("a.jpg", "day"), ("c.jpg", "twilight"), ("d.jpg", None),
    ]  # fmt: skip
    assert len(read_split_list(file)) == 4
    with pytest.raises(UserError, match=r"no row has the split 'test', there are train, val"):
        read_split_list(file, "test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "# nothing\n", "it names no frame"),
        ("x.txt", "a\nb\na\n", r"line 3: a stands in line 1 already"),
        (
            "x.csv",
            "id,city\n1,ulm\n",
            r"line 1: no column tells the image, it has id, city. Cure: call the column image",
        ),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_split_list(written(tmp_path, name, text))
    with pytest.raises(UserError, match="there is no file"):
        read_split_list(Location.of(tmp_path / "gone.txt"))


def test_names_count_from_the_root_or_the_folder_with_or_without_suffix(tmp_path: Path) -> None:
    there = entries("day/a.jpg", "day/b.jpg", "night/b.jpg", "c.png")
    file = written(tmp_path, "l.txt", "images/day/a.jpg\nnight/b\n./c\n")
    found = chosen(read_split_list(file), there, file, "images")
    assert [entry.name for entry, _ in found] == ["c.png", "day/a.jpg", "night/b.jpg"]
    file = written(tmp_path, "l.txt", "a\nb\n")
    found = chosen(read_split_list(file), there, file, "images")
    assert [(entry.name, bool(entry.problem)) for entry, _ in found] == [("b", True), ("day/a.jpg", False)]
    assert "line 2" in found[0][0].problem
    file = written(tmp_path, "l.txt", "x\ny\n")
    with pytest.raises(UserError, match=r"none of its 2 names is a file of the data set: x, y; there are day/a.jpg"):
        chosen(read_split_list(file), there, file, "images")
