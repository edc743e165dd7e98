"""A program of the user: what it is given, what it may leave, and what happens when it does not."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import BadFrame, encode_png, read_image
from nightseg.errors import UserError
from nightseg.storage import Location
from nightseg.translators.command import Program, plain_name, translate_by

CLASSES = taxonomy("camvid11")
INVERT = """
import pathlib, sys
from PIL import Image
for file in pathlib.Path(sys.argv[1]).iterdir():
    Image.open(file).point(lambda value: 255 - value).save(pathlib.Path(sys.argv[2]) / file.name)
"""
SECOND = INVERT + "file = sorted(pathlib.Path(sys.argv[2]).iterdir())[1]; "
BESIDE = INVERT + "beside = pathlib.Path(sys.argv[2]) / 'log.txt'; "


def program(script: str, *more: str) -> Program:
    return Program((sys.executable, "-c", script, "{input}", "{output}", *more), "night", 7, None)


def frames(folder: Path, names: Sequence[str], size: tuple[int, int] = (6, 8)) -> list[dict[str, Any]]:
    rows = []
    for index, name in enumerate(names):
        image = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        file = folder / f"{index}.png"
        file.write_bytes(encode_png(image))
        rows.append({"frame_id": name, "uri": str(file)})
    return rows


def made(chosen: Program, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray | BadFrame]:
    results = list(translate_by(chosen, rows, CLASSES))
    assert [row["frame_id"] for row, _ in results] == [row["frame_id"] for row in rows]
    return [image for _, image in results]


def test_every_frame_comes_back_in_order(tmp_path: Path) -> None:
    rows = frames(tmp_path, ["day/b", "day/a", "other/a"])
    for row, image in zip(rows, made(program(INVERT), rows), strict=True):
        assert np.array_equal(image, 255 - read_image(Location.of(row["uri"])))


def test_names_with_spaces_and_accents_and_long_ones(tmp_path: Path) -> None:
    names = ["day/the first frame", "day/Straße 3 été", "day/" + "x" * 300, "a/day/the first frame", "day/-rf"]
    rows = frames(tmp_path, names)
    assert all(isinstance(image, np.ndarray) for image in made(program(INVERT), rows))
    plain = [plain_name(name) for name in names]
    assert len(set(plain)) == 5 and all("/" not in name and len(name) < 120 for name in plain)
    assert plain[0].startswith("the first frame-") and plain[0].endswith(".png")


def test_nothing_is_read_by_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = ["day/a; touch pwned", "day/$(touch pwned)", "day/`touch pwned`", "day/'\"&|<>*?", "day/a\nb"]
    rows = frames(tmp_path, hostile)
    words = ["$HOME", "; touch pwned", "$(touch pwned)", "{to}-{seed}", "{'a': {}}", "{seed}{seed}"]
    script = INVERT + "import json; open('words.json', 'w').write(json.dumps(sys.argv[3:]))"
    assert all(isinstance(image, np.ndarray) for image in made(program(script, *words), rows))
    assert json.loads((tmp_path / "words.json").read_text()) == [*words[:3], "night-7", "{'a': {}}", "77"]
    assert not (tmp_path / "pwned").exists()


def test_a_placeholder_in_a_folders_name_is_not_filled_in() -> None:
    asked = Program(("run", "--in={input}", "{output}"), "night", 7, None)
    assert asked.words({"input": Path("/x/{seed}"), "output": Path("/y")}) == ["run", "--in=/x/{seed}", "/y"]


def test_labels_are_there_as_train_ids_for_who_asks(tmp_path: Path) -> None:
    rows = frames(tmp_path, ["day/a", "day/b"])
    label = np.full((6, 8), 11, dtype=np.uint8)
    label[0] = 3
    (tmp_path / "label.png").write_bytes(encode_png(label))
    rows[0] |= {"label_uri": str(tmp_path / "label.png"), "label_encoding": "camvid12"}
    script = (
        INVERT.replace("argv[2]", "argv[3]")
        + f"""
labels = list(pathlib.Path(sys.argv[2]).iterdir())
assert [file.name for file in labels] == ["{plain_name("day/a")}"]
assert sorted(set(Image.open(labels[0]).tobytes())) == [3, 255]
"""
    )
    chosen = Program((sys.executable, "-c", script, "{input}", "{labels}", "{output}"), "night", 0, None)
    assert all(isinstance(image, np.ndarray) for image in made(chosen, rows))


def test_frames_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    rows = frames(tmp_path, ["day/a", "day/b", "day/c"])
    (tmp_path / "1.png").write_bytes(b"no image")
    first, second, third = made(program(INVERT), rows)
    assert isinstance(first, np.ndarray) and isinstance(third, np.ndarray)
    assert isinstance(second, BadFrame) and second.reason == "not_an_image"
    (found,) = made(Program(("/does/not/exist", "{input}", "{output}"), "night", 0, None), rows[1:2])
    assert isinstance(found, BadFrame)  # without a frame nothing is started


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('no \\x1b[31mweights'); raise SystemExit(3)", r"exit code 3; it printed last:\n  no .*weights"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9. Cure: run it by hand"),
        ("pass", r"left 0 files for 3 frames: 3 are missing \(a-.*\.png, b-.*\.png, c-.*\.png\)\. Cure: let it write"),
        (BESIDE + "beside.write_text('')", r"left 4 files .*1 were not asked for \(log\.txt\)"),
        (INVERT.replace("file.name", "(file.stem + '.jpg')"), "3 are missing .* and 3 were not asked for"),
        (INVERT.replace(".point(", ".resize((4, 3)).point("), r"made a-.*\.png 4 x 3 pixels large, the frame is 8 x 6"),
        (SECOND + "file.write_text('x')", r"left b-.*\.png, which is no image"),
        (SECOND + "file.write_bytes(file.read_bytes()[:60])", "which is no whole image"),
        (BESIDE + "beside.mkdir()", r"1 were not asked for \(log\.txt\)"),
    ],
)  # fmt: skip
def test_what_breaks_the_agreement_is_named(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        made(program(script), frames(tmp_path, ["day/a", "day/b", "day/c"]))
    assert "\x1b" not in str(caught.value)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    rows = frames(tmp_path, ["day/a"])
    for word, why in (("/does/not/exist", "No such file"), (str(tmp_path / "0.png"), "Permission denied")):
        with pytest.raises(UserError, match=rf"the program {word} cannot be started here: {why}"):
            made(Program((word, "{input}", "{output}"), "night", 0, None), rows)
    with pytest.raises(UserError, match="cannot be passed on"):
        made(Program((sys.executable, "\0", "{input}", "{output}"), "night", 0, None), rows)


def test_a_program_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    words = ("sh", "-c", 'sleep 600 & echo $! > "$3"; echo waiting; wait', "sh", "{input}", "{output}", str(pids))
    with pytest.raises(
        UserError, match=r"sh was stopped after 1\.5 seconds; .*\n  waiting. Cure: raise `timeout_seconds`"
    ):
        made(Program(words, "night", 0, 1.5), frames(tmp_path, ["day/a"]))
    status = Path(f"/proc/{pids.read_text().strip()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the child is still running")
