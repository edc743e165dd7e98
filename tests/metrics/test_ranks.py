"""Rank correlation, by hand."""

import pytest

from nightseg.metrics.ranks import spearman


def test_only_the_order_counts() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1)).
    assert spearman([5, 6, 7, 8], [0.2, 0.1, 0.4, 0.3]) == pytest.approx(0.6)


def test_equal_values_share_their_mean_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, sums of squares 4.5 and 5.
    assert spearman([0, 1, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_it_is_not_defined_without_an_order() -> None:
    assert spearman([1.0], [2.0]) is None and spearman([], []) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
