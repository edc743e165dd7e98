"""Class lists: the published tables, and what a user's YAML file may say."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.data.class_list import mapped, taxonomy
from nightseg.data.images import BadFrame, StoredLabel, encode_png
from nightseg.data.labels import check_orientation, train_ids_of
from nightseg.data.settings import ClassList, ListedClass
from nightseg.data.taxonomy import IGNORE
from nightseg.storage import UserError, sha256_of

GOOD = """
name: two
classes:
  - name: road
    color: [1, 2, 3]
    ids: {mine: [7, 9], theirs: 0}
  - {name: "no", color: [4, 5, 6], ids: {mine: 8}}
ignore: {mine: [0, 255], theirs: rest}
"""


def written(folder: Path, text: str) -> str:
    file = folder / "classes.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_cityscapes_ids() -> None:
    classes = taxonomy("cityscapes19")
    assert classes.num_classes == len(classes.palette) == 19
    train_ids, known = classes.lut("label_ids")
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [int(train_ids[raw_id]) for raw_id in evaluated] == list(range(19))
    assert all(train_ids[raw_id] == IGNORE for raw_id in range(256) if raw_id not in evaluated)
    assert np.flatnonzero(known).tolist() == [*range(34), 255]
    assert (classes.classes[0], classes.classes[13], classes.classes[18]) == ("road", "car", "bicycle")


def test_camvid_ids() -> None:
    classes = taxonomy("camvid11")
    assert " ".join(classes.classes) == "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    raw = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(classes.to_train_ids(raw, "camvid12").ravel(), [*range(11), 255])
    np.testing.assert_array_equal(np.flatnonzero(classes.lut("train_ids")[1]), [*range(11), 255])


def test_unknown_ids_are_listed() -> None:
    raw = np.zeros((4, 4), dtype=np.uint8)
    raw[0, 0], raw[1, :3] = 200, 77
    with pytest.raises(BadFrame, match=r"label_value: ids 77 \(3 pixels\), 200 \(1 pixels\) are not in.*camvid12"):
        taxonomy("camvid11").to_train_ids(raw, "camvid12")
    with pytest.raises(BadFrame, match="and 236 more"):
        taxonomy("camvid11").to_train_ids(np.arange(256, dtype=np.uint8)[None], "camvid12")


def test_colours_of_ignored_pixels_are_black() -> None:
    label = np.array([[0, 10, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(taxonomy("camvid11").colourize(label), [[(128, 128, 128), (0, 128, 192), (0, 0, 0)]])


def test_names_that_are_wrong_come_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'cityscapes19'"):
        taxonomy("cityscape19")
    with pytest.raises(UserError, match=r"no label encoding 'label_id'.*did you mean 'label_ids'"):
        taxonomy("cityscapes19").lut("label_id")
    with pytest.raises(UserError, match="there is no such taxonomy file"):
        taxonomy("/nowhere/classes.yaml")


def test_a_recipe_is_read_for_its_classes(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("name,id\nroad,3\nfirmament,1\n")
    recipe = tmp_path / "mine.yaml"
    for own, ids in (
        ("{classes: [{name: road, ids: 3}, {name: firmament, ids: 1}]}", {3: 0, 1: 1, IGNORE: IGNORE}),
        (str(tmp_path / "names.csv"), {3: 0, 1: 1, IGNORE: IGNORE}),
    ):
        recipe.write_text(f"name: mine\ntaxonomy: {own}\ndatasets: {{}}\n")
        assert taxonomy(str(recipe)).encodings["ids"] == ids
    recipe.write_text("name: mine\ntaxonomy: camvid11\n")
    assert taxonomy(str(recipe)) == taxonomy("camvid11")
    for wrong, said in (
        ("camvid12", "'camvid12' is no class list by name"),
        (str(recipe), "key 'taxonomy'"),
        ("{classes: 3}", "taxonomy: classes: "),
    ):
        recipe.write_text(f"name: mine\ntaxonomy: {wrong}\n")
        with pytest.raises(UserError, match=said):
            taxonomy(str(recipe))


def test_a_taxonomy_travels_to_workers() -> None:
    assert pickle.loads(pickle.dumps(taxonomy("camvid11"))) == taxonomy("camvid11")


def test_yaml(tmp_path: Path) -> None:
    classes = taxonomy(written(tmp_path, GOOD))
    assert (classes.name, classes.classes, classes.palette) == ("two", ("road", "no"), ((1, 2, 3), (4, 5, 6)))
    assert classes.encodings["mine"] == {7: 0, 9: 0, 8: 1, 0: IGNORE, 255: IGNORE}
    assert classes.encodings["train_ids"] == {0: 0, 1: 1, IGNORE: IGNORE}
    assert classes.lut("theirs")[1].all() and classes.encodings["theirs"][3] == IGNORE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("color: [1, 2, 3]", "color: [1, 2]"), r"classes.0.color.2: this key is missing"),
        (("color: [1, 2, 3]", "color: [1, 2, 300]"), "less than or equal to 255, got the number 300"),
        (("color: [1, 2, 3]", "colour: [1, 2, 3]"), "unknown key 'colour', did you mean 'color'"),
        (("mine: [7, 9]", "mine: [7, 8]"), "raw id 8 already means something else"),
        (("mine: [7, 9]", "mine: [7, 256]"), "less than or equal to 255, got the number 256"),
        (("mine: [7, 9]", "train_ids: [7, 9]"), "built in"),
        (("ids: {mine: 8}", "ids: {mine: true}"), "got true"),
        (('name: "no"', "name: no"), "got false .*quote words"),
        (('name: "no"', "name: road"), "'road' is given twice"),
        (('  - {name: "no", c', "  - {c"), "classes.1.name: this key is missing"),
        (("name: two\n", "name: two\nname: three\n"), "name: this key stands twice"),
        (("name: two", "name: !!python/object/apply:os.getcwd []"), "not valid YAML"),
        (("name: two", "name: [" + "[" * 1500), "not valid YAML"),
        (("classes:", "classes: []\nx:"), "unknown key 'x'|at least 2 items"),
    ],
)
def test_yaml_errors_name_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        taxonomy(written(tmp_path, GOOD.replace(*change)))
    assert "classes.yaml" in str(caught.value)


CLASSES = taxonomy("camvid11")


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    data = encode_png(np.array([[0, 11], [8, 3]], dtype=np.uint8))
    (tmp_path / "label.png").write_bytes(data)
    return {"label_uri": str(tmp_path / "label.png"), "label_encoding": "camvid12", "label_sha256": sha256_of(data)}


def test_a_label_becomes_train_ids(row: dict[str, Any]) -> None:
    found = train_ids_of(row, CLASSES, (2, 2))
    assert found is not None and found.tolist() == [[0, 255], [8, 3]]


def test_a_row_without_label_has_none(row: dict[str, Any]) -> None:
    assert train_ids_of(row | {"label_uri": None}, CLASSES) is None
    assert train_ids_of({}, CLASSES) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_uri": "/does/not/exist.png"}, "label_missing"),
        ({"label_sha256": "0" * 64}, "unreadable"),
        ({"label_encoding": "train_ids"}, "label_value"),
    ],
)
def test_a_bad_label_has_a_reason(row: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadFrame) as caught:
        train_ids_of(row | change, CLASSES)
    assert caught.value.reason == reason
    with pytest.raises(BadFrame, match="label_size"):
        train_ids_of(row, CLASSES, (2, 3))


@pytest.mark.parametrize("of_image", range(1, 9))
@pytest.mark.parametrize("of_label", range(1, 9))
@pytest.mark.parametrize("square", [True, False])
def test_a_label_that_may_lie_in_two_ways_on_its_image_is_refused(of_image: int, of_label: int, square: bool) -> None:
    """Accepted: both turned alike, or the one way of the label that has the image's size is what its own EXIF says."""
    upright = np.arange(16 if square else 24, dtype=np.uint8).reshape(4, -1)
    label = StoredLabel(upright, None, of_label)
    lies_as_stored_fits = square or of_label <= 4  # else its stored pixels are higher than wide
    lies_as_image_fits = square or (of_label >= 5) == (of_image >= 5)
    if of_image == of_label or not ((lies_as_stored_fits and of_label != 1) or lies_as_image_fits):
        check_orientation(label, upright.shape, of_image)
        return
    with pytest.raises(BadFrame, match=f"of the image is {of_image}, of the label {of_label}, and their sizes fit"):
        check_orientation(label, upright.shape, of_image)


def test_a_label_that_is_the_same_in_all_ways_is_fine() -> None:
    check_orientation(StoredLabel(np.full((4, 4), 3, np.uint8), None, 1), (4, 4), 6)
    half = np.zeros((4, 6), np.uint8)
    half[:2] = 1
    check_orientation(StoredLabel(half, None, 1), (4, 6), 2)  # left and right are the same
    with pytest.raises(BadFrame, match="label_orientation"):
        check_orientation(StoredLabel(half, None, 1), (4, 6), 3)


# -- lists of one's own ----------------------------------------------------------------------------------------------


def test_a_list_of_names_alone() -> None:
    classes = taxonomy(ClassList(classes=[ListedClass(name="road"), ListedClass(name="sky", color=(0, 0, 255))]))
    assert classes.name == "own" and classes.encodings["train_ids"] == {0: 0, 1: 1, 255: 255}
    assert len({*classes.palette, (0, 0, 0)}) == 3 and classes.palette[1] == (0, 0, 255)
    assert "ids" not in classes.encodings and classes.usual("ids") == "train_ids" == classes.usual("camvid12")
    many = taxonomy(ClassList(classes=[ListedClass(name=str(index)) for index in range(255)]))
    assert len({*many.palette, (0, 0, 0)}) == 256, "made-up colours differ"


def test_ids_without_an_encoding() -> None:
    listed = ClassList.model_validate_json(
        '{"classes": [{"name": "road", "ids": [1, 2]}, {"name": "sky", "ids": 7}], "ignore": [0]}'
    )
    classes = taxonomy(listed)
    assert classes.encodings["ids"] == {0: 255, 1: 0, 2: 0, 7: 1, 255: 255}
    assert classes.usual("label_ids") == "ids"
    rest = taxonomy(listed.model_copy(update={"ignore": "rest"}))
    assert rest.lut("ids")[1].all()
    void = taxonomy(ClassList(classes=[ListedClass(name="a"), ListedClass(name="b")], ignore=[2]))
    assert void.encodings["ids"] == {0: 0, 1: 1, 2: 255, 255: 255}, "the ids of classes are train ids then"
    with pytest.raises(UserError, match="ignore: 1 is the train id of b"):
        taxonomy(ClassList(classes=[ListedClass(name="a"), ListedClass(name="b")], ignore=[1]))


def rgb(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.array([[red << 16 | green << 8 | blue for red, green, blue in colours]], np.uint32)


def test_labels_in_colours() -> None:
    road, grass, sky = (128, 64, 128), (9, 9, 9), (70, 130, 180)
    listed = ClassList(
        classes=[ListedClass(name="r", color=road, ids={"colors": [grass]}), ListedClass(name="s", color=sky)]
    )
    classes = taxonomy(listed)
    found = classes.to_train_ids(rgb(sky, grass, road, (0, 0, 0)), "colors")
    assert found.dtype == np.uint8 and found.tolist() == [[1, 0, 0, 255]], "black is no class"
    with pytest.raises(
        BadFrame, match=r"label_value: colours \[1, 2, 3\] \(2 pixels\), \[1, 2, 4\] \(1 pixels\) are not"
    ):
        classes.to_train_ids(rgb((1, 2, 3), (1, 2, 4), (1, 2, 3)), "colors")
    rest = taxonomy(listed.model_copy(update={"ignore": {"colors": "rest"}}))
    assert rest.to_train_ids(rgb((1, 2, 3), sky), "colors").tolist() == [[255, 1]]
    black = taxonomy(ClassList(classes=[ListedClass(name="r", color=(0, 0, 0)), ListedClass(name="s", color=sky)]))
    assert black.to_train_ids(rgb((0, 0, 0)), "colors").tolist() == [[0]], "unless it is the colour of one"
    alike = taxonomy(ClassList(classes=[ListedClass(name="r", color=road), ListedClass(name="s", color=road)]))
    with pytest.raises(BadFrame, match=r"colours \[128, 64, 128\] \(1 pixels\) are not in"):
        alike.to_train_ids(rgb(road), "colors")


def test_published_colours() -> None:
    """Cityscapes' *_color.png and the 32 colours of CamVid's original labels."""
    found = taxonomy("cityscapes19").to_train_ids(
        rgb((128, 64, 128), (111, 74, 0), (119, 11, 32), (0, 0, 110)), "colors"
    )
    assert found.tolist() == [[0, 255, 18, 255]]
    camvid = taxonomy("camvid11")
    found = camvid.to_train_ids(rgb((0, 0, 192), (64, 128, 192), (128, 0, 192), (0, 0, 0), (192, 192, 0)), "colors")
    assert [camvid.classes[i] if i < 255 else None for i in found[0]] == ["pavement", "car", "road", None, "tree"]
    assert len(camvid.colors) == 33, "the 32 and the pavement of the palette"


FOREIGN = {
    "class_dict.csv": "name,r,g,b\nroad,128,64,128\nVoid,0,0,0\nsky,1,2,3\n",
    "classes.csv": "id;name\n3;road\n0;void\n9;sky\n",
    "classes.txt": "road\nvoid\nsky\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nroad:128,64,128::\nvoid:0,0,0::\nsky:1,2,3::\n",
    "config.json": '{"labels": [{"readable": "road", "color": [128, 64, 128], "evaluate": true}, '
    '{"readable": "Ego", "color": [0, 0, 0], "evaluate": false}, {"readable": "sky", "color": [1, 2, 3], '
    '"evaluate": true}]}',
    "ids.json": '{"3": "road", "0": "void", "9": "sky"}',
    "names.json": '["road", "void", "sky"]',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_lists_of_other_programs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    classes = taxonomy(str(tmp_path / name))
    assert classes.classes == ("road", "sky")
    by_hand = name in ("classes.csv", "ids.json")
    assert classes.encodings["ids"] == ({3: 0, 0: 255, 9: 1, 255: 255} if by_hand else {0: 0, 1: 255, 2: 1, 255: 255})
    if name in ("class_dict.csv", "labelmap.txt", "config.json"):
        assert classes.palette == ((128, 64, 128), (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "colour,r,g,b\n1,2,3,4\n", "none of the columns colour, r, g, b is `name`"),
        ("x.json", "{", "no class list"),
        ("x.txt", "road\nroad\n", "names stand there twice"),
        ("x.txt", "road\n", "at least 2 items"),
    ],
)
def test_files_that_are_no_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        taxonomy(str(tmp_path / name))


def test_one_list_mapped_onto_another() -> None:
    classes = taxonomy("camvid11")
    read_by, dropped, missing = mapped(
        "idd_lite7", {"drivable": "road", "vehicles": "car", "far objects": None}, classes
    )
    assert read_by.encodings["train_ids"] == {0: 3, 1: 255, 2: 255, 3: 8, 4: 255, 5: 255, 6: 0, 255: 255}
    assert dropped == ["non-drivable", "living things", "roadside objects"]
    assert "sky" not in missing and "pole" in missing and read_by.classes == classes.classes
    read_by, dropped, _ = mapped("cityscapes19", {}, classes)  # those of the same name
    assert read_by.encodings["label_ids"][7] == 3 and read_by.colors[128 << 16 | 64 << 8 | 128] == 3
    with pytest.raises(UserError, match=r"map: idd_lite7 has no class 'drivabel', did you mean 'drivable'"):
        mapped("idd_lite7", {"drivabel": "road"}, classes)
    with pytest.raises(UserError, match=r"map.drivable: camvid11 has no class 'rode', did you mean 'road'"):
        mapped("idd_lite7", {"drivable": "rode"}, classes)
    own = ClassList(classes=[ListedClass(name="x"), ListedClass(name="y")])
    with pytest.raises(UserError, match=r"no class of own is one of camvid11. Cure: say which is which: map: {x: sky"):
        mapped(own, {}, classes)
