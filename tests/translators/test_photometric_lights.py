"""Lights lie where the label says, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.translators.photometric import LitIds, sources
from nightseg.translators.settings import LitClasses

CAMVID, CITYSCAPES = taxonomy("camvid11").classes, taxonomy("cityscapes19").classes
SKY, BUILDING, POLE, ROAD, CAR = (CAMVID.index(name) for name in ("sky", "building", "pole", "road", "car"))
STREET = (1.0, 0.5, 0.2)


def roles(classes: Sequence[str] = CAMVID) -> LitIds:
    return LitIds.of(LitClasses(), classes)


def lit(label: np.ndarray, seed: int = 0, which: LitIds | None = None) -> np.ndarray:
    return sources(label, which or roles(), np.random.default_rng(seed), STREET)


def street() -> np.ndarray:
    return np.full((100, 160), ROAD, dtype=np.uint8)


def test_roles_are_those_classes_that_the_taxonomy_has() -> None:
    assert roles() == LitIds(sky=(SKY,), vehicle=(CAR,), signal=(), facade=(BUILDING,), lamp=(POLE,))
    found = roles(CITYSCAPES)
    assert [CITYSCAPES[index] for index in found.vehicle] == ["car", "truck", "bus", "motorcycle"]
    assert found.signal == (CITYSCAPES.index("traffic light"),)


def test_a_street_without_things_is_dark() -> None:
    label = street()
    label[:40] = SKY
    assert not lit(label).any()


def test_a_car_has_a_pair_of_lights_of_one_colour_inside_it() -> None:
    label = street()
    label[50:70, 40:80] = CAR
    light = lit(label)
    assert not light[label != CAR].any()
    rows, columns = np.nonzero(light.sum(axis=2))
    assert abs(rows.mean() - 62) < 1  # 60 % of its height
    left, right = columns[columns < 60], columns[columns >= 60]
    assert len(left) and abs((left.mean() - 40) - (80 - right.mean())) < 1.5
    assert len(np.unique(light[rows, columns], axis=0)) == 1


def test_cars_come_and_go() -> None:
    label = street()
    label[50:70, 40:80] = CAR
    tints = [lit(label, seed).reshape(-1, 3).max(axis=0) for seed in range(40)]
    white = [tint[2] > 0.5 * tint[0] for tint in tints]
    assert 5 < sum(white) < 30
    assert min(tint[0] for tint, is_white in zip(tints, white, strict=True) if is_white) > 3  # head lights are stronger


def test_only_the_head_of_a_tall_pole_shines_in_the_colour_of_the_street() -> None:
    label = street()
    label[10:80, 30:32] = POLE
    label[60:68, 100:110] = POLE  # a stump
    found = [lit(label, seed) for seed in range(20)]
    shining = [light for light in found if light.any()]
    assert 10 < len(shining) < 20
    for light in shining:
        rows, columns = np.nonzero(light.sum(axis=2))
        assert rows.max() <= 12 and rows.min() == 10 and set(columns.tolist()) <= {30, 31}
        assert light[10, 30] / light[10, 30].max() == pytest.approx(STREET)


def test_windows_lie_wholly_on_their_facade() -> None:
    label = street()
    label[10:60, 20:140] = BUILDING
    label[20:50, 60:90] = ROAD  # a hole in the wall
    light = lit(label, 3)
    on = light.sum(axis=2) > 0
    assert 0 < on[label == BUILDING].mean() < 0.2
    assert not on[label != BUILDING].any()


def test_a_signal_shows_one_of_three_colours_in_its_third() -> None:
    label = street()
    signal = CITYSCAPES.index("traffic light")
    label[20:50, 70:80] = signal
    seen = set()
    for seed in range(30):
        light = lit(label, seed, LitIds((), (), (signal,), (), ()))
        rows, columns = np.nonzero(light.sum(axis=2))
        red, green = light[rows[0], columns[0], :2]
        colour = "green" if green > red else "amber" if green > 0.3 * red else "red"
        assert ["red", "amber", "green"][(int(rows.mean()) - 20) // 10] == colour
        seen.add(colour)
    assert seen == {"red", "amber", "green"}


def test_specks_of_a_class_carry_no_light() -> None:
    label = street()
    label[5:7, 5:9] = CAR
    assert not lit(label).any()
