"""What labels mean, by names, values and palettes of a whole set: taken where one reading is left, else asked."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from nightseg.data.class_list import taxonomy
from nightseg.data.encodings import (
    LABEL_FILES_SCHEMA,
    LabelFile,
    Reading,
    UnclearLabels,
    facts_of,
    label_files,
    read_as,
)
from nightseg.data.images import StoredLabel, decode_stored_label, encode_png
from nightseg.data.taxonomy import Taxonomy
from nightseg.storage import UserError

CITYSCAPES, CAMVID = taxonomy("cityscapes19"), taxonomy("camvid11")
STREET = {0: 350, 2: 200, 8: 150, 10: 100, 13: 60, 255: 140}  # train ids of a street: road, building, trees, sky, cars
GT_FINE = {1: 50, 4: 50, 7: 350, 11: 200, 21: 200, 23: 100, 26: 50}  # label ids of the same
LOW = {0: 100, 7: 350, 8: 150, 11: 400}  # label ids that may be train ids as well


def files(*sets: dict[int, int], name: str = "{}.png") -> list[LabelFile]:
    return [LabelFile(f"/data/{name.format(index)}", pixels, {}) for index, pixels in enumerate(sets)]


def read(found: list[LabelFile], classes: Taxonomy = CITYSCAPES, **more: Any) -> Reading:
    return read_as("labels", found, classes, **({"asked": None} | more))


@pytest.mark.parametrize(
    ("pixels", "name", "encoding", "why"),
    [
        (STREET, "{}.png", "train_ids", "by their ids"),
        (dict.fromkeys([*range(19), 255], 1), "{}.png", "train_ids", "by their ids"),
        (GT_FINE, "{}.png", "label_ids", "by their ids"),
        (GT_FINE, "{}_gtFine_labelIds.png", "label_ids", "by the names of the files"),
        (LOW, "{}_labelIds.png", "label_ids", "by the names of the files"),
        (STREET, "{}_gt_labelTrainIds.png", "train_ids", "by the names of the files"),
        (STREET, "{}_train_id.png", "train_ids", "by the names of the files"),
        (STREET, "{}_trainIds.png", "train_ids", "by the names of the files"),
    ],
)
def test_ordinary_labels_are_not_asked_about(pixels: dict[int, int], name: str, encoding: str, why: str) -> None:
    reading = read(files(pixels, pixels, name=name))
    assert (reading.encoding, reading.why) == (encoding, why)


def test_encodings_that_agree_on_all_ids_are_one() -> None:
    """CamVid's ids and train ids differ in the void id only, and none of these pixels is void."""
    assert read(files({0: 5, 10: 5}), CAMVID).encoding == "train_ids"
    assert read(files({0: 5, 10: 5}), CAMVID, usual="camvid12").encoding == "camvid12"
    assert read(files({0: 5, 11: 5}), CAMVID).encoding == "camvid12"
    assert read(files({0: 5, 255: 5}), CAMVID).encoding == "train_ids"


def test_ids_that_may_be_either_are_asked_about() -> None:
    with pytest.raises(UnclearLabels, match="the ids 0, 7, 8, 11 of 1 labels may be train_ids or label_ids") as asked:
        read(files(LOW))
    assert asked.value.encodings == ("train_ids", "label_ids")
    assert asked.value.cure == "say what the ids mean by label_encoding: train_ids or label_ids"
    again = pickle.loads(pickle.dumps(asked.value))
    assert (str(again), again.cure_by("key ")) == (str(asked.value), asked.value.cure_by("key "))
    assert read(files(LOW), asked="label_ids").why == "as asked"


def test_ids_from_one_of_a_list_of_classes_may_be_train_ids(tmp_path: Path) -> None:
    """Void is 0; as long as the last class does not occur, every id is a train id, too."""
    (tmp_path / "own.yaml").write_text(
        "name: own\nclasses:\n  - {name: a, color: [1, 2, 3], ids: {mine: 1}}\n"
        "  - {name: b, color: [4, 5, 6], ids: {mine: 2}}\n  - {name: c, color: [7, 8, 9], ids: {mine: 3}}\n"
        "ignore: {mine: [0]}\n"
    )
    own = taxonomy(str(tmp_path / "own.yaml"))
    with pytest.raises(UnclearLabels, match="train_ids or mine"):
        read(files({0: 10, 1: 50, 2: 40}), own)
    assert read(files({0: 10, 1: 50, 2: 40}, {3: 9}), own).encoding == "mine"
    assert read(files({0: 10, 1: 50, 2: 40}, {255: 9}), own).encoding == "train_ids"
    reading = read(files({0: 10, 1: 50, 3: 40}), CAMVID, asked="ids_from_one")
    assert reading.valid == 0.9 and "sky" not in reading.absent and "building" in reading.absent


@pytest.mark.parametrize(
    ("pixels", "name", "message", "encodings"),
    [
        (STREET, "{}_gtFine_labelIds.png", r"79 % .* void, and no id is above 13: these look like train_ids", 2),
        (GT_FINE, "{}_labelTrainIds.png", r"ids 21, 23, 26 are not in train_ids, and all are in label_ids", 1),
        (
            {**dict.fromkeys(range(19), 9), 19: 30},
            "{}.png",
            "look like train_ids with 19 for ignored pixels or ids_from_one",
            2,
        ),
    ],
)
def test_names_and_values_that_contradict_each_other(
    pixels: dict[int, int], name: str, message: str, encodings: int
) -> None:
    with pytest.raises(UnclearLabels, match=message) as asked:
        read(files(pixels, name=name))
    assert len(asked.value.encodings) == encodings


FROM_ONE = {1: 350, 3: 200, 9: 150, 11: 100, 14: 60, 19: 40}  # the street with ids from 1: 19 is bicycle


@pytest.mark.parametrize("name", ["{}.png", "{}_labelIds.png", "{}_labelTrainIds.png"])
def test_ids_from_one_that_reach_the_last_class_are_asked_about_as_such(name: str) -> None:
    """19 is traffic light as label id, and what some write for ignored pixels of train ids."""
    with pytest.raises(UnclearLabels) as asked:
        read(files(FROM_ONE, name=name))
    assert asked.value.encodings == ("ids_from_one", "label_ids")
    assert "ids_from_one" in asked.value.what and asked.value.cure.startswith("write 255 for 19, or add an encoding")
    assert read(files(FROM_ONE, name=name), asked="ids_from_one").valid == 1.0
    assert read(files({7: 40, 8: 20, 11: 30, 4: 5, 3: 5, 19: 3})).encoding == "label_ids", "little of it is void"


@pytest.mark.parametrize("void", [20, 29, 30, 33])
@pytest.mark.parametrize("name", ["{}.png", "{}_labelIds.png"])
def test_train_ids_with_an_id_of_their_own_for_ignored_pixels_are_no_label_ids(void: int, name: str) -> None:
    """label_ids knows 0 to 33, so it alone knows all of these, and would call 60 % and more of the pixels void."""
    own = {id_: pixels for id_, pixels in STREET.items() if id_ != 255} | {void: 140}
    with pytest.raises(UnclearLabels, match=f"these look like train_ids with {void} for ignored pixels") as asked:
        read(files(own, own, name=name))
    assert asked.value.cure.startswith(f"write 255 for {void}, or add an encoding with `ignore: [{void}]`")
    assert read(files(own), asked="label_ids").encoding == "label_ids"
    coarse = {0: 300, 1: 40, 3: 40, 7: 350, 8: 50, 11: 200, 23: 100}  # label ids with little else than a road
    assert read(files(coarse, name=name)).encoding == "label_ids"


def test_one_unknown_id_may_be_the_void_of_train_ids() -> None:
    with pytest.raises(UserError, match="254 is void, write 255 for 254") as refused:
        read(files({0: 5, 3: 2, 254: 1}), CAMVID)
    assert str(refused.value).count("/data/0.png") == 1, "told once, for both encodings"
    assert read(files({0: 5, 3: 2, 255: 1}), CAMVID).valid == pytest.approx(7 / 8)


def test_ids_that_may_begin_with_one_are_told_or_asked_about() -> None:
    assert "no pixel has the id 0" in read(files({1: 9, 3: 9, 10: 9, 255: 9}), CAMVID).sentences()[1]
    assert "no pixel has the id 0" in read(files({1: 9, 3: 9, 11: 9}), CAMVID, usual="camvid12").sentences()[1]
    for pixels, more in (({0: 1, 1: 9, 3: 9, 11: 9}, {}), ({1: 9, 3: 9, 11: 9}, {"asked": "camvid12"})):
        assert len(read(files(pixels), CAMVID, **more).sentences()) == 1
    with pytest.raises(UnclearLabels) as asked:
        read(files({1: 3, 7: 9, 8: 9, 11: 9}))
    assert asked.value.encodings == ("train_ids", "label_ids", "ids_from_one")


def test_two_kinds_in_one_folder() -> None:
    by_name = files(GT_FINE, name="{}_labelIds.png") + files(STREET, STREET, name="{}_labelTrainIds.png")
    reading = read(by_name)
    assert reading.encodings == ("label_ids", "train_ids", "train_ids")
    assert reading.encoding == "train_ids (2 files), label_ids (1 files)"
    assert reading.valid == pytest.approx((900 + 860 + 860) / 3000)
    with pytest.raises(UnclearLabels, match=r"1 of 3 look like train_ids \(2.png\)"):
        read(files(GT_FINE, GT_FINE, STREET))
    assert read(files(GT_FINE, {0: 5, 1: 3, 2: 2})).encoding == "label_ids", "a frame that nobody has labelled"


def test_ids_that_no_encoding_knows_name_a_file_each() -> None:
    with pytest.raises(
        UserError, match=r"1.png: ids 200 \(7 pixels\) are not in the encoding train_ids or label_ids of"
    ):
        read(files(STREET, {200: 7}))
    with pytest.raises(
        UserError, match=r"^labels: /data/0.png: ids 26 .* not in the encoding train_ids of the taxonomy cityscapes"
    ):
        read(files({26: 1}), asked="train_ids")
    with pytest.raises(UserError, match="ids_from_one if 0 is void"):
        read(files({0: 3, 20: 1, 255: 1}), Taxonomy("x", *_three_classes()))


def _three_classes() -> Any:
    names = tuple(map(str, range(20)))
    ids = {**{index: index for index in range(20)}, 255: 255}
    return (
        names,
        ((0, 0, 0),) * 20,
        {"train_ids": ids, "ids_from_one": {0: 255, **{i + 1: i for i in range(20)}, 255: 255}},
    )


def test_a_set_without_a_pixel_of_a_class_is_refused_and_one_with_few_is_warned_of() -> None:
    with pytest.raises(UserError, match=r"none of the 2 labels has a pixel with a class.*ids 0 are void in label_ids"):
        read(files({0: 100}, {0: 50}, name="{}_gtFine_labelIds.png"))
    with pytest.raises(UserError, match="none of the 1 labels"):
        read(files({255: 100}, name="{}_labelTrainIds.png"))
    first, second = read(files({3: 99, 255: 99_901}, name="{}_labelTrainIds.png")).sentences()
    assert "0.1 % of their pixels have a class; without a pixel: road, sidewalk, building, fence" in first
    assert second.startswith("warning: only 0.099 % of the pixels have a class")
    reading = read(files({**dict.fromkeys(range(19), 1), 255: 1}))
    assert reading.absent == () and reading.valid == 19 / 20 and len(reading.sentences()) == 1


# -- palettes --------------------------------------------------------------------------------------------------------


def stored(ids: np.ndarray, palette: Any) -> LabelFile:
    data = encode_png(ids.astype(np.uint8), palette)
    return label_files(pa.Table.from_pylist([facts_of("/a.png", decode_stored_label(data))], LABEL_FILES_SCHEMA))[0]


def test_palettes_decide_where_ids_do_not() -> None:
    train_ids = np.array([[0, 0, 13, 13]])
    with pytest.raises(UnclearLabels):
        read([stored(train_ids, None)])
    reading = read([stored(train_ids, CITYSCAPES.palette)])
    assert (reading.encoding, reading.why) == ("train_ids", "by the colours of their palettes")
    of_label_ids = [(0, 0, 0)] * 34
    for raw_id, train_id in CITYSCAPES.encodings["label_ids"].items():
        if train_id != 255:
            of_label_ids[raw_id] = CITYSCAPES.palette[train_id]
    assert read([stored(np.array([[7, 7, 11, 0]]), of_label_ids)]).encoding == "label_ids"


def test_indices_that_are_not_the_ids_of_their_colours_are_refused() -> None:
    turned_round = CITYSCAPES.palette[::-1]
    with pytest.raises(UnclearLabels, match=r"palettes .* contradict train_ids"):
        read([stored(np.arange(19)[None], turned_round)])
    assert read([stored(np.arange(19)[None], turned_round)], asked="train_ids").valid == 1.0


def test_a_colour_with_several_ids_is_asked_about() -> None:
    """Palettes that a program made for each file: their colours are no classes of ours, and their indices no ids."""
    colours = [(9, 9, 200), (9, 200, 9), (200, 9, 9)]
    mixed = [stored(np.arange(3)[None], order) for order in (colours, colours[::-1])]
    with pytest.raises(UnclearLabels, match=r"the colour \((9|200), 9, (9|200)\) has the ids 0, 2 in different files"):
        read(mixed, CAMVID)
    assert read(mixed, CAMVID, asked="train_ids").valid == 1.0
    assert read([stored(np.arange(3)[None], order) for order in (colours, [*colours, (1, 1, 1)])], CAMVID).valid == 1.0
    black = [stored(np.arange(3)[None], [(0, 0, 0)] * 3), stored(np.arange(3)[None], [(0, 0, 0), (1, 1, 1), (0, 0, 0)])]
    assert read(black, CAMVID).valid == 1.0, "colours that ids share say nothing"


def test_colour_maps_that_say_nothing_are_not_listened_to() -> None:
    voc = np.array([[(i & 1) << 7, (i >> 1 & 1) << 7, (i >> 2 & 1) << 7] for i in range(8)] + [[64, 0, 0]])
    assert read([stored(np.arange(9)[None], voc.tolist())], CAMVID).encoding == "train_ids"
    assert read([stored(np.arange(11)[None], [(9, 9, index) for index in range(11)])], CAMVID).encoding == "train_ids"


# -- edges -----------------------------------------------------------------------------------------------------------


def scaled(how: Image.Resampling) -> LabelFile:
    areas = np.kron(np.random.default_rng(1).integers(0, 11, (8, 8)), np.ones((16, 16)))
    image = Image.fromarray(areas.astype(np.uint8)).resize((200, 200), how)
    return stored(np.array(image), None)


def test_interpolated_labels_are_warned_of() -> None:
    assert "interpolation" in read([scaled(Image.Resampling.BILINEAR)], CAMVID, asked="train_ids").sentences()[-1]
    assert len(read([scaled(Image.Resampling.NEAREST)], CAMVID).sentences()) == 1
    noise = np.random.default_rng(0).integers(0, 11, (64, 64))
    assert read([stored(noise, None)], CAMVID).blended == 0, "no areas, no edges"


def test_jpeg_once_is_warned_of() -> None:
    areas = np.kron(np.random.default_rng(1).integers(2, 9, (9, 9)), np.ones((13, 13))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(areas).save(buffer, "JPEG", quality=90)
    once = np.array(Image.open(io.BytesIO(buffer.getvalue())))
    assert read([stored(np.clip(once, 0, 10), None)], CAMVID).blended > 0.12


def test_every_pixel_is_counted_once() -> None:
    for height, width in ((1, 1), (1, 3), (2, 4), (7, 9)):
        ids = np.random.default_rng(height).integers(0, 5, (height, width))
        values, counts = np.unique(ids, return_counts=True)
        assert stored(ids, None).pixels == dict(zip(values.tolist(), counts.tolist(), strict=True))
        assert facts_of("/a", StoredLabel(ids.astype(np.uint8).T, None, 1))["pixels"] == counts.tolist()
