"""Labels of a teacher at the stride of its logits: what is written is read, and full size is what the teacher says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import BadFrame
from nightseg.data.labels import train_ids_of
from nightseg.data.stored_labels import (
    STORED_SCHEMA,
    Kept,
    StoredLabel,
    drop_impossible,
    kept_label,
    packed,
    place_of,
    read_stored,
    upsampled,
    with_kept,
)
from nightseg.data.table import frame_table
from nightseg.storage import Location, sha256_of

SKY, ROAD, CAR = 0, 3, 8


def stored(labels: list[list[int]], bins: list[list[int]], covered: tuple[float, float] | None = None) -> StoredLabel:
    labels_hw, bins_hw = (np.array(values, dtype=np.uint8) for values in (labels, bins))
    return StoredLabel(labels_hw, bins_hw, covered or (len(labels), len(labels[0])))


ONE = stored([[SKY, SKY, CAR], [ROAD, ROAD, ROAD]], [[255, 200, 130], [0, 128, 254]])
OTHER = stored([[CAR]], [[7]], (0.75, 1.0))


@pytest.fixture
def file(tmp_path: Path) -> Location:
    place = Location.of(tmp_path / "a#b") / "x.parquet"
    place.write_table(pa.Table.from_pylist([packed(ONE), packed(OTHER)], STORED_SCHEMA))
    return place


def test_what_is_written_is_read(file: Location) -> None:
    for row, label in enumerate((ONE, OTHER)):
        found = read_stored(place_of(file.uri, row), sha256_of(packed(label)["label"]))
        assert found.covered == label.covered
        assert found.labels_hw.tolist() == label.labels_hw.tolist() and found.bins_hw.tolist() == label.bins_hw.tolist()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (lambda file: file.uri, "label_missing"),
        (lambda file: place_of(f"{file.uri}x", 0), "label_missing"),
        (lambda file: place_of(file.uri, 2), "unreadable"),
        (lambda file: place_of(file.uri, 1), "unreadable"),  # another label than the one that was meant
        (lambda file: place_of(str(file.parent / "damaged.parquet"), 0), "unreadable"),
    ],
)
def test_what_is_not_there_is_a_bad_frame(file: Location, place: Callable[[Location], str], reason: str) -> None:
    (file.parent / "damaged.parquet").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BadFrame) as caught:
        read_stored(place(file), sha256_of(packed(ONE)["label"]))
    assert caught.value.reason == reason


def test_a_row_says_what_of_its_label_is_kept(file: Location) -> None:
    uri, sha256 = place_of(file.uri, 0), sha256_of(packed(ONE)["label"])
    row = {"frame_id": "x", "uri": "x.png", "label_uri": uri, "label_sha256": sha256, "label_encoding": "train_ids"}
    frames = frame_table([{**row, "height": 2, "width": 3}])
    pixels = pa.chunked_array([[[1] * 11]], pa.list_(pa.int64()))
    kept = with_kept(frames, Kept((201,) * 11), pixels)
    assert kept["label_pixels"].to_pylist() == [[1] * 11]
    found = train_ids_of(kept.to_pylist()[0], taxonomy("camvid11"))
    assert found is not None and found.tolist() == [[SKY, 255, 255], [255, 255, ROAD]]


def test_kept_is_known_by_its_text() -> None:
    kept = Kept((0, 17, 256), {2: (0, 1), 0: (1,)})
    assert Kept.of(kept.text) == kept and Kept.of(Kept((0,), {0: (1,), 2: (0, 1)}).text) == Kept((0,), kept.never_below)
    assert Kept((1,), {0: (1,), 2: (0,)}).text == Kept((1,), {2: (0,), 0: (1,)}).text


def test_bins_below_a_class_s_own_are_not_kept() -> None:
    bins = [0] * 11
    bins[SKY], bins[ROAD], bins[CAR] = 200, 129, 256
    assert Kept(tuple(bins)).apply(ONE.labels_hw, ONE.bins_hw).tolist() == [[SKY, SKY, 255], [255, 255, ROAD]]
    assert kept_label(ONE, Kept(tuple(bins)), (2, 3)).tolist() == [[SKY, SKY, 255], [255, 255, ROAD]]


def test_what_is_not_kept_forbids_nothing_below_it() -> None:
    label = stored([[ROAD, ROAD], [SKY, SKY]], [[100, 200], [200, 200]])
    rules, bins = {SKY: (ROAD,)}, (150,) * 11
    assert Kept(bins, rules).apply(label.labels_hw, label.bins_hw).tolist() == [[255, ROAD], [SKY, 255]]
    assert kept_label(label, Kept(bins, rules), (2, 2)).tolist() == [[255, ROAD], [SKY, 255]]
    assert Kept((0,) * 11, rules).apply(label.labels_hw, label.bins_hw).tolist() == [[ROAD, ROAD], [255, 255]]
    assert drop_impossible(label.labels_hw, {}) is not None


@pytest.mark.parametrize("covered", [(9.0, 12.0), (8.25, 11.5)])  # the last logits may lie beyond the frame
@pytest.mark.parametrize("scale", [1, 4, 2.7])
def test_two_classes_meet_where_their_logits_do(covered: tuple[float, float], scale: float) -> None:
    """The difference of two classes' logits is interpolated, by pixel centres, as the teacher interpolates logits."""
    rng = np.random.default_rng(5)
    coarse_hw = 3 * rng.standard_normal((9, 12))
    labels_hw = np.where(coarse_hw > 0, ROAD, SKY).astype(np.uint8)
    bins_hw = (256 / (1 + np.exp(-np.abs(coarse_hw)))).astype(np.uint8)
    size = round(scale * covered[0]), round(scale * covered[1])

    def places(length: int, logits: float, last: int) -> np.ndarray:
        return ((np.arange(length) + 0.5) * logits / length - 0.5).clip(0, last)

    y, x = places(size[0], covered[0], 8), places(size[1], covered[1], 11)
    rows_hW = np.stack([np.interp(x, np.arange(12), row) for row in coarse_hw])
    true_HW = np.stack([np.interp(y, np.arange(9), column) for column in rows_hW.T], axis=1)
    found_HW, scores_HW = upsampled(StoredLabel(labels_hw, bins_hw, covered), size)
    # A bin's middle stands for all of it, and no logit votes with less than 0.05; interpolation adds no error of its
    # own, and float32 has 24 bits for numbers below 8.
    middle_hw = (bins_hw + 0.5) / 256
    told_hw = np.log(middle_hw / (1 - middle_hw))
    bound = np.abs(told_hw - np.abs(coarse_hw)).max() + 0.05 + 64 * 8 * 2.0**-24
    clear_HW = np.abs(true_HW) > bound
    assert clear_HW.mean() > 0.5
    assert (found_HW[clear_HW] == np.where(true_HW > 0, ROAD, SKY)[clear_HW]).all()
    assert np.abs(scores_HW - np.abs(true_HW))[clear_HW].max() <= 2 * bound


def test_among_equals_the_confidence_is_theirs() -> None:
    label = stored([[CAR] * 3] * 2, [[10, 100, 255]] * 2)
    labels_HW, scores_HW = upsampled(label, (8, 12))
    assert (labels_HW == CAR).all() and (np.diff(scores_HW, axis=1) >= 0).all()
    for pixel, bin_ in ((0, 10), (11, 255)):
        middle = (bin_ + 0.5) / 256
        assert np.abs(scores_HW[:, pixel] - np.log(middle / (1 - middle))).max() < 16 * 2.0**-24 * 8
