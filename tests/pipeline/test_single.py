"""Two folders of label images: pairing, encodings, scores that are known, and the same through actors."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.encodings import UnclearLabels
from nightseg.data.images import encode_png
from nightseg.metrics.boundary import boundary_counts, boundary_scores
from nightseg.metrics.confusion import confusion_matrix
from nightseg.pipeline import single
from nightseg.progress import LineProgress, SilentProgress
from nightseg.recipe.types import Evaluation
from nightseg.stages.evaluate import PairCounter
from nightseg.storage import Location, UserError

LABEL = np.array([[0, 0, 3], [3, 3, 11]], dtype=np.uint8)
GUESS = np.array([[0, 3, 3], [3, 3, 0]], dtype=np.uint8)


def folders(
    tmp_path: Path, predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[Location, Location]:
    for folder, files in (("predictions", predictions), ("labels", labels)):
        for name, array in files.items():
            (Location.of(tmp_path / folder) / name).write_bytes(encode_png(array))
    return Location.of(tmp_path / "predictions"), Location.of(tmp_path / "labels")


def evaluate_folders(
    predictions: Location, labels: Location, taxonomy: str = "camvid11", *, boundary: float | None = None, **more: Any
) -> dict[str, Any]:
    compute = MapCompute(actors=more.pop("actors", 0), shard_rows=2)
    more = {"progress": SilentProgress(), "evaluation": Evaluation(boundary=boundary), "compute": compute} | more
    return single.evaluate_folders(predictions, labels, taxonomy, **more)


def test_masks_of_another_taxonomy_are_refused(tmp_path: Path) -> None:
    predictions, labels = folders(tmp_path, {"mask/a.png": GUESS}, {"a.png": LABEL})
    card = {"model": "m", "taxonomy": "cityscapes19", "sha256": {}, "save": ["mask"]}
    (predictions / "prediction.json").write_json(card)
    for masks in (predictions, predictions / "mask"):
        with pytest.raises(UserError, match="train ids of the taxonomy cityscapes19, and not of camvid11"):
            evaluate_folders(masks, labels)
    (predictions / "prediction.json").write_json(card | {"taxonomy": "camvid11"})
    assert evaluate_folders(predictions / "mask", labels)["frames"] == 1


def test_folders_are_paired_by_name_and_scored(tmp_path: Path) -> None:
    where = folders(
        tmp_path, {"a b.png": GUESS, "é.png": GUESS, "extra.png": GUESS}, {"a b.png": LABEL, "é.png": LABEL}
    )
    found = evaluate_folders(*where)
    assert (found["frames"], found["label_encoding"], found["taxonomy"]) == (2, "camvid12", "camvid11")
    assert found["confusion"][0][0] == 2 and found["confusion"][0][3] == 2 and found["confusion"][3][3] == 6
    assert found["pa"] == 0.8 and found["iou"]["sky"] == 0.5 and found["iou"]["road"] == 0.75
    assert found["miou"] == 0.625
    assert found["iou"]["tree"] is None
    assert found.keys() == {
        *(
            "pa",
            "ca",
            "miou",
            "fwiou",
            "iou",
            "confusion",
            "absent_class",
            "frames",
            "taxonomy",
            "label_encoding",
            "labels",
            "quarantined",
        )
    }


@pytest.mark.parametrize("actors", [0, pytest.param(1, marks=pytest.mark.ray)])
def test_a_share_of_damaged_files_may_be_left_out_and_is_told(
    actors: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """A cut prediction and a label without pixels, of six frames; the others have the scores that they have alone."""
    if actors:
        request.getfixturevalue("ray_cluster")
    names = [f"{name}.png" for name in "abcdef"]
    where = folders(tmp_path, dict.fromkeys(names, GUESS), dict.fromkeys(names, LABEL))
    (where[0] / "b.png").write_bytes((where[0] / "b.png").read_bytes()[:50])
    (where[1] / "e.png").write_bytes(b"")
    for too_few, match in ((0.0, r"b\.png: truncated"), (0.3, r"(?s)2 of 6 frames.*b\.png.*e\.png")):
        with pytest.raises(UserError, match=match) as caught:
            evaluate_folders(*where, actors=actors, max_bad_fraction=too_few)
        assert "max_bad_fraction" in str(caught.value)
    found = evaluate_folders(*where, actors=actors, max_bad_fraction=0.34, progress=LineProgress(sys.stderr))
    assert (found["frames"], found["quarantined"], found["miou"]) == (4, 2, 0.625)
    told = capsys.readouterr().err
    assert "warning: 2 of 6 frames are bad and not scored: " in told and "b.png: truncated" in told
    assert found["labels"]["files"] == 4
    for name in names:
        (where[0] / name).write_bytes(b"")
    with pytest.raises(UserError, match="6 of 6 frames"):
        evaluate_folders(*where, actors=actors, max_bad_fraction=1.0)


def test_train_ids_are_preferred_and_an_encoding_can_be_asked_for(tmp_path: Path) -> None:
    train_ids = np.where(LABEL == 11, 255, LABEL).astype(np.uint8)
    where = folders(tmp_path, {"a.png": GUESS}, {"a.png": train_ids})
    assert evaluate_folders(*where)["label_encoding"] == "train_ids"
    assert evaluate_folders(*where)["miou"] == 0.625
    with pytest.raises(UserError, match=r"^.*a\.png: ids 255 \(1 pixels\) are not in the encoding camvid12 of"):
        evaluate_folders(*where, label_encoding="camvid12")
    with pytest.raises(UserError, match="no label encoding 'camvid'"):
        evaluate_folders(*where, label_encoding="camvid")


def test_cityscapes_names_belong_together(tmp_path: Path) -> None:
    """Road is 7 and car 26 in labelIds, 0 and 13 in train ids."""
    label_ids = np.array([[7, 26], [7, 4]], dtype=np.uint8)
    guess = np.array([[0, 13], [13, 0]], dtype=np.uint8)
    where = folders(
        tmp_path,
        {"x_000_leftImg8bit.png": guess, "color/x_000_leftImg8bit.png": guess},
        {"city/x_000_gtFine_labelIds.png": label_ids, "city/x_000_gtFine_color.png": label_ids,
         "city/x_000_gtFine_instanceIds.png": label_ids},
    )  # fmt: skip
    found = evaluate_folders(*where, taxonomy="cityscapes19")
    assert found["label_encoding"] == "label_ids"
    assert found["pa"] == 2 / 3
    # train ids beside them are taken instead
    train_ids = np.array([[0, 13], [0, 255]], dtype=np.uint8)
    (where[1] / "city/x_000_gtFine_labelTrainIds.png").write_bytes(encode_png(train_ids))
    again = evaluate_folders(*where, taxonomy="cityscapes19")
    assert again["label_encoding"] == "train_ids" and again["confusion"] == found["confusion"]


@pytest.mark.parametrize(
    ("prediction", "label", "told"),
    [
        ("{}.png", "{}_semseg.png", "labels are called NAME_semseg: compared by NAME"),
        ("{}.png", "mask_{}.png", "labels are called mask_NAME: compared by NAME"),
        ("d1/{}_left.png", "d1/{}_seg.png", "predictions are called NAME_left: compared by NAME"),
    ],
)
def test_what_the_names_of_one_side_have_in_common_is_left_out(
    tmp_path: Path, prediction: str, label: str, told: str
) -> None:
    stream, names = io.StringIO(), ("a1", "a2", "b7")
    guesses = {prediction.format(name): np.full((2, 3), number, np.uint8) for number, name in enumerate(names)}
    labels = {label.format(name): np.full((2, 3), number, np.uint8) for number, name in enumerate(names)}
    where = folders(tmp_path, guesses | {prediction.format("c9"): GUESS}, labels)
    assert evaluate_folders(*where, label_encoding="train_ids", progress=LineProgress(stream))["miou"] == 1.0
    assert told in stream.getvalue()
    (where[1] / label.format("gone")).write_bytes(encode_png(LABEL))
    with pytest.raises(UserError, match="have no prediction"):
        evaluate_folders(*where)


def test_the_name_decides_where_values_could_be_either(tmp_path: Path) -> None:
    """Raw ids 7 and 11 are also train ids, but a file called labelIds holds label ids: road and building."""
    where = folders(
        tmp_path, {"x.png": np.array([[0, 2]], np.uint8)}, {"x_gtFine_labelIds.png": np.array([[7, 11]], np.uint8)}
    )
    assert evaluate_folders(*where, taxonomy="cityscapes19")["pa"] == 1.0


def test_an_undecided_pixel_is_wrong(tmp_path: Path) -> None:
    undecided = GUESS.copy()
    undecided[0, 0] = 255
    where = folders(tmp_path, {"a.png": undecided}, {"a.png": LABEL})
    assert evaluate_folders(*where)["pa"] == 3 / 5


def test_folder_errors_name_the_files(tmp_path: Path) -> None:
    def refused(name: str, predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray], match: str) -> None:
        where = folders(tmp_path / name, predictions, labels)
        with pytest.raises(UserError, match=match):
            evaluate_folders(*where)

    with pytest.raises(UserError, match="predictions: there is no folder"):
        evaluate_folders(Location.of(tmp_path / "no"), Location.of(tmp_path / "no"))
    refused("1", {"a.png": GUESS}, {"a.png": LABEL, "b.png": LABEL}, r"1 of 2 labels .* have no prediction.*b\.png")
    refused("2", {"a.png": GUESS[:1]}, {"a.png": LABEL}, r"3 x 1, its label .* 3 x 2")
    refused("3", {"a.png": GUESS + np.uint8(20)}, {"a.png": LABEL}, r"holds 20, 23, which are no train ids of camvid11")
    refused(
        "4",
        {"a.png": GUESS},
        {"a.png": LABEL + np.uint8(60)},
        r"no encoding of camvid11 knows.*a\.png: ids 60 \(2 pixels\), 63 .*, 71 .* are not in .*camvid12",
    )
    refused("5", {"a.png": GUESS}, {"a.png": np.full((2, 3), 11, np.uint8)}, "none of the 1 labels")
    refused("6", {"a.png": GUESS}, {"x/a.png": LABEL, "y/a.png": LABEL}, "occurs more than once")
    (Location.of(tmp_path / "7/predictions") / "a.png").write_bytes(b"text")
    refused("7", {}, {"a.png": LABEL}, r"a\.png: not_an_image")
    refused("8", {"a.jpg": GUESS}, {"a.png": LABEL}, "there is no PNG")


def test_the_encoding_is_the_one_that_knows_every_file(tmp_path: Path) -> None:
    """The first file could be train ids (wall, pole, ...) or label ids (void, ...); the second decides."""
    either, label_ids = np.array([[3, 5], [7, 7]], np.uint8), np.array([[26, 7], [7, 7]], np.uint8)
    guess = np.array([[13, 0], [0, 0]], np.uint8)
    where = folders(tmp_path, {"a.png": guess, "b.png": guess}, {"a.png": either, "b.png": label_ids})
    found = evaluate_folders(*where, taxonomy="cityscapes19")
    assert found["label_encoding"] == "label_ids"
    expected = confusion_matrix(np.array([[255, 255, 0, 0], [13, 0, 0, 0]]), np.tile(guess.reshape(1, 4), (2, 1)), 19)
    assert found["confusion"] == expected.tolist()


def test_files_that_exclude_each_others_encoding_are_named(tmp_path: Path) -> None:
    both, guess = np.array([[255, 11]], np.uint8), np.zeros((1, 2), np.uint8)
    where = folders(
        tmp_path,
        {"a.png": guess, "b.png": guess},
        {"a.png": both[:, :1].repeat(2, 1), "b.png": both[:, 1:].repeat(2, 1)},
    )
    with pytest.raises(UserError) as refused:
        evaluate_folders(*where)
    assert f"{where[1].uri}/b.png: ids 11 (2 pixels) are not in the encoding train_ids" in str(refused.value)
    assert f"{where[1].uri}/a.png: ids 255 (2 pixels) are not in the encoding camvid12" in str(refused.value)


def areas(seed: int, values: int, height: int = 40, width: int = 60, block: int = 5) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, values, (height // block, width // block), dtype=np.uint8)
    return np.kron(coarse, np.ones((block, block), np.uint8))


@pytest.fixture
def many(tmp_path: Path) -> tuple[Location, Location]:
    labels = {f"{index:02d}.png": areas(index, 12) for index in range(7)}
    guesses = {
        name: np.roll(np.where(label == 11, 0, label), 2, axis=1).astype(np.uint8) for name, label in labels.items()
    }
    return folders(tmp_path, guesses, labels)


def test_boundary_iou_is_that_of_all_frames_together(many: tuple[Location, Location]) -> None:
    found = evaluate_folders(*many, boundary=0.03)
    counts = np.zeros((11, 3), np.int64)
    for index in range(7):
        raw = areas(index, 12)
        guess = np.roll(np.where(raw == 11, 0, raw), 2, axis=1)
        counts += boundary_counts(np.where(raw == 11, 255, raw), guess, 11, 0.03)
    assert found["boundary"]["counts"] == counts.tolist()
    assert found["boundary"]["miou"] == boundary_scores(counts).miou < found["miou"]
    plain = evaluate_folders(*many)
    assert plain == {key: value for key, value in found.items() if key != "boundary"}


def test_progress_is_shown(many: tuple[Location, Location]) -> None:
    stream = io.StringIO()
    evaluate_folders(*many, progress=LineProgress(stream))
    assert "evaluate" in stream.getvalue() and "7" in stream.getvalue()


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which pairs begin the shards that were done. A negative number in front, -n, stops the next pass after n shards,
    as a kill would."""
    done: list[int] = []
    count = PairCounter.__call__

    def stopped(self: PairCounter, rows: Any, folder: Location) -> Any:
        if done and done[0] == -sum(number >= 0 for number in done):
            raise KeyboardInterrupt
        done.append(int(Location.of(rows["label_uri"][0].as_py()).name[:2]))
        return count(self, rows, folder)

    monkeypatch.setattr(PairCounter, "__call__", stopped)
    return done


def test_an_interrupted_pass_continues_where_it_may_keep_what_is_done(
    many: tuple[Location, Location], shards: list[int], tmp_path: Path
) -> None:
    expected = evaluate_folders(*many, boundary=0.02)
    shards[:] = [-3]
    work = Location.of(tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(*many, boundary=0.02, work=work)
    assert shards == [-3, 0, 2, 4] and (work / ".evaluate.work").is_folder()
    shards.clear()
    assert evaluate_folders(*many, boundary=0.02, work=work) == expected
    assert shards == [6] and work.list() == []
    assert sorted(entry.name for entry in many[0].list()) == [f"{index:02d}.png" for index in range(7)]


def test_a_pass_that_asks_for_something_else_or_finds_other_files_begins_anew(
    many: tuple[Location, Location], shards: list[int], tmp_path: Path
) -> None:
    work = Location.of(tmp_path / "work")
    for change in ("nothing", "boundary", "files"):
        shards[:] = [-1]
        with pytest.raises(KeyboardInterrupt):
            evaluate_folders(*many, work=work)
        shards.clear()
        if change == "files":
            (many[0] / "06.png").write_bytes(encode_png(np.full((40, 60), 1, np.uint8)))
        boundary = 0.02 if change == "boundary" else None
        found = evaluate_folders(*many, work=work, boundary=boundary)
        assert shards == ([2, 4, 6] if change == "nothing" else [0, 2, 4, 6])
        assert found == evaluate_folders(*many, boundary=boundary)


def test_work_without_actors_imports_no_ray(many: tuple[Location, Location]) -> None:
    words = ["evaluate", *(folder.uri for folder in many), "--taxonomy", "camvid11"]
    code = f"import sys; from nightseg.cli.main import main; main({words}); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.ray
def test_through_ray_data(ray_cluster: None, many: tuple[Location, Location], tmp_path: Path) -> None:
    work = Location.of(tmp_path / "work")
    (work / "keep.txt").write_bytes(b"of the user")
    found = evaluate_folders(*many, actors=2, boundary=0.02, work=work)
    assert found == evaluate_folders(*many, boundary=0.02)
    assert [entry.name for entry in work.list()] == ["keep.txt"]
    (many[1] / "03.png").write_bytes(encode_png(np.full((40, 60), 99, np.uint8)))
    with pytest.raises(
        UserError, match=r"03\.png: ids 99 \(2400 pixels\) are not in the encoding train_ids or camvid12"
    ):
        evaluate_folders(*many, actors=1, work=work)


def test_labels_that_may_mean_several_things_are_asked_about(tmp_path: Path) -> None:
    """Raw ids of road, wall and building that are train ids as well: read so, perfect predictions would score 0."""
    raw, guess = np.array([[7, 12], [11, 0]], np.uint8), np.array([[0, 3], [2, 9]], np.uint8)
    where = folders(tmp_path, {"a.png": guess}, {"a.png": raw})
    with pytest.raises(UnclearLabels, match="may be train_ids or label_ids"):
        evaluate_folders(*where, taxonomy="cityscapes19")
    found = evaluate_folders(*where, taxonomy="cityscapes19", label_encoding="label_ids")
    assert (found["miou"], found["label_encoding"], found["labels"]["why"]) == (1.0, "label_ids", "as asked")


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    stream = io.StringIO()
    where = folders(tmp_path, {"a.png": GUESS}, {"a.png": LABEL})
    found = evaluate_folders(*where, progress=LineProgress(stream))
    assert "1 labels read as camvid12 (by their ids); 83.3 % of their pixels have a class" in stream.getvalue()
    assert found["labels"]["valid"] == 5 / 6 and "sky" not in found["labels"]["absent"]
    assert "tree" in found["labels"]["absent"]


def test_names_that_differ_within_a_folder_are_each_read_as_they_say(tmp_path: Path) -> None:
    guess = np.array([[0, 13], [2, 9]], np.uint8)
    where = folders(
        tmp_path,
        {"a.png": guess, "b.png": guess},
        {"a_labelIds.png": np.array([[7, 26], [11, 0]], np.uint8),
         "b_labelTrainIds.png": np.array([[0, 13], [2, 255]], np.uint8)},
    )  # fmt: skip
    found = evaluate_folders(*where, taxonomy="cityscapes19")
    assert (found["miou"], found["label_encoding"]) == (1.0, "label_ids (1 files), train_ids (1 files)")


def test_predictions_tell_that_ids_of_labels_begin_with_one(tmp_path: Path) -> None:
    """Void is 0, sky 1, ..., bicyclist 11: CamVid's own ids as well, by their values."""
    labels = areas(3, 12)
    guess = np.where(labels == 0, 3, labels - np.uint8(1)).astype(np.uint8)
    where = folders(tmp_path, {"a.png": guess}, {"a.png": labels})
    with pytest.raises(
        UnclearLabels, match=r"at 1?\d% of the pixels, but at 100% if their id k \+ 1 is class k"
    ) as asked:
        evaluate_folders(*where)
    assert asked.value.encodings == ("ids_from_one", "camvid12")
    assert evaluate_folders(*where, label_encoding="ids_from_one")["miou"] == 1.0
    assert evaluate_folders(*where, label_encoding="camvid12")["miou"] < 0.1, "whoever insists gets it"


def test_a_model_that_has_collapsed_is_scored(tmp_path: Path) -> None:
    """All sky, where nearly all is building, the class of the next id: no sign of ids that begin with one."""
    label = np.ones((8, 8), np.uint8)
    label[0, :3] = (0, 2, 3)
    where = folders(tmp_path, {"a.png": np.zeros((8, 8), np.uint8)}, {"a.png": label})
    assert evaluate_folders(*where)["pa"] == 1 / 64


def test_classes_that_are_mixed_up_are_told(tmp_path: Path) -> None:
    labels, order = areas(4, 11), np.random.default_rng(5).permutation(11).astype(np.uint8)
    stream = io.StringIO()
    where = folders(tmp_path, {"a.png": order[labels]}, {"a.png": labels})
    found = evaluate_folders(*where, progress=LineProgress(stream))
    assert "9 classes of the labels are others in the predictions" in found["warning"]
    assert found["warning"] in stream.getvalue()
    assert "warning" not in evaluate_folders(*folders(tmp_path / "good", {"a.png": labels}, {"a.png": labels}))


def noisy(labels: np.ndarray, values: int, wrong: float, seed: int = 9) -> np.ndarray:
    """What a model of this pixel accuracy says: a share of the areas has a random class."""
    is_wrong = areas(seed, 100) < 100 * wrong
    return np.where(is_wrong, areas(seed + 1, values), labels).astype(np.uint8)


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_predictions_that_are_no_train_ids_are_refused(tmp_path: Path, wrong: float) -> None:
    """Of a mediocre model, too: a shift up or down, label ids that happen to be below 19."""
    labels, far = areas(4, 10), areas(4, 6)
    good, label_ids = noisy(labels, 10, wrong), np.array([7, 8, 11, 12, 13, 17], np.uint8)
    shifts = {"up": good + np.uint8(1), "down": np.where(good == 0, 255, good - np.uint8(1)).astype(np.uint8)}
    for name, guess in shifts.items():
        where = folders(tmp_path / name, {"a.png": guess}, {"a_trainIds.png": labels})
        with pytest.raises(
            UserError, match=r"the predictions: they agree with the labels at .* if they are"
        ) as refused:
            evaluate_folders(*where, taxonomy="cityscapes19")
        assert ("ids_from_one" if name == "up" else "one too low") in str(refused.value)
        insisted = evaluate_folders(*where, taxonomy="cityscapes19", label_encoding="train_ids")
        assert insisted["miou"] < 0.1 and "the predictions: they agree" in insisted["warning"]
    where = folders(tmp_path, {"a.png": label_ids[noisy(far, 6, wrong)]}, {"a_trainIds.png": far})
    with pytest.raises(UserError, match="if they are label_ids"):
        evaluate_folders(*where, taxonomy="cityscapes19")
    assert "warning" not in evaluate_folders(*folders(tmp_path / "good", {"a.png": good}, {"a.png": labels}))


def test_two_classes_that_are_exchanged_are_told(tmp_path: Path) -> None:
    labels = areas(4, 10)
    exchanged = np.array([0, 1, 2, 3, 4, 5, 6, 8, 7, 9], np.uint8)[noisy(labels, 10, 0.2)]
    found = evaluate_folders(*folders(tmp_path, {"a.png": exchanged}, {"a.png": labels}))
    assert (
        "2 classes of the labels are others in the predictions (fence is predicted as car, car is" in found["warning"]
    )


@pytest.mark.parametrize("colour_of", ["classes", "anything"])
def test_palettes_that_a_program_made_up_are_no_train_ids(tmp_path: Path, colour_of: str) -> None:
    """A coloured mask saved with an adaptive palette: the indices are small, but in the order of the colours."""
    rng = np.random.default_rng(0)
    palette = np.array(load_taxonomy("camvid11").palette, np.uint8)
    palette = palette if colour_of == "classes" else rng.integers(0, 256, palette.shape).astype(np.uint8)
    labels = {f"{index}.png": areas(index, 11 - 3 * index) for index in range(3)}
    where = folders(tmp_path, labels, labels)
    for name, label in labels.items():
        adaptive = Image.fromarray(palette[label]).convert("P", palette=Image.Palette.ADAPTIVE)
        assert np.array(adaptive).max() <= 10, "as if they were train ids"
        adaptive.save(tmp_path / "predictions" / name)
    with pytest.raises(UserError, match="the predictions: the palettes contradict train_ids of the taxonomy camvid11"):
        evaluate_folders(*where)
    for name, label in labels.items():
        (where[0] / name).write_bytes(encode_png(label, palette.tolist()))
    assert evaluate_folders(*where)["miou"] == 1.0


@pytest.mark.parametrize(
    ("turn", "way"),
    [
        (lambda label: label[:, ::-1], "mirrored"),
        (lambda label: label[::-1], "upside down"),
        (lambda label: label[::-1, ::-1], "turned by 180 degrees"),
        (lambda label: label.T, "transposed"),
        (lambda label: np.rot90(label), "turned left"),
        (lambda label: np.rot90(label, -1), "turned right"),
    ],
)
def test_labels_that_lie_otherwise_than_predictions_are_told(tmp_path: Path, turn: Any, way: str) -> None:
    """Of the right size, so that nothing else notices; the score is what the files say."""
    good = {f"{index}.png": areas(index, 11, 60, 60) for index in range(2)}
    guess = {name: np.where(areas(8, 9, 60, 60) < 2, 3, label).astype(np.uint8) for name, label in good.items()}
    where = folders(tmp_path, guess, {name: np.ascontiguousarray(turn(label)) for name, label in good.items()})
    found = evaluate_folders(*where)
    assert f"if they are {way}: one of the two does not lie like the images" in found["warning"]
    assert "classes of the labels are others" not in found["warning"], "told once, by its cause"
    assert found["pa"] < 0.3 and "warning" not in evaluate_folders(*folders(tmp_path / "good", guess, good))


def test_labels_as_predictions_of_themselves_are_told(tmp_path: Path) -> None:
    """By the files: a folder named twice, or linked; copies of the values are perfect predictions."""
    where = folders(tmp_path, {"a.png": LABEL % 11}, {"a.png": LABEL, "b.png": LABEL % 11})
    (tmp_path / "predictions/b.png").symlink_to(tmp_path / "labels/b.png")
    found = evaluate_folders(*where)
    assert (found["pa"], found["warning"]) == (
        1.0,
        "1 of 2 predictions are the files of their labels themselves: b.png",
    )
    (tmp_path / "predictions/b.png").unlink()
    folders(tmp_path, {"b.png": LABEL % 11}, {})
    assert "warning" not in evaluate_folders(*where)


def test_all_that_is_wrong_with_the_request_is_one_message(tmp_path: Path) -> None:
    nowhere = (Location.of(tmp_path / "x"), Location.of(tmp_path / "y"))
    with pytest.raises(UserError) as refused:
        evaluate_folders(*nowhere, taxonomy="camvid1")
    assert [problem.what.partition(" ")[0] for problem in refused.value.problems] == [
        "unknown", "predictions:", "labels:",
    ]  # fmt: skip
    where = folders(tmp_path, {"000.png": GUESS, "c.png": GUESS}, {"00.png": LABEL, "c.png": LABEL})
    with pytest.raises(UserError) as refused:
        evaluate_folders(*where, label_encoding="camvid")
    missing, encoding = (problem.what for problem in refused.value.problems)
    assert missing.endswith(": 00.png; predictions without label: 000.png")
    assert "no label encoding 'camvid', did you mean 'camvid12'" in encoding


def test_labels_of_other_types_are_scored(tmp_path: Path) -> None:
    where = folders(tmp_path, {f"{index}.png": GUESS for index in range(3)}, {"0.png": LABEL})
    for name in ("1.tif", "2.bmp"):
        Image.fromarray(LABEL).save(tmp_path / "labels" / name)
    assert (evaluate_folders(*where)["frames"], evaluate_folders(*where)["miou"]) == (3, 0.625)


def test_all_that_is_wrong_with_two_folders_is_one_message(tmp_path: Path) -> None:
    """A label behind a broken link, one without prediction, and four pairs that cannot be compared; nothing twice."""
    small, unknown = LABEL[:1], np.full_like(LABEL, 77)
    names = ("cut", "empty", "ids", "label", "size", "sound")
    where = folders(
        tmp_path,
        {f"{name}.png": {"ids": unknown}.get(name, GUESS) for name in names},
        {f"{name}.png": {"label": unknown, "size": small}.get(name, LABEL) for name in (*names, "alone")},
    )
    (tmp_path / "labels/gone.png").symlink_to("/nowhere.png")
    (tmp_path / "predictions/empty.png").write_bytes(b"")
    (tmp_path / "predictions/cut.png").write_bytes(encode_png(GUESS)[:40])
    with pytest.raises(UserError) as caught:
        evaluate_folders(*where, compute=MapCompute(actors=0, shard_rows=64))
    head, *problems = str(caught.value).split("\n- ")
    assert head == "6 problems:"
    assert "2 of 8 labels" in problems[0] and "gone.png (a link to /nowhere.png that leads nowhere)" in problems[0]
    for name in (*names[:-1], "alone", "gone"):
        assert sum(f"{name}.png" in problem for problem in problems) == 1, name
    assert not any("sound.png" in problem for problem in problems)


# -- labels in colours -------------------------------------------------------------------------------------------------


def test_labels_in_colours_are_known_by_their_type(tmp_path: Path) -> None:
    ids = np.array([[3, 3, 0, 255], [3, 8, 8, 0]], np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 3, 8]] = (128, 128, 128), (128, 64, 128), (64, 0, 128)  # of camvid11
    where = folders(tmp_path, {"a.png": ids}, {"a.png": colours[ids]})
    found = evaluate_folders(*where, label_encoding="colors")
    assert (found["miou"], found["label_encoding"], found["labels"]["valid"]) == (1.0, "colors", 7 / 8)
    told = evaluate_folders(*where)
    assert told["confusion"] == found["confusion"] and told["labels"]["why"] == "by the type of their files"
    (tmp_path / "labels" / "a.png").write_bytes(
        encode_png(np.where(colours[ids] == 0, 9, colours[ids]).astype(np.uint8))
    )
    with pytest.raises(UserError, match=r"colours \[9, 9, 9\] \(1 pixels\).* are not in"):
        evaluate_folders(*where, label_encoding="colors")


def test_a_class_list_says_what_its_ids_are(tmp_path: Path) -> None:
    """Ids 1 to 3 could be train ids of a class list of four classes as well: its `ids` count."""
    (tmp_path / "mine.yaml").write_text(
        "classes: [{name: road, ids: 1}, {name: car, ids: 2}, {name: sky, ids: 3}, {name: tree, ids: 9}]\nignore: [0]\n"
    )
    raw, guess = np.array([[1, 2], [3, 0]], np.uint8), np.array([[0, 1], [2, 3]], np.uint8)
    where = folders(tmp_path, {"a.png": guess}, {"a.png": raw})
    found = evaluate_folders(*where, taxonomy=str(tmp_path / "mine.yaml"))
    assert (found["miou"], found["label_encoding"]) == (1.0, "ids") and found["labels"]["why"] == "by the class list"
    named = folders(tmp_path / "2", {"a.png": guess}, {"a_trainIds.png": guess})
    assert evaluate_folders(*named, taxonomy=str(tmp_path / "mine.yaml"))["label_encoding"] == "train_ids"
