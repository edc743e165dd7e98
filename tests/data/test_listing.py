"""Which files a folder means: links, hidden files, what nightseg wrote, what cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nightseg.data.layouts import list_frames
from nightseg.data.listing import files_below
from nightseg.data.pairing import pair_up
from nightseg.data.settings import FolderDataset
from nightseg.data.sources import find_source
from nightseg.storage import Location, UserError

CARD = json.dumps({"save": ["mask", "color"], "model": "m", "taxonomy": "camvid11", "sha256": {}})


def touch(root: Path, *names: str) -> Location:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(CARD if name.endswith("prediction.json") else name)
    return Location.of(root)


def listed(root: Location, **options: Any) -> list[str]:
    return [entry.name for entry in files_below(root, (".png", ".jpg"), **options)]


def everywhere(root: Location) -> list[list[str]]:
    """Ids by each way that names frames; they agree."""
    dataset = FolderDataset(layout="images", root=root.uri)
    found, matched = find_source(root.uri), find_source(f"{root.uri}/**")
    return [
        [one.frame_id.removeprefix("d/") for one in list_frames(dataset, "d")],
        sorted(row["frame_id"] for row in [*found.images, *found.bad]),
        sorted(row["frame_id"] for row in [*matched.images, *matched.bad]),
    ]


def test_pictures_and_videos_of_other_formats_are_said(tmp_path: Path) -> None:
    """Where frames are looked for: not among masks, not where they are asked for, and nothing of other files."""
    root, said = touch(tmp_path, "a.png", "b.GIF", "deep/c.heic", "d.flv", "notes.txt", ".e.gif", "f.jpe"), list[str]()
    assert listed(root, say=said.append) == ["a.png"]
    assert said == [f"{root}: 4 pictures or videos of other formats are left out (b.GIF, d.flv, deep/c.heic, f.jpe)"]
    assert listed(root, say=said.append, predictions=True) == ["a.png"]
    assert [entry.name for entry in files_below(root, (".png", ".gif", ".flv"), depth=1, say=said.append)][1:] == [
        *("b.GIF", "d.flv"),
    ]
    assert said[1:] == [f"{root}: 1 pictures or videos of other formats are left out (f.jpe)"]


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_are_followed_everywhere_alike(tmp_path: Path) -> None:
    touch(tmp_path, "disk/1.png", "disk/deep/2.png", "other.png", "set/0.png")
    root = tmp_path / "set"
    (root / "more").symlink_to(tmp_path / "disk")
    (root / "9.png").symlink_to(tmp_path / "other.png")
    assert everywhere(Location.of(root)) == [["0", "9", "more/1", "more/deep/2"]] * 3
    (tmp_path / "way").symlink_to(root)
    assert everywhere(Location.of(tmp_path / "way")) == [["0", "9", "more/1", "more/deep/2"]] * 3


def test_circles_end_and_a_second_way_counts_once_and_is_said(tmp_path: Path) -> None:
    root = touch(tmp_path, "b/1.png", "b/c/2.png", "d/3.png")
    (tmp_path / "a").symlink_to(tmp_path / "b")  # before the real one in the order of names
    (tmp_path / "b/c/up").symlink_to(tmp_path)
    (tmp_path / "d/self").symlink_to(tmp_path / "d")
    (tmp_path / "b/x").symlink_to(tmp_path / "d")  # and back: folders that link to each other
    (tmp_path / "d/y").symlink_to(tmp_path / "b")
    (tmp_path / "0 latest.png").symlink_to(tmp_path / "d/3.png")
    notes: list[str] = []
    assert listed(root, say=notes.append) == ["b/1.png", "b/c/2.png", "d/3.png"]
    assert "0 latest.png: links to files that are listed already" in notes[0]
    assert f"a (a link to {tmp_path}/b, which is listed already)" in notes[1]
    assert f"b/c/up (a link to {tmp_path}, which" in notes[1]


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    assert listed(root) == ["a.png", "b.png"]


def test_two_links_to_one_file_elsewhere_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "x.png", "set/z.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "x.png")
    assert listed(Location.of(tmp_path / "set")) == ["a.png", "z.png"]
    assert listed(Location.of(tmp_path / "set"), predictions=True) == ["a.png", "b.png", "z.png"], "each is a frame's"


def test_links_that_lead_nowhere_and_what_is_no_file_are_bad_frames(tmp_path: Path) -> None:
    root = touch(tmp_path, "good.png")
    (tmp_path / "gone.png").symlink_to("/nowhere/x.png")
    (tmp_path / "2024-05_drive").symlink_to("/unmounted")  # it may have held thousands
    (tmp_path / "notes.txt").symlink_to("/nowhere.txt")
    (tmp_path / "round.png").symlink_to("round.png")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    assert everywhere(root)[0] == ["2024-05_drive", "gone", "good", "pipe", "round"]
    assert everywhere(root)[1:] == [everywhere(root)[0]] * 2
    reasons = {row["frame_id"]: row["detail"] for row in find_source(root.uri).bad}
    assert reasons == {
        "2024-05_drive": "a link to /unmounted that leads nowhere",
        "gone": "a link to /nowhere/x.png that leads nowhere",
        "pipe": "a pipe, socket or device, and no file",
        "round": "a link to round.png that leads in a circle",
    }
    notes: list[str] = []
    listed(root, say=notes.append)
    assert notes == [f"{tmp_path}: notes.txt (a link to /nowhere.txt that leads nowhere): left out"]
    with pytest.raises(UserError, match=r"pipe\.jpg: a pipe, socket or device"):
        find_source(str(tmp_path / "pipe.jpg"))


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A patched call, because tests may run as root, who may read everything."""
    root = touch(tmp_path, "a/1.png", "secret/2.png")
    real = getattr(os, call)

    def refuse(path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, call, refuse)
    for ask in (listed, everywhere, lambda place: pair_up(place, place)):
        with pytest.raises(UserError, match=r"/secret: it may not be read, so what lies there would be missing. Cure"):
            ask(root)


def test_labels_behind_links_are_scored_and_broken_ones_named(tmp_path: Path) -> None:
    touch(tmp_path, "pred/a/1.png", "pred/b/2.png", "disk/2.png", "gt/a/1.png")
    (tmp_path / "gt/b").symlink_to(tmp_path / "disk")
    places = Location.of(tmp_path / "pred"), Location.of(tmp_path / "gt")
    assert [(p.prediction.name, p.label.name) for p in pair_up(*places)] == [
        ("a/1.png", "a/1.png"),
        ("b/2.png", "b/2.png"),
    ]
    (tmp_path / "gt/c").symlink_to("/unmounted")
    with pytest.raises(UserError, match=r"1 of 3 labels .*: c \(a link to /unmounted that leads nowhere\)"):
        pair_up(*places)


# -- what is not meant -----------------------------------------------------------------------------------------------


def test_what_systems_put_between_files_is_not_meant(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        *("a.PNG", "b/c.jpg", ".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", "b/._c.jpg", "a.png:Zone.Identifier"),
        *("@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/b/._c.jpg", "__MACOSX/c.jpg", "$RECYCLE.BIN/x.png"),
        *("lost+found/y.png", "System Volume Information/z.png", ".Trash-0/t.png", "#recycle/r.png", "c.png.part"),
    )
    assert everywhere(root) == [["a", "b/c"]] * 3
    assert listed(touch(tmp_path / "@eaDir")) == ["a.png/SYNOPHOTO_THUMB_XL.jpg"], "named on purpose"


def test_what_nightseg_wrote_below_is_left_out_and_said(tmp_path: Path) -> None:
    run = "runs/demo/stages/translate/night/0123/attempt-1"
    root = touch(
        tmp_path,
        *("a.jpg", "b/c.jpg", "b/masks/prediction.json", "b/masks/c.png", "b/masks/color/c.png"),
        *(f"{run}/attempt.json", f"{run}/images/t.png", "runs/demo/recipe.yaml"),
        *("stopped/.work/stages/predict/images/x", "stopped/a.png"),
    )
    assert everywhere(root) == [["a", "b/c"]] * 3
    assert [row["frame_id"] for row in find_source(f"{tmp_path}/*/*").images] == ["b/c"]
    notes: list[str] = []
    listed(root, say=notes.append)
    (note,) = notes
    assert note.startswith(f"{tmp_path}: 3 files that nightseg wrote are left out (")


def test_what_nightseg_wrote_is_read_where_it_is_named(tmp_path: Path) -> None:
    run = "demo/stages/translate/night/0123/attempt-1"
    touch(tmp_path, f"{run}/attempt.json", f"{run}/images/t.png", "p/day/prediction.json", "p/day/a.png")
    touch(tmp_path, "p/day/color/a.png", "p/night/b.png", "p/night/prediction.json", "p/night/overlay/b.jpg")
    assert listed(Location.of(tmp_path / "demo")) == [f"{run.removeprefix('demo/')}/images/t.png"]
    assert listed(Location.of(tmp_path / run)) == ["images/t.png"]
    assert listed(Location.of(tmp_path / "p/day")) == ["a.png"], "masks, not what is coloured for people"
    assert listed(Location.of(tmp_path / "p/day/color")) == ["a.png"]
    assert listed(Location.of(tmp_path / "p")) == ["day/a.png", "night/b.png", "night/overlay/b.jpg"]
    assert [row["frame_id"] for row in find_source(f"{tmp_path}/p/day/*.png").images] == ["a"]


def test_a_prediction_json_of_another_program_is_no_sign(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.png")
    for content in (b'{"boxes": []}', b"[1]", b"\xff", b"", b'{"save": 1, "model": 1, "taxonomy": 1, "sha256": 1}'):
        (tmp_path / "a/prediction.json").write_bytes(content)
        (tmp_path / "2.png").write_bytes(b"")
        assert listed(root) == ["2.png", "a/1.png"]


def test_predictions_and_labels_may_lie_in_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "gt/1.png", "gt/pred/1.png", "gt/pred/prediction.json", "gt/pred/color/1.png")
    inside = pair_up(Location.of(tmp_path / "gt/pred"), Location.of(tmp_path / "gt"))
    assert [(pair.prediction.name, pair.label.name) for pair in inside] == [("1.png", "1.png")]
    touch(tmp_path, "pred/2.png", "pred/gt/deep/2.png")
    around = pair_up(Location.of(tmp_path / "pred"), Location.of(tmp_path / "pred/gt"))
    assert [(pair.prediction.name, pair.label.name) for pair in around] == [("2.png", "deep/2.png")]
    touch(tmp_path, "own/mask/3.png", "own_gt/3.png")  # a user's own folder may be called like ours
    (pair,) = pair_up(Location.of(tmp_path / "own"), Location.of(tmp_path / "own_gt"))
    assert pair.prediction.name == "mask/3.png"


def test_another_store_keeps_to_the_same_rules() -> None:
    root = Location.of("memory://listing-test")
    names = ("a.png", "b/c.JPG", "__MACOSX/a.png", ".hidden/a.png", "m/color/a.png", "r/attempt-1/images/a.png")
    for name in names:
        (root / name).write_bytes(b"x")
    (root / "m/prediction.json").write_bytes(CARD.encode())
    (root / "r/attempt-1/attempt.json").write_bytes(b"{}")
    assert everywhere(root) == [["a", "b/c"]] * 3
    assert listed(root / "r") == ["attempt-1/images/a.png"]


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "drive [night]/a.jpg", "drive n/b.jpg", "drive [night]/x*y/c.jpg", "drive [night]/xzy/d.jpg")
    touch(tmp_path, "q?/[1]/e.jpg", "q1/1/f.jpg", "day/[1]/g.jpg", "day/1/h.jpg", "day/[12]/i.jpg")

    def ids(pattern: str) -> list[str]:
        return [row["frame_id"] for row in find_source(f"{tmp_path}/{pattern}").images]

    assert ids("drive [night]/*.jpg") == ["a"]
    assert ids("drive [night]/**") == ["a", "x*y/c", "xzy/d"]
    assert ids("drive [night]/x*y/*") == ["c"]
    assert ids("drive [night]/x*/*") == ["x*y/c", "xzy/d"]
    assert ids("drive [n]/*.jpg") == ["drive n/b"]
    assert ids("q?/[1]/*") == ["e"]
    assert ids("*/[1]/*") == ["day/[1]/g", "q1/1/f", "q?/[1]/e"]
    assert ids("drive [night]") == ["a", "x*y/c", "xzy/d"]


def test_hidden_files_are_matched_where_the_pattern_says_so(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/.a.png", ".cache/b.png", ".c.png", "d.png")
    assert [row["frame_id"] for row in find_source(f"{tmp_path}/.*/*").images] == [".cache/b"]
    assert [row["frame_id"] for row in find_source(f"{tmp_path}/.*.png").images] == [".c"]
    assert [row["frame_id"] for row in find_source(f"{tmp_path}/.cache/*").images] == ["b"]


def test_lists_are_refused_with_what_to_do(tmp_path: Path) -> None:
    touch(tmp_path, "train.txt", "a.png")
    with pytest.raises(UserError, match=r"train.txt: a list of names, and lists are not read. Cure: .*frame table"):
        find_source(str(tmp_path / "train.txt"))
    with pytest.raises(UserError, match=r"a file, and no folder of images: .*a\.png"):
        list_frames(FolderDataset(layout="images", root=str(tmp_path / "a.png")), "d")
