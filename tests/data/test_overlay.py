"""Colours over a frame are the rounded mean; a legend has every class, in its colour, whatever the width."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.overlay import legend, mixed, with_legend
from nightseg.data.taxonomy import Taxonomy


def test_a_mixture_is_the_rounded_mean() -> None:
    image, colours = np.full((1, 1, 3), 255, np.uint8), np.array([[[255, 0, 128]]], dtype=np.uint8)
    assert mixed(image, colours).tolist() == [[[255, 128, 192]]]
    assert mixed(image, colours, 0.25).tolist() == [[[255, 191, 223]]]  # 191.25, 223.25


@pytest.mark.parametrize("width", [1, 60, 320, 2048])
@pytest.mark.parametrize("name", ["camvid11", "cityscapes19"])
def test_a_legend_has_every_class_in_its_colour(name: str, width: int) -> None:
    classes = taxonomy(name)
    sheet = legend(classes, width)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == max(width, 64)
    for colour in classes.palette:
        assert (sheet == np.array(colour, np.uint8)).all(axis=2).sum() >= 25, colour  # a patch of 10 x 10 has an edge
    assert (sheet[[0, -1]] == 255).all(), "nothing is cut off above or below"


def test_a_legend_below_leaves_the_picture_and_depends_on_its_width_alone() -> None:
    classes = Taxonomy("two", ("road", "a class with a long name"), ((128, 64, 128), (0, 0, 142)), {})
    one, other = np.full((30, 200, 3), 9, np.uint8), np.full((30, 200, 3), 200, np.uint8)
    made = with_legend(one, classes)
    assert (made[:30] == one).all() and made.shape[0] > 30 and made.shape[1] == 200
    assert (made[30:] == with_legend(other, classes)[30:]).all(), "frames of a video stay of one size"
    assert with_legend(one[:, :20], classes).shape[1] == 64
