"""What stands and moves in a procedural street: people, bicycles, trees, lamps, signs, cars, houses, fences, skyline.

Every painter takes a place in metres (x right of the camera, z ahead) and draws one thing; what shines at night gets a
glow surface, and lamps, lit cars and shops add a light source. Sizes in metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nightseg.data.scenes.sheet import (
    ROAD_SURFACE,
    Card,
    Colour,
    Foot,
    Glow,
    Label,
    Pattern,
    Sheet,
    Source,
    Stroke,
    Surface,
    facing_plane,
    pick,
    shade,
    unit_circle,
    upright_plane,
)

LAST_LOT = 120.0  # beyond it there is only the skyline
RUBBER, GLASS, SHADOW, BLACK = (26, 26, 28), (44, 50, 58), (42, 42, 45), (30, 30, 32)
BLUE, RED, WHITE = (34, 70, 150), (178, 34, 36), (222, 222, 216)
HEAD_LAMP, TAIL_LAMP = (206, 208, 204), (160, 26, 24)
CLOTHES: tuple[Colour, ...] = (
    (40, 44, 60), (30, 30, 34), (150, 48, 44), (60, 86, 140), (196, 190, 180), (96, 92, 86), (170, 140, 70),
    (70, 110, 84), (120, 70, 110), (214, 120, 50), (52, 60, 52), (84, 60, 44),
)  # fmt: skip
LEAVES: tuple[Colour, ...] = (
    (72, 104, 46), (58, 88, 44), (92, 116, 56), (54, 78, 52), (110, 120, 50), (136, 104, 44), (84, 92, 60),
    (44, 70, 40),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((226, 180, 150), (196, 146, 112), (140, 98, 72), (96, 66, 50))
HAIR: tuple[Colour, ...] = ((40, 32, 28), (90, 70, 50), BLACK, (190, 180, 170))
METALS: tuple[Colour, ...] = ((112, 116, 118), (84, 88, 90), (58, 62, 62), (136, 138, 136), (60, 74, 62))
PAINTS: tuple[Colour, ...] = (
    (214, 214, 212), (178, 182, 186), (120, 124, 130), (58, 60, 66), (34, 36, 42), (150, 34, 34), (40, 62, 120),
    (70, 104, 150), (60, 84, 66), (196, 178, 140), (206, 160, 50), (110, 40, 52),
)  # fmt: skip
BOARDS: tuple[Colour, ...] = (BLUE, (26, 96, 66), (206, 170, 40), WHITE, (120, 66, 40))
WALLS: tuple[Colour, ...] = (
    (150, 92, 74), (128, 78, 64), (176, 150, 118), (196, 184, 162), (150, 148, 142), (118, 118, 120), (206, 202, 194),
    (170, 128, 92), (134, 140, 150), (100, 92, 88), (186, 164, 140), (140, 112, 100),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((112, 66, 54), (74, 72, 74), (92, 84, 80), (60, 62, 68))
FASCIAS: tuple[Colour, ...] = (
    (150, 40, 40), (40, 80, 130), (40, 100, 70), (196, 180, 60), (60, 60, 66), (200, 196, 188)
)  # fmt: skip
RAILINGS: tuple[Colour, ...] = ((52, 56, 56), (150, 112, 76), (196, 194, 186), (112, 84, 60), (120, 124, 124))


# -- at the kerb -----------------------------------------------------------------------------------------------------


def street_tree(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A broad tree, a poplar or a fir, 4 to 10 m high."""
    card, leaf = sheet.card(Label.TREE, x, z, grain=0.34), pick(rng, LEAVES, 0.2)
    bark = shade((92, 74, 58), 0.7 + 0.6 * rng.random())
    kind, height = rng.random(), rng.uniform(4.5, 9.5)
    trunk = rng.uniform(0.12, 0.24)
    card.symmetric([(trunk, 0), (0.7 * trunk, 0.6 * height)], bark)
    if kind < 0.14:  # fir
        for step in range(4):
            low, wide = height * (0.12 + 0.2 * step), height * (0.24 - 0.05 * step)
            card.polygon([(-wide, low), (wide, low), (0.0, low + 0.36 * height)], shade(leaf, 0.6 + 0.1 * step))
        return
    radius_u = height * (rng.uniform(0.12, 0.16) if kind < 0.24 else rng.uniform(0.24, 0.38))
    radius_v = 0.5 * height * rng.uniform(0.66, 0.78)
    middle = height - radius_v
    reach = 0.78 + 0.3 * rng.random(20)
    rim = zip(reach.tolist(), unit_circle(20), strict=False)
    card.polygon([(radius_u * r * u, middle + radius_v * r * v) for r, (u, v) in rim], shade(leaf, 0.78))
    for u, v, size, tone in rng.random((9, 4)).tolist():
        top = v - 0.5
        place, spread = (radius_u * 1.2 * (u - 0.5), middle + radius_v * 1.2 * top), radius_u * (0.2 + 0.24 * size)
        card.oval(*place, spread, radius_v * (0.14 + 0.2 * size), shade(leaf, 0.72 + 0.3 * tone + 0.4 * top))


def lamp_post(sheet: Sheet, rng: Generator, x: float, z: float, toward_road: float) -> None:
    """A street lamp 4.5 to 9 m high; toward_road is the signed length of its arm. One in ten is broken."""
    post, metal = sheet.card(Label.POLE, x, z, grain=0.05), pick(rng, METALS)
    height, half = rng.uniform(4.6, 8.5), rng.uniform(0.09, 0.15)
    post.block(0.0, half, 0.0, height, metal)
    post.block(0.0, 1.6 * half, 0.0, 0.9, shade(metal, 0.8))
    tip = toward_road
    post.bar([(0.0, height - 0.05), (0.5 * tip, height + 0.22), (tip, height + 0.3)], 1.2 * half, metal)
    working = rng.random() < 0.9
    kind = Glow.LAMP_EARLY if rng.random() < 0.5 else Glow.LAMP_LATE
    head = sheet.glow(Label.POLE, kind) if working else post.surface
    post.block(tip, 0.34, height + 0.2, height + 0.4, (190, 188, 176), head)
    if working:
        sheet.sources.append(Source(x + tip, height + 0.2, z, kind, rng.uniform(0.7, 1.3)))


def bollard(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A post of 1 m at the kerb."""
    card = sheet.card(Label.POLE, x, z, grain=0.04, reflect=0.3)
    card.block(0.0, 0.1, 0.0, 1.0, pick(rng, METALS))
    card.block(0.0, 0.1, 0.76, 0.88, (214, 210, 200))


def road_sign(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A round, triangular or square sign on a post; now and then a large board on two posts."""
    post = sheet.card(Label.POLE, x, z, grain=0.04)
    plate = sheet.add(Surface(Label.SIGN, facing_plane(z), grain=0.03, reflect=0.3))
    metal, kind = pick(rng, METALS), rng.random()
    height, half = rng.uniform(2.1, 2.9), rng.uniform(0.34, 0.52)
    if kind < 0.26:
        wide, tall = rng.uniform(0.9, 1.7), rng.uniform(0.9, 1.5)
        board = pick(rng, BOARDS)
        for side in (-0.7, 0.7):
            post.block(side * wide, 0.05, 0.0, height, metal)
        post.block(0.0, wide, height - 0.4, height + tall, shade(board, 0.8), plate)
        post.block(0.0, 0.94 * wide, height - 0.32, height + tall - 0.08, board, plate)
        ink = WHITE if sum(board) < 420 else (40, 40, 44)
        for line in range(2):
            low = height + tall * (0.1 + 0.42 * line)
            post.box(-0.7 * wide, low, wide * (0.2 + 0.5 * rng.random()), low + 0.16 * tall, ink, plate)
        return
    post.block(0.0, 0.06, 0.0, height, metal)
    middle = height + 0.5 * half
    if kind < 0.55:
        inner, outer = (BLUE, WHITE) if rng.random() < 0.4 else (WHITE, RED)
        post.disc(0.0, middle, half, outer, plate)
        post.disc(0.0, middle, 0.7 * half, inner, plate)
    elif kind < 0.78:
        for share, low, top, colour in ((1.0, 0.7, 1.0, RED), (0.55, 0.42, 0.5, WHITE)):
            base = middle - low * half
            post.polygon([(-share * half, base), (share * half, base), (0, middle + top * half)], colour, plate)
    else:
        post.block(0.0, half, middle - half, middle + half, BLUE, plate)
        post.block(0.0, 0.4 * half, middle - 0.5 * half, middle + 0.5 * half, WHITE, plate)


def traffic_light(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A signal on its post; it shines in every domain."""
    post = sheet.card(Label.POLE, x, z, grain=0.04)
    case = sheet.add(Surface(Label.SIGN, facing_plane(z), grain=0.03))
    post.block(0.0, 0.09, 0.0, 2.6, pick(rng, METALS))
    post.block(0.0, 0.3, 2.3, 3.5, (30, 32, 32), case)
    shining = int(rng.random() * 2.4)
    lamps = (
        (3.2, (150, 40, 36), Glow.SIGNAL_RED), (2.6, (50, 130, 70), Glow.SIGNAL_GREEN),
        (2.9, (150, 110, 30), Glow.SIGNAL_AMBER),
    )  # fmt: skip
    for number, (v, colour, kind) in enumerate(lamps):
        if number == shining:
            post.disc(0.0, v, 0.17, colour, sheet.glow(Label.SIGN, kind))
        else:
            post.disc(0.0, v, 0.11, shade(colour, 0.3), case)


# -- people ----------------------------------------------------------------------------------------------------------


def _upper_body(card: Card, rng: Generator, height: float, low: float) -> None:
    """Torso, arms and head of a person whose hips are low metres up."""
    coat, skin = pick(rng, CLOTHES, 0.2), pick(rng, SKIN)
    wide, neck = rng.uniform(0.22, 0.29), 0.82 * height
    card.symmetric([(0.75 * wide, low), (wide, neck - 0.06), (0.5 * wide, neck + 0.02)], coat)
    for side in (-1.0, 1.0):
        card.bar([(side * wide, neck - 0.08), (side * (wide + 0.06), low + 0.06)], 0.11, shade(coat, 0.8))
    card.oval(0.0, 0.915 * height, 0.105, 0.14, skin)
    card.oval(0.0, 0.955 * height, 0.105, 0.09, pick(rng, HAIR))


def pedestrian(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A person on foot, 1.5 to 1.9 m, mid-stride or standing."""
    card = sheet.card(Label.PEDESTRIAN, x, z, grain=0.05, reflect=0.03)
    height, stride = rng.uniform(1.5, 1.92), rng.uniform(0.02, 0.3)
    trousers, hip = pick(rng, CLOTHES, 0.2), 0.5 * height
    for side in (-1.0, 1.0):
        foot = side * (0.08 + stride)
        card.polygon([(side * 0.01, hip), (side * 0.17, hip), (foot + 0.07, 0.04), (foot - 0.07, 0.04)], trousers)
        card.box(foot - 0.08, 0.0, foot + 0.1, 0.08, RUBBER)
    _upper_body(card, rng, height, hip - 0.04)
    if rng.random() < 0.3:
        card.box(0.24, 0.55, 0.46, 0.88, pick(rng, CLOTHES))


def bicyclist(sheet: Sheet, rng: Generator, x: float, z: float, *, crossing: bool) -> None:
    """A person on a bicycle, from behind or, crossing, from the side; bicycle and rider are one class."""
    card = sheet.card(Label.BICYCLIST, x, z, grain=0.05, reflect=0.05)
    frame, trousers = pick(rng, (*METALS, (160, 40, 40), (40, 70, 130))), pick(rng, CLOTHES, 0.2)
    if not crossing:
        card.symmetric([(0.05, 0.0), (0.06, 0.68)], RUBBER)
        card.bar([(-0.3, 1.0), (0.3, 1.0)], 0.06, frame)
        card.polygon([(-0.2, 0.98), (-0.02, 0.98), (-0.08, 0.3), (-0.22, 0.3)], trousers)
        card.polygon([(0.2, 0.98), (0.02, 0.98), (0.08, 0.45), (0.22, 0.45)], trousers)
        _upper_body(card, rng, 1.78, 0.86)
        card.block(0.0, 0.06, 0.58, 0.7, (170, 34, 30), sheet.glow(Label.BICYCLIST, Glow.TAIL_LIGHT))
        return
    way = 1.0 if rng.random() < 0.5 else -1.0
    for middle in (-0.54, 0.54):
        card.bar([(middle + 0.34 * u, 0.34 * (1 + v)) for u, v in unit_circle(12)], 0.06, RUBBER)
    back, hub, crank, bars = (-0.54 * way, 0.34), (0.54 * way, 0.34), (-0.04 * way, 0.3), (0.42 * way, 1.02)
    saddle, shoulder = -0.2 * way, 0.14 * way
    card.bar([back, crank, bars, hub], 0.06, frame)
    card.bar([back, (saddle, 0.95), crank], 0.06, frame)
    card.polygon([(saddle - 0.1, 0.98), (saddle + 0.12, 0.98), (0.2 * way, 0.62), (0.02, 0.3), (-0.12, 0.34)], trousers)
    coat = pick(rng, CLOTHES, 0.2)
    card.polygon([(saddle - 0.14, 0.92), (saddle + 0.16, 0.92), (shoulder + 0.16, 1.42), (shoulder - 0.14, 1.54)], coat)
    card.bar([(shoulder, 1.5), bars], 0.1, shade(coat, 0.8))
    card.oval(shoulder + 0.06 * way, 1.66, 0.11, 0.14, pick(rng, SKIN))
    card.oval(shoulder + 0.04 * way, 1.72, 0.12, 0.09, pick(rng, CLOTHES))


# -- cars ------------------------------------------------------------------------------------------------------------


def _shadow(sheet: Sheet, left: float, right: float, near: float, far: float) -> None:
    sheet.floor([(left, near), (right, near), (right, far), (left, far)], SHADOW, ROAD_SURFACE)


def car(sheet: Sheet, rng: Generator, x: float, z: float, *, oncoming: bool, lit: bool, bulk: float) -> None:
    """A car, van (bulk above 0.82) or bus (above 0.95) seen from behind or, oncoming, from the front.

    z is the distance of its near end. A lit one shines with its tail or head lights where the domain has them on.
    """
    boxy = bulk > 0.82
    wide, height, length = rng.uniform(1.7, 1.92), rng.uniform(1.42, 1.7), rng.uniform(3.8, 4.7)
    if boxy:
        wide, height, length = (1.95, 2.2, 5.2) if bulk < 0.95 else (2.45, 2.95, 9.5)
    paint, half = pick(rng, PAINTS), 0.5 * wide
    _shadow(sheet, x - half - 0.08, x + half + 0.08, z - 0.2, z + length)
    if abs(x) > half:  # otherwise the end hides both sides
        _long_side(sheet, x - half if x > 0.0 else x + half, z, length, height, boxy, shade(paint, 0.92))
    end = sheet.card(Label.CAR, x, z, grain=0.03, reflect=0.04)
    _end(end, half, height, boxy, oncoming, paint)
    light, colour, v, radius = (
        (Glow.HEAD_LIGHT, HEAD_LAMP, 0.68, 0.13) if oncoming else (Glow.TAIL_LIGHT, TAIL_LAMP, 0.8, 0.11)
    )
    number = sheet.glow(Label.CAR, light) if lit else end.surface
    for side in (-1.0, 1.0):
        end.block(side * (half - 0.2), 1.1 * radius, v - radius, v + radius, colour, number)
    strength = rng.uniform(0.7, 1.3)
    if lit:
        sheet.sources.append(Source(x, v, z - 0.3, light, strength))


def _end(end: Card, half: float, height: float, boxy: bool, oncoming: bool, paint: Colour) -> None:
    """The near end: wheels, body, glass, bumper, plate."""
    for side in (-1.0, 1.0):
        end.block(side * (half - 0.14), 0.12, 0.0, 0.4, RUBBER)
    waist, top = (0.56 * height, 0.98 * half) if boxy else (0.62 * height, 0.76 * half)
    trim = 0.95 * half
    end.symmetric([(half, 0.26), (half, waist - 0.08), (trim, waist)], paint)
    end.symmetric([(trim, waist), (top, height)], shade(paint, 0.9))
    end.symmetric([(0.87 * trim, waist + 0.04), (0.87 * top, height - 0.1)], GLASS)
    low, high = waist + 0.1, height - 0.14
    shine = [(-0.8 * trim, low), (-0.2 * trim, low), (-0.4 * top, high), (-0.8 * top, high)]
    end.polygon(shine, shade(GLASS, 1.5))
    end.block(0.0, 0.98 * half, 0.24, 0.42, shade(paint, 0.6))
    if oncoming:
        end.block(0.0, 0.46 * half, 0.5, 0.66, BLACK)
        end.block(0.0, 0.24, 0.34, 0.44, (216, 216, 210))
    else:
        end.block(0.0, 0.25, 0.52, 0.64, (210, 186, 70))
        end.bar([(-0.8 * half, waist - 0.02), (0.8 * half, waist - 0.02)], 0.03, shade(paint, 0.6))


def _long_side(sheet: Sheet, x: float, z: float, length: float, height: float, boxy: bool, paint: Colour) -> None:
    """The side that shows beside the near end, in the upright plane at x."""
    number = sheet.add(Surface(Label.CAR, upright_plane(x, z, x, z + length), grain=0.03))
    project, waist, pillar = sheet.camera.project, 0.62 * height, shade(paint, 0.9)
    # low and high in metres, begin and end as shares of the length, by how much the upper edge is drawn in
    panels = (
        (0.3, height, 0.0, 1.0, 0.0, paint),
        (0.52 * height, 0.84 * height, 0.05, 0.97, 0.0, GLASS),
    ) if boxy else (
        (0.26, waist, 0.0, 1.0, 0.02, paint),
        (waist, height, 0.02, 0.76, 0.12, pillar),
        (waist + 0.03, height - 0.1, 0.07, 0.72, 0.11, GLASS),
        (waist + 0.03, height - 0.1, 0.37, 0.41, 0.0, pillar),
    )  # fmt: skip
    for low, high, begin, end, narrow, colour in panels:
        corners = ((begin, low), (end, low), (end - narrow, high), (begin + narrow, high))
        sheet.polygon([project(x, v, z + length * share) for share, v in corners], colour, number)
    radius = 0.45 if height > 2.5 else 0.32
    for share in (0.18, 0.82):
        middle = z + length * share
        rim = [project(x, radius * (1 + v), middle + radius * u) for u, v in unit_circle(10)[:-1]]
        sheet.polygon(rim, RUBBER, number)


def crossing_car(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A car that drives across the view; x is its middle."""
    length, height = rng.uniform(3.9, 4.8), rng.uniform(1.42, 1.65)
    paint, half, way = pick(rng, PAINTS), 0.5 * length, 1.0 if rng.random() < 0.5 else -1.0
    _shadow(sheet, x - half, x + half, z - 0.2, z + 1.8)
    card, waist = sheet.card(Label.CAR, x, z, grain=0.03, reflect=0.05), 0.6 * height
    body = [
        (-half, 0.28), (half, 0.28), (half, waist - 0.1), (0.94 * half, waist), (-0.94 * half, waist),
        (-half, waist - 0.06),
    ]  # fmt: skip
    card.polygon(body, paint)
    for begin, end, low, high, colour in (
        (-0.86, 0.5, waist, height, shade(paint, 0.9)),
        (-0.78, 0.42, waist + 0.04, height - 0.09, GLASS),
    ):
        points = [(begin, low), (end, low), (end - 0.24, high), (begin + 0.6 * 0.24, high)]
        card.polygon([(way * half * u, v) for u, v in points], colour)
    card.block(-0.16 * half, 0.05, waist, height - 0.06, shade(paint, 0.9))
    for u in (-0.62, 0.62):
        card.disc(u * half, 0.33, 0.33, RUBBER)
        card.disc(u * half, 0.33, 0.18, (120, 122, 124))
    card.block(way * 0.95 * half, 0.13, 0.6, 0.78, HEAD_LAMP, sheet.glow(Label.CAR, Glow.HEAD_LIGHT))
    card.block(-way * 0.96 * half, 0.1, 0.64, 0.84, TAIL_LAMP, sheet.glow(Label.CAR, Glow.TAIL_LIGHT))


# -- beside the street -----------------------------------------------------------------------------------------------


def paint_skyline(sheet: Sheet, rng: Generator) -> None:
    """Far buildings and trees along the horizon, and now and then a house where the street ends."""
    camera = sheet.camera
    town = sheet.add(Surface(Label.BUILDING, facing_plane(170.0), grain=0.05, pattern=_windows(rng, 3.4, 60.0)))
    wood = sheet.add(Surface(Label.TREE, facing_plane(150.0), grain=0.22))
    leafy = rng.random()
    x, end = -camera.center_x / camera.focal * 170.0, (camera.width - camera.center_x) / camera.focal * 170.0
    while x < end:
        wide = rng.uniform(8.0, 26.0)
        if rng.random() < leafy:
            colour, high = shade(pick(rng, LEAVES, 0.2), 0.9), rng.uniform(5.0, 11.0)
            tops = [(x + wide * k / 7, high * (0.75 + 0.25 * bump)) for k, bump in enumerate(rng.random(8).tolist())]
            corners = [camera.project(u, v, 150.0) for u, v in [(x, 0.0), *tops, (x + wide, 0.0)]]
            sheet.polygon(corners, colour, wood)
        else:
            sheet.wall((x, 170.0, x + wide, 170.0), 0.0, rng.uniform(6.0, 24.0), pick(rng, WALLS, 0.2), town)
        x += 0.9 * wide
    if rng.random() < 0.2:
        z, wide = rng.uniform(70.0, 110.0), rng.uniform(24.0, 50.0)
        front = sheet.add(Surface(Label.BUILDING, facing_plane(z), pattern=_windows(rng, 3.2, 11.0)))
        left = camera.along(rng.uniform(-0.7, -0.3) * wide, z)
        sheet.wall((left, z, left + wide, z), 0.0, 11.5, pick(rng, WALLS, 0.2), front)


def _windows(rng: Generator, first: float, top: float) -> Pattern:
    share_u, share_v = rng.uniform(0.35, 0.72), rng.uniform(0.42, 0.66)
    tone, storey = rng.uniform(0.012, 0.05), rng.uniform(2.8, 3.5)
    last = first + storey * max(1.0, math.floor((top - first) / storey))
    pitch, lit = rng.uniform(1.7, 3.4), rng.uniform(0.05, 0.6)
    return Pattern(pitch, storey, share_u, share_v, first, last, tone, 1.1 * tone, 1.3 * tone, lit)


def lots(
    sheet: Sheet, rng: Generator, *, wall: float, crossing: float, built: float, roofs: NDArray[np.float32]
) -> list[Stroke]:
    """The lots along x = wall; none where the cross street is (0 = none). built: share of the lots with a house.

    roofs, float32 (LAST_LOT,), is filled with the height of what throws a shadow, by metre.
    """
    strokes: list[Stroke] = []
    z = rng.uniform(1.0, 3.0)
    while z < LAST_LOT - 5.0:
        length = rng.uniform(8.0, 19.0) + 0.14 * z
        end = min(z + length, LAST_LOT - 1.0)
        if crossing and z < crossing + 11.0 and end > crossing - 3.0:
            if crossing - 3.0 - z < 4.0:
                z = crossing + 11.0
                continue
            end = crossing - 3.0
        span = (z, end - (0.0 if rng.random() < 0.6 else rng.uniform(0.5, 2.5)))
        if rng.random() < built:
            height = rng.uniform(4.5, 8.0) if rng.random() < 0.6 - 0.4 * (built > 0.8) else rng.uniform(8.0, 19.0)
            setback = 0.0 if built > 0.8 or rng.random() < 0.5 else rng.uniform(3.0, 8.0)
            paint = _house(sheet, rng, wall, span, height, setback)
        else:
            height, paint = 4.0, _green(sheet, rng, wall, span)
        roofs[int(span[0]) : int(span[1]) + 1] = height
        strokes.append((span[1], paint))
        z = end
    return strokes


def _house(
    sheet: Sheet, rng: Generator, wall: float, span: tuple[float, float], height: float, setback: float
) -> Callable[[], None]:
    """A building along the wall line; one with a front garden has a fence or a hedge at the wall line."""
    side = math.copysign(1.0, wall)
    foot = sheet.camera.foot(wall + side * setback, *span)
    colour, roof = pick(rng, WALLS, 0.16), pick(rng, ROOFS, 0.2)
    shop = setback == 0.0 and rng.random() < 0.5 and span[0] < 70.0
    pattern = _windows(rng, 3.5 if shop else rng.uniform(0.3, 0.9), height - 0.3)
    front = sheet.add(Surface(Label.BUILDING, upright_plane(*foot), pattern=pattern))
    gable_pattern = pattern._replace(lit=0.5 * pattern.lit) if rng.random() < 0.5 else Pattern()
    gable = sheet.add(Surface(Label.BUILDING, facing_plane(span[0]), pattern=gable_pattern))
    pitched, awning = (rng.uniform(1.2, 2.4) if height < 9.0 and rng.random() < 0.7 else 0.0), rng.random()
    fascia = pick(rng, FASCIAS)
    hedge = rng.random() < 0.5
    fence = barrier(sheet, rng, wall, span, hedge=hedge) if setback > 0.0 else None

    def paint() -> None:
        x0, z0 = foot[:2]
        flank = (x0, z0, x0 + side * 12.0, z0)
        sheet.wall(flank, 0.0, height, shade(colour, 0.94), gable)
        sheet.wall(foot, 0.0, height, colour, front)
        sheet.wall(foot, height - 0.25, height, shade(colour, 1.12), front)
        if pitched:
            sheet.wall(foot, height, height + pitched, roof, front)
            sheet.wall(flank, height, height + pitched, shade(roof, 0.9), gable)
        if shop:
            _shop(sheet, foot, front, fascia, awning)
        if fence is not None:
            fence()

    return paint


def _shop(sheet: Sheet, foot: Foot, front: int, fascia: Colour, chance: float) -> None:
    """A shop front on the ground floor, bright at night, and the light that it throws on the pavement."""
    x0, z0, x1, z1 = foot

    def panel(begin: float, end: float, low: float, high: float, colour: Colour, surface: int) -> None:
        """Between two shares of the front's length."""
        segment = (x0 + (x1 - x0) * begin, z0 + (z1 - z0) * begin, x0 + (x1 - x0) * end, z0 + (z1 - z0) * end)
        sheet.wall(segment, low, high, colour, surface)

    glass = sheet.glow(Label.BUILDING, Glow.SHOP)
    board = sheet.glow(Label.BUILDING, Glow.BOARD) if chance < 0.6 else front
    num_panes = max(1, round((z1 - z0) / 3.5))
    for k in range(num_panes):
        begin, wide = (k + 0.1) / num_panes, 0.78 / num_panes
        pane = glass if (k + int(10 * chance)) % 3 else front
        panel(begin, begin + wide, 0.5, 2.5, (104, 108, 108), pane)
        panel(begin, begin + wide, 1.9, 2.5, (132, 132, 124), pane)
        for goods in range(3):  # what stands in the window
            left = begin + wide * (0.1 + 0.3 * goods)
            high = 0.9 + 0.9 * math.modf(7.3 * chance + 0.37 * goods + 0.61 * k)[0]
            panel(left, left + 0.2 * wide, 0.5, high, shade(fascia, 0.4 + 0.2 * goods), pane)
    sheet.wall(foot, 2.65, 3.25, fascia, board)
    panel(0.3, 0.7, 2.8, 3.1, (214, 212, 204) if sum(fascia) < 480 else (50, 50, 56), board)
    sheet.sources.append(Source(0.48 * (x0 + x1), 1.6, 0.5 * (z0 + z1), Glow.SHOP, 0.6 + chance))


def barrier(sheet: Sheet, rng: Generator, x: float, span: tuple[float, float], *, hedge: bool) -> Callable[[], None]:
    """A hedge (class tree) or a fence of bars, planks or rails along the street."""
    foot = sheet.camera.foot(x, *span)
    if hedge:
        number = sheet.add(Surface(Label.TREE, upright_plane(*foot), grain=0.3))
        leaf, height = pick(rng, LEAVES, 0.2), rng.uniform(0.9, 1.9)

        def paint_hedge() -> None:
            sheet.wall(foot, 0.0, height, shade(leaf, 0.85), number)
            sheet.wall(foot, height - 0.22, height, leaf, number)

        return paint_hedge
    height, kind, colour = rng.uniform(1.0, 1.9), rng.random(), pick(rng, RAILINGS, 0.15)
    if kind < 0.45:  # bars
        grid = Pattern(rng.uniform(0.3, 0.5), height, 0.66, 0.72, 0.0, height, 0.05, 0.055, 0.04)
    elif kind < 0.75:  # planks
        grid = Pattern(rng.uniform(0.35, 0.6), height, 0.16, 1.0, 0.0, height, 0.03, 0.026, 0.02)
    else:  # rails between posts
        grid = Pattern(2.2, height / 3.0, 0.92, 0.5, 0.0, height, 0.06, 0.065, 0.05)
    rail = sheet.add(Surface(Label.FENCE, upright_plane(*foot), grain=0.05, reflect=0.03, pattern=grid))
    return partial(sheet.wall, foot, 0.0, height, colour, rail)


def _green(sheet: Sheet, rng: Generator, wall: float, span: tuple[float, float]) -> Callable[[], None]:
    """Trees, with a fence or a hedge before them."""
    (z0, z1), side = span, math.copysign(1.0, wall)
    num_trees = 2 + int(rng.random() * 2.0) + (z1 - z0 > 16.0)
    places = sorted(((rng.uniform(z0, z1), rng.uniform(1.0, 7.0)) for _ in range(num_trees)), reverse=True)
    foot = sheet.camera.foot(wall + side * 7.0, z0, z1)
    thicket = sheet.add(Surface(Label.TREE, upright_plane(*foot), grain=0.3))
    leaf, height = shade(pick(rng, LEAVES, 0.2), 0.7), rng.uniform(1.4, 4.0)
    paint_barrier = barrier(sheet, rng, wall, span, hedge=rng.random() < 0.35)

    def paint() -> None:
        sheet.wall(foot, 0.0, height, leaf, thicket)
        for z, beyond in places:
            street_tree(sheet, rng, sheet.camera.along(wall + side * beyond, z), z)
        paint_barrier()

    return paint
