import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightseg.metrics.confusion import add_up, confusion_matrix, pair_counts, scores


def test_two_by_two_masks() -> None:
    label = np.array([[0, 0], [1, 1]], dtype=np.uint8)
    prediction = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    matrix = confusion_matrix(label, prediction, 2)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1], [0, 2]]
    got = scores(matrix)
    assert got.pa == pytest.approx(3 / 4)
    assert got.ca == pytest.approx((1 / 2 + 1) / 2)
    assert got.iou == pytest.approx((1 / 2, 2 / 3))
    assert got.miou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got.fwiou == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)


def test_ignored_labels_count_nowhere() -> None:
    label = np.array([0, 255, 255, 1], dtype=np.uint8)
    assert confusion_matrix(label, np.array([0, 0, 255, 1]), 2).tolist() == [[1, 0], [0, 1]]


def test_a_prediction_that_is_no_class_is_a_miss_and_no_false_alarm() -> None:
    # By hand, as cityscapesScripts: class 0 has tp 1, fn 1 (the pixel without class), fp 0; class 1 has tp 1.
    label, prediction = np.array([0, 0, 1], dtype=np.uint8), np.array([0, 255, 1], dtype=np.uint8)
    matrix = confusion_matrix(label, prediction, 2)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 0]]
    got = scores(matrix)
    assert got.iou == pytest.approx((1 / 2, 1))
    assert got.pa == pytest.approx(2 / 3)
    for wrong in (2, 7, -1, 300):
        assert confusion_matrix(label, np.array([0, wrong, 1]), 2).tolist() == matrix.tolist()


def test_the_two_rules_for_a_class_that_is_only_predicted() -> None:
    matrix = np.array([[3, 0, 1], [0, 2, 0], [0, 0, 0]])  # class 2 is in no label
    strict, lenient = scores(matrix, "cityscapes"), scores(matrix, "detectron2")
    assert strict.iou == pytest.approx((3 / 4, 1, 0))
    assert strict.miou == pytest.approx((3 / 4 + 1) / 3)
    assert lenient.iou[:2] == pytest.approx((3 / 4, 1)) and math.isnan(lenient.iou[2])
    assert lenient.miou == pytest.approx((3 / 4 + 1) / 2)
    for got in (strict, lenient):
        assert got.pa == pytest.approx(5 / 6)
        assert got.ca == pytest.approx((3 / 4 + 1) / 2)
        assert got.fwiou == pytest.approx(4 / 6 * 3 / 4 + 2 / 6 * 1)


@pytest.mark.parametrize("rule", ["cityscapes", "detectron2"])
def test_a_class_that_occurs_nowhere_is_left_out(rule: str) -> None:
    got = scores(np.diag([4, 0, 4]), rule)  # type: ignore[arg-type]
    assert math.isnan(got.iou[1])
    assert got.miou == got.pa == got.ca == got.fwiou == 1.0


@pytest.mark.parametrize("rule", ["cityscapes", "detectron2"])
def test_no_valid_pixel_gives_no_number(rule: str) -> None:
    got = scores(confusion_matrix(np.full((2, 2), 255), np.zeros((2, 2), np.uint8), 3), rule)  # type: ignore[arg-type]
    assert all(math.isnan(value) for value in (got.pa, got.ca, got.miou, got.fwiou, *got.iou))


def test_perfect_and_hopeless() -> None:
    label = np.array([0, 1, 2, 0], dtype=np.uint8)
    assert scores(confusion_matrix(label, label, 3)).miou == 1.0
    assert scores(confusion_matrix(label, (label + 1) % 3, 3)).miou == 0.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_counts_are_those_of_a_slow_loop(seed: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.choice([*range(num_classes), 255], size=(7, 9)).astype(np.uint8)
    prediction = rng.integers(0, num_classes, size=(7, 9)).astype(np.uint8)
    slow = np.zeros((num_classes, num_classes), dtype=np.int64)
    for row, column in zip(label.ravel(), prediction.ravel(), strict=True):
        if row != 255:
            slow[row, column] += 1
    assert np.array_equal(confusion_matrix(label, prediction, num_classes), slow)


@pytest.mark.parametrize("block", [1, 2, 7, 9, 16, 64])
def test_areas_are_counted_by_runs_and_noise_by_pixels_with_the_same_result(block: int) -> None:
    """Both ways, around the share of changes at which they change places; runs go on over the ends of rows."""
    rng = np.random.default_rng(block)
    coarse = rng.integers(0, 256, (2, 4, 96 // block + 1), dtype=np.uint8)
    first, second = (np.kron(part, np.ones((16, block), np.uint8)) for part in coarse)
    slow = np.zeros((256, 256), dtype=np.int64)
    np.add.at(slow, (first, second), 1)
    found = pair_counts(first, second)
    assert found.dtype == np.int64 and np.array_equal(found, slow)
    assert np.array_equal(pair_counts(first[:, ::3], second[:, ::3]), pair_counts(first[:, ::3].copy(), second[:, ::3]))


def test_one_value_and_no_value() -> None:
    same = np.full((5, 7), 3, dtype=np.uint8)
    assert pair_counts(same, same)[3, 3] == pair_counts(same, same).sum() == 35
    assert pair_counts(same[:0], same[:0]).sum() == 0
    assert pair_counts(same[:1, :1], same[:1, :1]).sum() == 1


def test_matrices_of_frames_add_up_to_that_of_the_set() -> None:
    rng = np.random.default_rng(0)
    frames = [(rng.integers(0, 3, (4, 4)), rng.integers(0, 3, (4, 4))) for _ in range(3)]
    frames.append((np.zeros((4, 4), int), np.full((4, 4), 255)))
    together = confusion_matrix(*(np.stack(part) for part in zip(*frames, strict=True)), 3)
    assert np.array_equal(add_up([confusion_matrix(*frame, 3) for frame in frames], 3), together)
    assert add_up([], 3).tolist() == np.zeros((3, 3), int).tolist()
    assert add_up([confusion_matrix(*frames[0], 3)], 3).shape == (3, 3)


def test_inputs_are_not_changed_and_may_be_strided() -> None:
    label = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    before = label.copy()
    matrix = confusion_matrix(label[:, ::2], label[:, ::2], 3)
    assert matrix.sum() == 6 and np.array_equal(label, before)


@pytest.mark.parametrize(
    ("label", "prediction", "words"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "differ in size"),
        (np.array([3]), np.array([0]), "label 3 at 1 pixels"),
        (np.array([-1]), np.array([0]), "0 to 255"),
        (np.array([0.0]), np.array([0]), "integers"),
    ],
)
def test_what_cannot_be_counted_is_an_error(label: np.ndarray, prediction: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        confusion_matrix(label, prediction, 3)


def test_scores_refuse_what_is_no_matrix_or_no_rule() -> None:
    with pytest.raises(ValueError, match="rule"):
        scores(np.eye(2, dtype=int), "other")  # type: ignore[arg-type]
    for matrix in (np.eye(2), np.zeros((2, 4), int), np.zeros(3, int)):
        with pytest.raises(ValueError, match="matrix"):
            scores(matrix)
