"""Thresholds and guards on histograms small enough to count by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.stored_labels import NUM_BINS, Kept, StoredLabel, drop_impossible, kept_label
from nightseg.data.table import frame_table
from nightseg.segmenter.self_training import (
    NOTHING_KEPT,
    KeptPixels,
    check_never_below,
    class_thresholds,
    confidence_bins,
    confidence_histogram,
    guard,
    impossible,
    kept_of_histograms,
    least_bins,
    precise_thresholds,
)
from nightseg.segmenter.settings import Threshold
from nightseg.storage import Location, UserError


def histogram(*bins: tuple[int, int]) -> np.ndarray:
    row = np.zeros(NUM_BINS, dtype=np.int64)
    for place, pixels in bins:
        row[place] = pixels
    return row


def kept_of(histograms_KB: np.ndarray, thresholds_K: np.ndarray) -> KeptPixels:
    """What thresholds keep, read off the histograms."""
    kept_1K = kept_of_histograms(histograms_KB[None], least_bins(thresholds_K))
    return KeptPixels(histograms_KB.sum(axis=1), kept_1K[0])


def test_bins_are_the_floor_of_256_times_the_confidence() -> None:
    confidence = np.array([[0.0, 0.5, 0.9, 1.0]], dtype=np.float32)
    assert confidence_bins(confidence).tolist() == [[0, 128, 230, 255]]


def test_histogram_counts_every_pixel_under_its_class_and_bin() -> None:
    labels = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    confidence = np.array([[0.5, 0.25], [0.25, 1.0]], dtype=np.float32)
    counts = confidence_histogram(labels, confidence, 3)
    assert counts.shape == (3, NUM_BINS)
    assert counts[0, 128] == 1 and counts[1, 64] == 2 and counts[1, 255] == 1
    assert counts.sum() == 4


def test_none_keeps_all_and_fixed_nothing_below_its_number() -> None:
    nothing = np.zeros((2, NUM_BINS), dtype=np.int64)
    assert class_thresholds(Threshold(kind="none", confidence=0.9, share=0.5), nothing).tolist() == [0, 0]
    fixed = class_thresholds(Threshold(kind="fixed", confidence=0.9, share=0.5), nothing)
    assert fixed.tolist() == [0.9, 0.9]
    assert least_bins(fixed) == (231, 231)  # 0.9 is 230.4 of 256: bin 230 has less sure pixels, too


def test_bins_of_thresholds_keep_what_lies_at_an_edge_and_nothing_above_one() -> None:
    thresholds = np.array([0.0, 0.5, 102 / 256, 0.6, 1.0, NOTHING_KEPT])
    assert least_bins(thresholds) == (0, 128, 102, 154, 255, 256)
    counts = np.ones((2, 6, NUM_BINS), dtype=np.int32)
    counts[1] *= 2
    kept = np.array([256, 128, 154, 102, 1, 0])
    assert kept_of_histograms(counts, least_bins(thresholds)).tolist() == [kept.tolist(), (2 * kept).tolist()]


def test_class_balanced_takes_the_quantile_of_a_hard_class_and_the_limit_of_an_easy_one() -> None:
    histograms = np.stack([
        histogram((250, 10)),                        # easy: all surer than the limit
        histogram((100, 4), (120, 3), (140, 3)),     # hard: 60 % of 10 are the 6 in bins 120 and 140
        histogram(),                                 # never predicted
    ])  # fmt: skip
    thresholds = class_thresholds(Threshold(kind="class_balanced", confidence=0.9, share=0.6), histograms)
    assert thresholds.tolist() == [230 / 256, 120 / 256, 230 / 256]
    pixels = kept_of(histograms, thresholds)
    assert pixels.predicted.tolist() == [10, 10, 0]
    assert pixels.kept.tolist() == [10, 6, 0]
    assert pixels.share == 0.8
    assert pixels.share_by_class == [1.0, 0.6, None]


def test_class_balanced_keeps_at_least_the_share_where_bins_are_coarse() -> None:
    histograms = histogram((50, 9), (200, 1))[None]
    thresholds = class_thresholds(Threshold(kind="class_balanced", confidence=1.0, share=0.2), histograms)
    assert thresholds.tolist() == [50 / 256]  # the one pixel of bin 200 is only a tenth
    everything = class_thresholds(Threshold(kind="class_balanced", confidence=1.0, share=1.0), histograms)
    assert kept_of(histograms, everything).kept.tolist() == [10]
    nothing = class_thresholds(Threshold(kind="class_balanced", confidence=1.0, share=0.0), histograms)
    assert kept_of(histograms, nothing).kept.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    confidence=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_histograms_say_exactly_which_pixels_are_kept(seed: int, confidence: float, share: float) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, (9, 11)).astype(np.uint8)
    sure = random.random((9, 11), dtype=np.float32)
    counts = confidence_histogram(labels, sure, 4)
    thresholds = class_thresholds(Threshold(kind="class_balanced", confidence=confidence, share=share), counts)
    assert (thresholds <= confidence).all()
    promised = kept_of(counts, thresholds)
    bins, said = confidence_bins(sure), Kept(least_bins(thresholds))
    at_full_size = kept_label(StoredLabel(labels, bins, labels.shape), said, labels.shape)
    for kept in (said.apply(labels, bins), at_full_size):  # as counted, and as learned where a logit is a pixel
        assert np.bincount(kept.ravel(), minlength=256)[:4].tolist() == promised.kept.tolist()
        assert ((kept == labels) | (kept == 255)).all()
    for part in promised.share_by_class:
        assert part is None or part >= share - 1e-6


def pixels(predicted: list[int], kept: list[int]) -> KeptPixels:
    return KeptPixels(np.array(predicted, dtype=np.int64), np.array(kept, dtype=np.int64))


def test_healthy_pseudo_labels_raise_no_warning() -> None:
    assert guard(pixels([50, 30, 20], [40, 20, 10]), ("road", "sky", "car")) == []


def test_guards_name_the_class_and_the_cure() -> None:
    classes = ("road", "sky", "car")
    (dominant,) = guard(pixels([96, 2, 2], [95, 2, 2]), classes)
    assert "road takes 96.0% of the kept pixels" in dominant
    vanished = guard(pixels([500, 300, 200], [300, 200, 0]), classes)
    assert len(vanished) == 1 and "every pixel of car" in vanished[0] and "class_balanced" in vanished[0]
    (few,) = guard(pixels([500, 400, 100], [10, 8, 2]), classes)
    assert "only 2.00% of the pixels are kept" in few
    (unseen,) = guard(pixels([60, 40, 0], [60, 30, 0]), classes)
    assert unseen.startswith("the teacher hardly ever predicts car on these frames")
    (nearly,) = guard(pixels([60_000, 40_000, 9], [60_000, 30_000, 9]), classes)
    assert "hardly ever predicts car" in nearly
    assert guard(pixels([60_000, 40_000, 11], [60_000, 30_000, 11]), classes) == []


def test_no_pixel_kept_is_an_error() -> None:
    with pytest.raises(UserError, match="keep none of 100 pixels"):
        guard(pixels([60, 40], [0, 0]), ("road", "sky"))


# -- limits and rules -------------------------------------------------------------------------------------------------


def test_a_floor_holds_and_the_upper_limit_counts_more() -> None:
    histograms = np.zeros((3, NUM_BINS), dtype=np.int64)
    histograms[0, 90], histograms[1, 250] = 10, 10  # unsure; sure; never predicted
    threshold = Threshold(kind="class_balanced", share=0.5, confidence=0.9)
    assert (class_thresholds(threshold, histograms) * 256).tolist() == [90, 230, 230]
    floor = threshold.model_copy(update={"floor": 0.6})
    assert (class_thresholds(floor, histograms) * 256).tolist() == [154, 230, 230]  # 153.6 is no edge of a bin
    same = threshold.model_copy(update={"floor": 0.9})
    assert (class_thresholds(same, histograms) * 256).tolist() == [230, 230, 230]


def test_the_least_confidence_at_which_enough_pixels_are_right() -> None:
    """Class 0: of 3,000 pixels 2,000 are right, of the 1,000 surest ones 800. Class 1: seldom right. Class 2: too few
    to tell. Class 3: always right."""
    right, judged = np.zeros((4, NUM_BINS)), np.zeros((4, NUM_BINS))
    judged[0, 100], right[0, 100] = 2000, 1200
    judged[0, 200], right[0, 200] = 1000, 800
    judged[1, 240], right[1, 240] = 1000, 700
    judged[2, 240] = 999
    judged[3, 50] = right[3, 50] = 1000
    assert (precise_thresholds(right, judged, 0.8) * 256).tolist() == [101, 512, 0, 0]
    assert (precise_thresholds(right, judged, 0.66) * 256).tolist() == [0, 0, 0, 0]  # bin 0 and above: all of them


def test_a_floor_above_the_limit_or_without_class_balance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor 0\.95 is above confidence 0\.9"):
        Threshold(floor=0.95)
    with pytest.raises(ValueError, match="fixed has none"):
        Threshold(kind="fixed", floor=0.5)


SKY, ROAD, PAVEMENT = 0, 3, 4


def test_a_class_below_one_that_it_is_never_below() -> None:
    """A column each: sky above, sky between two roads, sky below an unsure pixel and a pavement, nothing but sky."""
    label = torch.tensor(
        [
            [SKY, ROAD, 255, SKY],
            [SKY, SKY, SKY, SKY],
            [ROAD, ROAD, PAVEMENT, SKY],
            [ROAD, SKY, SKY, SKY],
        ],
        dtype=torch.uint8,
    )  # fmt: skip
    wrong = impossible(label[None], {SKY: (ROAD, PAVEMENT)})[0]
    assert wrong.nonzero().tolist() == [[1, 1], [3, 1], [3, 2]]
    assert impossible(label[None], {SKY: (ROAD,)})[0].nonzero().tolist() == [[1, 1], [3, 1]]
    dropped = drop_impossible(label.numpy(), {SKY: (ROAD, PAVEMENT)})
    assert (dropped[wrong.numpy()] == 255).all() and (dropped == label.numpy())[~wrong.numpy()].all()
    assert drop_impossible(label.numpy(), {}) is not None


def labelled(folder: Path, *labels: np.ndarray) -> pa.Table:
    rows = []
    for number, label in enumerate(labels):
        file = Location.of(folder) / f"{number}.png"
        file.write_bytes(encode_png(label.astype(np.uint8)))
        rows += [{"frame_id": f"{number}", "label_uri": file.uri, "label_encoding": "camvid12"}] * 2  # and translated
    return frame_table(rows)


def test_rules_are_checked_on_the_labels(tmp_path: Path) -> None:
    """2 of 2,048 sky pixels are below road, less than 0.1 %; with 3 more it is refused, with the figures."""
    classes, right = taxonomy("camvid11"), np.full((64, 32), ROAD)
    right[:32] = SKY
    few = right.copy()
    few[40, :2] = SKY
    check_never_below({"sky": ["road"]}, labelled(tmp_path, right, few), classes, "model m")
    few[40, 2:5] = SKY
    rows = labelled(tmp_path, right, few)
    expected = r"model m: self_training.never_below: in the labels sky is below road or pavement in its column: 5 of "
    with pytest.raises(UserError, match=expected + r"its 2,053 pixels \(0\.24%\), in 1 of 2 labels"):
        check_never_below({"sky": ["road", "pavement"]}, rows, classes, "model m")
    check_never_below({"road": ["car"], "car": ["pole"]}, rows, classes, "model m")
    check_never_below({}, rows, classes, "model m")
