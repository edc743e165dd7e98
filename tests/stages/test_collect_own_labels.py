"""Labels of one's own: colours, ids, class lists mapped onto another; and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_label, encode_png
from nightseg.data.labels import train_ids_of
from nightseg.data.settings import ClassList, FolderDataset, ListedClass
from nightseg.data.table import resolve
from nightseg.progress import SilentProgress
from nightseg.stages import collect as stage
from nightseg.storage import Commit, Location, UserError, Workspace

ROAD, SKY, TREE = (10, 20, 30), (200, 100, 0), (0, 250, 0)
OWN = ClassList(
    name="mine",
    classes=[ListedClass(name="road", color=ROAD), ListedClass(name="sky", color=SKY)],
    ignore={"colors": [TREE]},
)
TRAIN_IDS = np.kron(np.array([[0, 1], [255, 0]]), np.ones((4, 6))).astype(np.uint8)


def in_colours(train_ids: np.ndarray, void: tuple[int, int, int] = TREE) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[[0, 1, 255]] = ROAD, SKY, void
    return table[train_ids]


def with_labels(root: Path, *labels: np.ndarray) -> str:
    rng = np.random.default_rng(3)
    for number, label in enumerate(labels):
        for folder, pixels in (("images", rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)), ("labels", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{number}.png").write_bytes(encode_png(pixels))
    return str(root)


def collected(tmp_path: Path, dataset: FolderDataset, classes: str | ClassList = OWN, bad: float = 0.01) -> Commit:
    node = Workspace(tmp_path / "run").stage("collect", "d", version=stage.VERSION, recipe={}, inputs={}, seed=0)
    return stage.collect(
        dataset,
        name="d",
        taxonomy=classes,
        attempt=node.open(),
        progress=SilentProgress(),
        compute=MapCompute(actors=0, shard_rows=4),
        max_bad_fraction=bad,
    )


def read_back(commit: Commit, classes: str | ClassList = OWN) -> list[list[list[int]]]:
    rows = resolve(commit.table("frames"), commit.folder).to_pylist()
    found = [train_ids_of(row, taxonomy(classes)) for row in rows]
    return [one.tolist() for one in found if one is not None]


@pytest.mark.parametrize("asked", [None, "colors"])
def test_labels_in_colours_become_train_ids(tmp_path: Path, asked: str | None) -> None:
    root = with_labels(tmp_path / "data", *[in_colours(np.roll(TRAIN_IDS, step, 1)) for step in range(3)])
    commit = collected(tmp_path, FolderDataset(layout="pairs", root=root, label_encoding=asked))
    assert read_back(commit) == [np.roll(TRAIN_IDS, step, 1).tolist() for step in range(3)]
    row = resolve(commit.table("frames"), commit.folder).to_pylist()[0]
    assert row["label_encoding"] == "train_ids" and row["label_pixels"] == [48, 24]
    assert decode_label(Location.of(row["label_uri"]).read_bytes()).tolist() == TRAIN_IDS.tolist()
    labels = commit.summary["labels"]
    assert (labels["encoding"], labels["valid"], labels["absent"]) == ("colors", 0.75, [])


def test_colours_with_an_alpha_channel(tmp_path: Path) -> None:
    """As Cityscapes' and BDD100K's coloured labels are."""
    root = with_labels(tmp_path / "data", TRAIN_IDS)
    alpha = np.full((*TRAIN_IDS.shape, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([in_colours(TRAIN_IDS), alpha], axis=2)).save(Path(root) / "labels" / "0.png")
    assert read_back(collected(tmp_path, FolderDataset(layout="pairs", root=root))) == [TRAIN_IDS.tolist()]


def test_colours_of_a_palette_file(tmp_path: Path) -> None:
    """Indices that mean nothing, colours that do."""
    root = Path(with_labels(tmp_path / "data", TRAIN_IDS))
    image = Image.fromarray(np.where(TRAIN_IDS == 255, 9, TRAIN_IDS + 4).astype(np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    palette[[4, 5, 9]] = ROAD, SKY, TREE
    image.putpalette(palette.tobytes())
    image.save(root / "labels" / "0.png")
    commit = collected(tmp_path, FolderDataset(layout="pairs", root=str(root), label_encoding="colors"))
    assert read_back(commit) == [TRAIN_IDS.tolist()]


def test_colours_that_no_class_has_are_named_with_the_cure(tmp_path: Path) -> None:
    root = with_labels(tmp_path / "data", *[in_colours(TRAIN_IDS, (7, 8, 9))] * 2)
    with pytest.raises(UserError) as refused:
        collected(tmp_path, FolderDataset(layout="pairs", root=root))
    assert "colours [7, 8, 9] (24 pixels) are not in" in refused.value.what and "1 of 3 colours" in refused.value.what
    assert "`ignore: {colors: [[7, 8, 9]]}`" in refused.value.cure and "max_bad_fraction" not in refused.value.cure


def test_a_photograph_is_no_label(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    root = with_labels(tmp_path / "data", in_colours(TRAIN_IDS))
    for folder in ("images", "labels"):
        (Path(root) / folder / "0.png").write_bytes(encode_png(noise))
    with pytest.raises(UserError, match=r"2[34]\d\d different colours, which no class list has"):
        collected(tmp_path, FolderDataset(layout="pairs", root=root))


def test_ids_of_ones_own(tmp_path: Path) -> None:
    own = ClassList(classes=[ListedClass(name="road", ids=[1, 4]), ListedClass(name="sky", ids=2)], ignore=[0])
    raw = np.array([[0, 1, 2, 4, 255, 1]] * 4, np.uint8).repeat(2, 0).repeat(2, 1)
    root = with_labels(tmp_path / "data", raw, raw)
    commit = collected(tmp_path, FolderDataset(layout="pairs", root=root), own)
    assert read_back(commit, own)[0] == np.array([[255, 0, 1, 0, 255, 0]] * 4).repeat(2, 0).repeat(2, 1).tolist()
    assert commit.summary["labels"]["encoding"] == "ids"
    assert commit.table("frames")["label_uri"][0].as_py().startswith(root), "nothing is written anew"


def test_ids_that_the_list_lacks_are_told_in_the_users_numbers(tmp_path: Path) -> None:
    own = ClassList(classes=[ListedClass(name=f"c{index}") for index in range(8)])
    raw = np.arange(96, dtype=np.uint8).reshape(8, 12) % 9
    root = with_labels(tmp_path / "data", raw, raw, raw)
    with pytest.raises(UserError) as refused:
        collected(tmp_path, FolderDataset(layout="pairs", root=root), own)
    assert "ids 8 (10 pixels)" in refused.value.what and "0.png" in refused.value.what
    assert "the labels hold 0..8, and own has 8 classes and knows 0..7, 255 (train_ids)" in refused.value.what
    assert "label_encoding: ids_from_one if 0 is void and 1 is c0" in refused.value.cure
    assert "`ignore: [8]`" in refused.value.cure and "max_bad_fraction" not in refused.value.cure
    one = FolderDataset(layout="pairs", root=root, label_encoding="ids_from_one")
    assert read_back(collected(tmp_path / "2", one, own), own)[0][0] == [255, *range(8), 255, 0, 1]


def test_labels_of_another_class_list(tmp_path: Path) -> None:
    """IDD Lite's groups as CamVid's classes: drivable is road, vehicles are cars, the sky is the sky."""
    raw = np.array([[0, 3, 6, 1, 255, 5]] * 4, np.uint8).repeat(2, 0).repeat(2, 1)
    root = with_labels(tmp_path / "data", raw)
    dataset = FolderDataset(
        layout="pairs",
        root=root,
        taxonomy="idd_lite7",
        map={"drivable": "road", "vehicles": "car", "far objects": None},
    )
    commit = collected(tmp_path, dataset, "camvid11")
    assert read_back(commit, "camvid11")[0][0] == [3, 3, 8, 8, 0, 0, 255, 255, 255, 255, 255, 255]
    (note, _) = commit.summary["notes"]
    assert (
        note
        == "classes of its labels that the run does not have are ignored: non-drivable, living things, roadside objects"
    )
    assert commit.summary["labels"]["valid"] == 0.5
    in_theirs = with_labels(tmp_path / "colours", in_colours(TRAIN_IDS))
    own = FolderDataset(layout="pairs", root=in_theirs, taxonomy=OWN, map={"sky": "building"})
    found = read_back(collected(tmp_path / "2", own, "camvid11"), "camvid11")
    assert found == [np.where(TRAIN_IDS == 255, 255, np.where(TRAIN_IDS == 0, 3, 1)).tolist()]
