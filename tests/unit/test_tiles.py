"""Tiles cover, seams blend, and what looks no further than the overlap is the same as on the whole image."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nightseg.unit.tiles import spans, tiled


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "expected"),
    [
        (10, 10, 4, [(0, 10)]),
        (7, 10, 4, [(0, 7)]),
        (11, 10, 4, [(0, 10), (1, 11)]),
        (16, 10, 4, [(0, 10), (6, 16)]),
        (17, 10, 4, [(0, 10), (6, 16), (7, 17)]),
        (20, 10, 0, [(0, 10), (10, 20)]),
    ],
)
def test_spans(size: int, tile: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert spans(size, tile, overlap) == expected


def test_neighbours_share_the_overlap_or_more() -> None:
    for size in range(21, 90):
        places = spans(size, 20, 6)
        assert places[0][0] == 0 and places[-1][1] == size
        assert all(end - begin == 20 for begin, end in places)
        assert all(last[1] - first[0] >= 6 for last, first in itertools.pairwise(places))


def test_a_tile_as_large_as_the_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        spans(100, 10, 10)


def test_identity_comes_back_whatever_the_tiles() -> None:
    images = torch.rand(2, 3, 33, 47)
    for tile in ((8, 8), (10, 47), (40, 9), (33, 47)):
        torch.testing.assert_close(tiled(lambda part: part, images, tile, 4), images, rtol=1e-6, atol=1e-6)


def test_outside_the_seams_a_local_operation_is_exact_and_inside_the_nearer_tile_counts_more() -> None:
    images, kernel = torch.rand(1, 1, 30, 30), torch.rand(1, 1, 5, 5)

    def blur(part: torch.Tensor) -> torch.Tensor:  # looks two pixels far, and puts zeros beyond the border
        return F.conv2d(part, kernel, padding=2)

    apart = (tiled(blur, images, (30, 18), 6) - blur(images))[0, 0].abs().amax(0)
    seam = range(12, 18)  # tiles are columns 0 .. 17 and 12 .. 29
    assert all((value > 1e-5) == (column in (12, 13, 16, 17)) for column, value in enumerate(apart.tolist()))
    assert set(seam) > {12, 13, 16, 17}
    wrong = F.conv2d(images[..., :18], kernel, padding=2)[..., 17] - blur(images)[..., 17]
    torch.testing.assert_close(apart[17], wrong.abs().max() * 0.5 / 6 / (0.5 / 6 + 5.5 / 6))
