"""Which pixels are hard: on frames small enough to count."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nightseg.segmenter.hard_pixels import HardPixels, hard_pixels

SURPRISE = torch.tensor([[[0.1, 3.0, 0.5, 2.0], [1.0, 0.2, 9.0, 0.4]], [[0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1]]])
VALID = torch.ones(2, 2, 4, dtype=torch.bool)
VALID[0, 1, 2] = False  # the hardest is ignored


def kept(choice: HardPixels, valid: Tensor = VALID) -> list[list[int]]:
    found = hard_pixels(SURPRISE, valid, choice)
    assert found.dtype == torch.bool and found.shape == valid.shape
    return [row.flatten().nonzero().flatten().tolist() for row in found]


def test_a_share_of_each_frame() -> None:
    assert kept(HardPixels(3 / 7, None, 0)) == [[1, 3, 4], [0, 1, 2, 3]]  # of 7 and of 8; equal ones all or none
    assert kept(HardPixels(1.0, None, 0))[0] == [0, 1, 2, 3, 4, 5, 7]
    assert kept(HardPixels(1e-6, None, 0))[0] == [1]  # never none of a frame that has some


def test_below_a_confidence_but_at_least_so_many() -> None:
    half = HardPixels(None, math.exp(-1.0), 1)
    assert kept(half) == [[1, 3, 4], [0, 1, 2, 3]]  # no pixel of the second frame: its hardest, which are four
    assert kept(half._replace(least=4))[0] == [1, 2, 3, 4]
    assert kept(half._replace(least=100)) == [[0, 1, 2, 3, 4, 5, 7], list(range(8))]


def test_a_frame_without_a_valid_pixel_gives_none() -> None:
    for choice in (HardPixels(0.5, None, 0), HardPixels(None, 0.5, 5)):
        assert kept(choice, torch.zeros_like(VALID)) == [[], []]


def test_a_frame_does_not_depend_on_its_neighbours() -> None:
    choice = HardPixels(0.25, None, 0)
    alone = [hard_pixels(SURPRISE[n : n + 1], VALID[n : n + 1], choice) for n in range(2)]
    assert torch.equal(torch.cat(alone), hard_pixels(SURPRISE, VALID, choice))
