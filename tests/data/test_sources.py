"""What a user may point at, and the frames it means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg.data.sources import Source, find_source
from nightseg.storage import Location, UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def ids(source: Source) -> list[str]:
    return [row["frame_id"] for row in source.images]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        *("a.png", "b.JPG", "notes.txt", ".hidden.png", "drive.mp4"),
        *("one/a.png", "one/deep/c.webp", "one/.thumbs/a.png", "two/d.jpg", "two/e.txt", "two/f.MKV"),
    )
    return tmp_path


def test_a_folder_is_its_images_to_the_bottom(tree: Path) -> None:
    found = find_source(str(tree))
    assert ids(found) == ["a", "b", "one/a", "one/deep/c", "two/d"]
    assert found.images[2]["uri"] == str(tree / "one/a.png")
    assert found.videos == [] and found.bad == []


@pytest.mark.parametrize(
    ("pattern", "wanted", "videos"),
    [
        ("*.png", ["a"], []),
        ("*", ["a", "b"], ["drive"]),
        ("?.png", ["a"], []),
        ("[bc].*", ["b"], []),
        ("*/*.[jp]*", ["one/a", "two/d"], []),
        ("one/**/*.webp", ["deep/c"], []),
        ("**/*.png", ["a", "one/a"], []),
        ("**", ["a", "b", "one/a", "one/deep/c", "two/d"], ["drive", "two/f"]),
        ("one/**", ["a", "deep/c"], []),
        ("*/deep/*", ["one/deep/c"], []),
        ("t*/*", ["two/d"], ["two/f"]),
        ("t[w]o/*", ["two/d"], ["two/f"]),
        ("**/*.mp4", [], ["drive"]),
    ],
)
def test_a_pattern_is_what_it_matches(tree: Path, pattern: str, wanted: list[str], videos: list[str]) -> None:
    """Ids are below the part without wildcards."""
    found = find_source(str(tree / pattern))
    assert ids(found) == wanted
    assert [video.name for video in found.videos] == videos


def test_one_file_is_taken_whatever_it_is_called(tree: Path) -> None:
    assert ids(find_source(str(tree / "one/a.png"))) == ["a"]
    assert ids(find_source(str(tree / ".hidden.png"))) == [".hidden"]
    touch(tree, "x.y.dat", "odd[1]*.png")
    assert ids(find_source(str(tree / "x.y.dat"))) == ["x.y"]
    assert ids(find_source(str(tree / "odd[1]*.png"))) == ["odd[1]*"]  # it is there, so it is no pattern
    (video,) = find_source(str(tree / "drive.mp4")).videos
    assert video.name == "drive" and video.file.uri == str(tree / "drive.mp4")


def test_names_that_would_be_the_same_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.mp4", "b.png")
    found = find_source(f"{tmp_path}/*")
    assert ids(found) == ["a.png", "b"] and found.videos[0].name == "a.mp4"


def test_a_name_that_no_table_can_hold_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "good.png")
    with open(os.fsencode(tmp_path) + b"/latin \xe9.png", "wb"):
        pass
    found = find_source(str(tmp_path))
    assert ids(found) == ["good"]
    assert [(row["frame_id"], row["reason"]) for row in found.bad] == [(r"latin \udce9", "unreadable")]


def test_a_frame_table_keeps_its_ids_and_is_read_where_it_lies(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"frame_id": ["night/1", "night/2"], "uri": ["x/1.png", "/abs/2.png"], "sha256": ["0", None]}
    Location.of(tmp_path / "f.parquet").write_table(pa.table(rows | {"domain": ["night", "day"]}))
    assert find_source(str(tmp_path / "f.parquet")).images == [
        {"frame_id": "night/1", "uri": str(tmp_path / "x/1.png"), "sha256": "0"},
        {"frame_id": "night/2", "uri": "/abs/2.png", "sha256": None},
    ]
    Location.of(tmp_path / "none.parquet").write_table(pa.table(rows).slice(0, 0))
    with pytest.raises(UserError, match="has no row"):
        find_source(str(tmp_path / "none.parquet"))


def test_another_store_is_searched_in_the_same_way() -> None:
    root = Location.of("memory://sources-test")
    for name in ("a.png", "one/b.png", "one/c.txt"):
        (root / name).write_bytes(b"x")
    assert ids(find_source(root.uri)) == ["a", "one/b"]
    assert ids(find_source(f"{root.uri}/*/*.png")) == ["one/b"]
    assert find_source(f"{root.uri}/**").images[1]["uri"] == "memory://sources-test/one/b.png"


def test_the_identity_changes_with_the_files(tree: Path) -> None:
    before = find_source(str(tree)).identity
    assert find_source(str(tree)).identity == before
    (tree / "a.png").write_bytes(b"changed")
    changed = find_source(str(tree)).identity
    touch(tree, "two/g.png")
    assert len({before, changed, find_source(str(tree)).identity}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no such file or folder. Cure: check the path; quote a pattern"),
        ("*.tif", "no file matches this pattern"),
        ("nowhere/*.png", "no file matches this pattern"),
        ("**/*.txt", "2 files match, none is an image or a video"),
        ("empty", r"/empty: there is no image; looked for .*videos need a pattern: '.*/empty/\*.mp4'"),
    ],
)
def test_nothing_to_read_is_said(tree: Path, source: str, message: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_source(str(tree / source))
