"""Procedural street scenes with exact labels, by day, at twilight and at night: the data of the demo and of the tests.

A street (camera, road, houses, things) follows from (seed, index) alone; `light` then lights it for one domain,
so the night frame of a scene is the exact night version of its day frame and has the same label. Numpy's generators
and Pillow's strokes only, nothing from the process, the clock or a thread: the same arguments give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from nightseg.data.scenes.light import DOMAINS, illuminate
from nightseg.data.scenes.sheet import NEAR, PAVEMENT_SURFACE, ROAD_SURFACE, Camera, Colour, Sheet, Stroke, pick, shade
from nightseg.data.scenes.things import (
    LAST_LOT,
    barrier,
    bicyclist,
    bollard,
    car,
    crossing_car,
    lamp_post,
    lots,
    paint_skyline,
    pedestrian,
    road_sign,
    street_tree,
    traffic_light,
)
from nightseg.errors import UserError

SMALLEST = 32  # pixels; a smaller frame has no room for a street
_STATIONS = (NEAR, 1.5, 2.2, 3.0, 4.0, 5.5, 7.5, 10.0, 14.0, 20.0, 28.0, 40.0, 60.0, 90.0, 140.0, 240.0)


class Scene(NamedTuple):
    """image: uint8 HWC RGB. label: uint8 HW, train ids 0 to 10 of the taxonomy camvid11."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


def scene(seed: int, index: int, domain: str, height: int = 128, width: int = 256) -> Scene:
    """The street number index of the world seed, lit for the domain "day", "twilight" or "night".

    Same street and label for one (seed, index) in every domain; the frame's size only changes how finely it is drawn.
    seed and index are not negative. Raises UserError for another domain or a side under 32 pixels.
    """
    if domain not in DOMAINS:
        raise UserError(f"scenes: there is no domain {domain!r}", cure=f"use one of {', '.join(DOMAINS)}")
    if min(height, width) < SMALLEST:
        raise UserError(
            f"scenes: {height} x {width} pixels are too few for a street", cure=f"use at least {SMALLEST} pixels a side"
        )
    if min(seed, index) < 0:
        raise UserError(f"scenes: seed {seed} and index {index} are not both 0 or more", cure="use numbers from 0 on")
    street = _paint_street(_generator(seed, index, "street"), height, width)
    image, label = illuminate(
        *street,
        domain,
        weather=_generator(seed, index, domain),
        grain=_generator(seed, index, "grain"),
        sensor=_generator(seed, index, domain + " sensor"),
    )
    return Scene(image, label)


def _generator(seed: int, index: int, purpose: str) -> Generator:
    # One independent stream a purpose: a change of the light can never move a house.
    return np.random.default_rng(SeedSequence([seed, index, *purpose.encode()]))


class Plan(NamedTuple):
    """The cross section of a street. kerb and wall: metres from the road's middle, by side (-1 left, +1 right)."""

    side: int  # the side we drive on
    lane: float
    own_lanes: int
    oncoming_lanes: int
    kerb: dict[int, float]
    wall: dict[int, float]
    parking: dict[int, bool]
    crossing: float  # distance of the cross street, 0 = none
    built: float  # share of lots with a building


def _paint_street(rng: Generator, height: int, width: int) -> tuple[Sheet, tuple[float, float], NDArray[np.float32]]:
    """Plan and paint one street for frames of height x width pixels.

    Returns the sheet, metres from the street's middle to the houses left and right, and their heights by metre.
    """
    size = math.sqrt(height * width / 2.0)
    camera = Camera(
        width=width,
        height=height,
        focal=size * rng.uniform(1.25, 1.75),
        center_x=width * rng.uniform(0.38, 0.62),
        horizon_y=height * rng.uniform(0.4, 0.54),
        eye=rng.uniform(1.3, 1.9),
        bend=rng.uniform(-1.0, 1.0) ** 3 * 0.004,
    )
    sheet, plan = Sheet(camera), _plan(rng)
    _paint_ground(sheet, rng, plan)
    paint_skyline(sheet, rng)
    roofs = np.zeros((2, int(LAST_LOT)), np.float32)
    strokes: list[Stroke] = []
    for side, heights in zip((-1, 1), roofs, strict=True):
        wall = side * plan.wall[side]
        strokes += lots(sheet, rng, wall=wall, crossing=plan.crossing, built=plan.built, roofs=heights)
    strokes += [*_traffic(sheet, rng, plan), *_furniture(sheet, rng, plan), *_people(sheet, rng, plan)]
    for _, paint in sorted(strokes, key=lambda stroke: -stroke[0]):
        paint()
    return sheet, (plan.wall[-1], plan.wall[1]), roofs


def _plan(rng: Generator) -> Plan:
    side = 1 if rng.random() < 0.5 else -1
    lane, offset = rng.uniform(2.9, 3.5), rng.uniform(-0.4, 0.4)
    own, oncoming = 1 + int(rng.random() < 0.25), 1 + int(rng.random() < 0.35)
    kerb, wall, parking = {}, {}, {}
    for way in (-1, 1):
        lanes = own - 0.5 if way == side else oncoming + 0.5
        parking[way] = bool(rng.random() < 0.45)
        kerb[way] = lanes * lane + way * offset + (2.2 if parking[way] else rng.uniform(0.2, 0.7))
        wall[way] = kerb[way] + rng.uniform(1.8, 4.6)
    crossing = rng.uniform(16.0, 45.0) if rng.random() < 0.35 else 0.0
    built = (0.9, 0.6, 0.3)[int(rng.random() * 2.6)]
    return Plan(side, lane, own, oncoming, kerb, wall, parking, crossing, built)


# -- the ground ------------------------------------------------------------------------------------------------------


def _strip(sheet: Sheet, x0: float, x1: float, colour: Colour, surface: int = ROAD_SURFACE) -> None:
    """A strip of ground along the whole street between x0 and x1 metres from its middle."""
    along = sheet.camera.along
    border = [(along(x0, z), z) for z in _STATIONS] + [(along(x1, z), z) for z in reversed(_STATIONS)]
    sheet.floor(border, colour, surface)


def _patch(sheet: Sheet, x0: float, x1: float, z0: float, z1: float, colour: Colour) -> None:
    """A piece of the road."""
    corners = ((x0, z0), (x1, z0), (x1, z1), (x0, z1))
    sheet.floor([(sheet.camera.along(x, z), z) for x, z in corners], colour, ROAD_SURFACE)


def _paint_ground(sheet: Sheet, rng: Generator, plan: Plan) -> None:
    kerb, (width, height) = plan.kerb, sheet.image.size
    stone = pick(rng, ((150, 146, 138), (132, 130, 128), (160, 150, 136), (126, 118, 110), (146, 132, 122)))
    tar = pick(rng, ((96, 96, 98), (82, 82, 86), (110, 108, 106), (74, 76, 82)))
    horizon = sheet.camera.project(0.0, 0.0, 240.0)[1]
    sheet.polygon([(0, horizon), (width, horizon), (width, height), (0, height)], stone, PAVEMENT_SURFACE)
    for way in (-1, 1):  # joints of the paving, and the kerb stone
        for share in (0.35, 0.7, 1.0):
            x = way * (kerb[way] + share * (plan.wall[way] - kerb[way]))
            _strip(sheet, x - 0.03, x + 0.03, shade(stone, 0.88), PAVEMENT_SURFACE)
        _strip(sheet, way * kerb[way], way * (kerb[way] + 0.22), shade(stone, 1.2), PAVEMENT_SURFACE)
    _strip(sheet, -kerb[-1], kerb[1], tar)
    if plan.crossing:
        _patch(sheet, -60.0, 60.0, plan.crossing, plan.crossing + 8.0, tar)
    for _ in range(3):  # mended tar
        x, z = rng.uniform(-kerb[-1], kerb[1] - 1.2), 4.0 + 22.0 * rng.random() ** 2
        x1, z1, tone = x + rng.uniform(0.5, 1.2), z + rng.uniform(1.0, 5.0), rng.uniform(0.78, 1.12)
        _patch(sheet, x, x1, z, z1, shade(tar, tone))
    _strip(sheet, -kerb[-1], -kerb[-1] + 0.25, shade(tar, 0.8))
    _strip(sheet, kerb[1] - 0.25, kerb[1], shade(tar, 0.8))
    _paint_markings(sheet, rng, plan)


def _paint_markings(sheet: Sheet, rng: Generator, plan: Plan) -> None:
    white = shade((206, 206, 200), rng.uniform(0.85, 1.05))
    middle = -plan.side * 0.5 * plan.lane
    start, pitch = rng.uniform(0.0, 6.0), rng.uniform(5.0, 9.0)
    dividers = [middle + k * plan.side * plan.lane for k in range(-plan.oncoming_lanes + 1, plan.own_lanes)]
    solid = rng.random() < 0.25
    for x in dividers:
        if solid and x == middle:
            _strip(sheet, x - 0.07, x + 0.07, white)
            continue
        z = start
        while z < 80.0:
            if not plan.crossing or not plan.crossing - 3.0 < z < plan.crossing + 8.0:
                _patch(sheet, x - 0.07, x + 0.07, max(z, NEAR), max(z + 0.5 * pitch, NEAR), white)
            z += pitch
    lines = rng.random()
    if lines < 0.4:
        for way in (-1, 1):
            x = way * (plan.kerb[way] - (2.2 if plan.parking[way] else 0.35))
            _strip(sheet, x - 0.06, x + 0.06, white if lines < 0.25 else (196, 160, 60))
    zebra = rng.uniform(8.0, 26.0)
    if plan.crossing:
        zebra = plan.crossing - 4.5
        _patch(sheet, middle, plan.side * (plan.kerb[plan.side] - 0.4), zebra - 1.4, zebra - 0.9, white)
    if plan.crossing or rng.random() < 0.2:
        x = -plan.kerb[-1] + 0.5
        while x < plan.kerb[1] - 0.7:
            _patch(sheet, x, x + 0.5, zebra, zebra + 3.2, white)
            x += 1.05


# -- what stands and moves in the street -----------------------------------------------------------------------------


def _traffic(sheet: Sheet, rng: Generator, plan: Plan) -> Iterator[Stroke]:
    """Cars ahead of us, oncoming, parked at the kerbs and crossing."""
    along = sheet.camera.along
    for lane in range(-plan.oncoming_lanes, plan.own_lanes):
        z = rng.uniform(8.0, 40.0) if lane == 0 else rng.uniform(6.0, 26.0)
        while z < 75.0:
            x = along(plan.side * plan.lane * lane + rng.uniform(-0.2, 0.2), z)
            if rng.random() < 0.75:
                yield z, partial(car, sheet, rng, x, z, oncoming=lane < 0, lit=True, bulk=rng.random())
            z += rng.uniform(10.0, 36.0)
    for way in (-1, 1):
        z = rng.uniform(3.0, 12.0)
        while plan.parking[way] and z < 50.0:
            blocked = plan.crossing and plan.crossing - 8.0 < z < plan.crossing + 9.0
            if rng.random() < 0.7 and not blocked:
                x = along(way * (plan.kerb[way] - 1.1), z)
                yield z, partial(car, sheet, rng, x, z, oncoming=way != plan.side, lit=False, bulk=0.94 * rng.random())
            z += rng.uniform(5.6, 8.0)
    if plan.crossing and rng.random() < 0.7:
        z = plan.crossing + rng.uniform(2.0, 6.0)
        yield z, partial(crossing_car, sheet, rng, along(rng.uniform(-9.0, 9.0), z), z)


def _furniture(sheet: Sheet, rng: Generator, plan: Plan) -> Iterator[Stroke]:
    """Street lamps, trees, signs, signals, bollards and railings at the kerb."""
    spacing, both = rng.uniform(15.0, 28.0), rng.random() < 0.5
    for way in (-1, 1):

        def beside(offset: float, z: float, way: int = way) -> float:
            """x of what stands offset metres behind the kerb."""
            return sheet.camera.along(way * (plan.kerb[way] + offset), z)

        z = rng.uniform(5.0, 5.0 + spacing)
        while z < 100.0 and (both or way == plan.side):
            arm = -way * rng.uniform(0.8, 2.0)
            yield z, partial(lamp_post, sheet, rng, beside(0.5, z), z, arm)
            z += spacing
        z = rng.uniform(6.0, 16.0)
        if rng.random() < 0.4:
            while z < 70.0:
                yield z, partial(street_tree, sheet, rng, beside(0.9, z), z)
                z += rng.uniform(8.0, 16.0)
        for _ in range(1 + int(rng.random() * 2.5)):
            z = 5.0 + 26.0 * rng.random() ** 1.5
            yield z, partial(road_sign, sheet, rng, beside(rng.uniform(0.6, 1.4), z), z)
        if plan.crossing or rng.random() < 0.15:
            z = plan.crossing - 3.0 if plan.crossing else rng.uniform(10.0, 30.0)
            yield z, partial(traffic_light, sheet, rng, beside(0.5, z), z)
        if rng.random() < 0.25:
            start = rng.uniform(4.0, 14.0)
            for z in (start + 1.8 * k for k in range(5)):
                yield z, partial(bollard, sheet, rng, beside(0.35, z), z)
        elif rng.random() < 0.3:
            z = rng.uniform(6.0, 12.0)
            span = (z, z + rng.uniform(5.0, 16.0))
            yield span[1], barrier(sheet, rng, way * (plan.kerb[way] + 0.4), span, hedge=False)


def _people(sheet: Sheet, rng: Generator, plan: Plan) -> Iterator[Stroke]:
    """People on the pavements and crossing the road, bicyclists near the kerbs."""
    along = sheet.camera.along
    for _ in range(4 + int(rng.random() * 7.0)):
        way = 1 if rng.random() < 0.5 else -1
        z = 5.0 + 26.0 * rng.random() ** 1.8
        x = way * rng.uniform(plan.kerb[way] + 0.7, plan.wall[way] - 0.3)
        if rng.random() < 0.15:
            x, z = rng.uniform(-plan.kerb[-1], plan.kerb[1]), z + 4.0
        yield z, partial(pedestrian, sheet, rng, along(x, z), z)
    for _ in range(1 + int(rng.random() * 3.9)):
        way = 1 if rng.random() < 0.5 else -1
        z, crossing = 5.0 + 18.0 * rng.random() ** 1.6, rng.random() < 0.4
        x = way * (plan.kerb[way] - (2.7 if plan.parking[way] else rng.uniform(0.5, 1.3)))
        if crossing:
            x, z = rng.uniform(-0.8 * plan.kerb[-1], 0.8 * plan.kerb[1]), z + 3.0
        yield z, partial(bicyclist, sheet, rng, along(x, z), z, crossing=crossing)
