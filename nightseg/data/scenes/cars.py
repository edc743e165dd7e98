"""The cars of a procedural street: from behind, from the front, and crossing; vans and buses too. Sizes in metres."""

from __future__ import annotations

import math

from numpy.random import Generator

from nightseg.data.scenes.sheet import (
    CAR,
    HEAD_LIGHT,
    ROAD_SURFACE,
    TAIL_LIGHT,
    Card,
    Colour,
    Point,
    Sheet,
    Source,
    Surface,
    facing_plane,
    pick,
    shade,
    upright_plane,
)

PAINTS: tuple[Colour, ...] = (
    (214, 214, 212), (178, 182, 186), (120, 124, 130), (58, 60, 66), (34, 36, 42), (150, 34, 34), (40, 62, 120),
    (70, 104, 150), (60, 84, 66), (196, 178, 140), (206, 160, 50), (110, 40, 52),
)  # fmt: skip
GLASS: Colour = (44, 50, 58)
RUBBER: Colour = (26, 26, 28)
SHADOW: Colour = (42, 42, 45)


def car(sheet: Sheet, rng: Generator, x: float, z: float, *, oncoming: bool, lit: bool, bulk: float) -> None:
    """A car, van (bulk above 0.82) or bus (above 0.95) seen from behind or, oncoming, from the front.

    z is the distance of its near end. A lit one shines with its tail or head lights where the domain has them on.
    """
    boxy = bulk > 0.82
    wide, height, length = rng.uniform(1.7, 1.92), rng.uniform(1.42, 1.7), rng.uniform(3.8, 4.7)
    if boxy:
        wide, height, length = (1.95, 2.2, 5.2) if bulk < 0.95 else (2.45, 2.95, 9.5)
    paint, half = pick(rng, PAINTS), 0.5 * wide
    left, right, near, far = x - half - 0.08, x + half + 0.08, z - 0.2, z + length
    sheet.floor([(left, near), (right, near), (right, far), (left, far)], SHADOW, ROAD_SURFACE)
    inner = x - half if x > 0.0 else x + half
    if abs(x) > half:  # otherwise the end hides both sides
        _long_side(sheet, inner, z, length, height, boxy, shade(paint, 0.92))
    end = Card(sheet, x, z, sheet.add(Surface(CAR, facing_plane(z), grain=0.03, reflect=0.04)))
    _end(end, half, height, boxy, oncoming, paint)
    if oncoming:
        light, colour, v, radius = HEAD_LIGHT, (206, 208, 204), 0.68, 0.13
    else:
        light, colour, v, radius = TAIL_LIGHT, (160, 26, 24), 0.8, 0.11
    number = sheet.glow(CAR, light) if lit else end.surface
    for side in (-1.0, 1.0):
        middle = side * (half - 0.2)
        end.box(middle - 1.1 * radius, v - radius, middle + 1.1 * radius, v + radius, colour, number)
    strength = rng.uniform(0.7, 1.3)
    if lit:
        sheet.sources.append(Source(x, v, z - 0.3, light, strength))


def _end(end: Card, half: float, height: float, boxy: bool, oncoming: bool, paint: Colour) -> None:
    """The near end: wheels, body, glass, bumper, plate."""
    for side in (-1.0, 1.0):
        middle = side * (half - 0.14)
        end.box(middle - 0.12, 0.0, middle + 0.12, 0.4, RUBBER)
    waist, top = (0.56 * height, 0.98 * half) if boxy else (0.62 * height, 0.76 * half)
    trim = 0.95 * half
    end.polygon(
        [(-half, 0.26), (half, 0.26), (half, waist - 0.08), (trim, waist), (-trim, waist), (-half, waist - 0.08)], paint
    )
    end.polygon([(-trim, waist), (trim, waist), (top, height), (-top, height)], shade(paint, 0.9))
    glass = 0.87
    end.polygon(
        [
            (-glass * trim, waist + 0.04),
            (glass * trim, waist + 0.04),
            (glass * top, height - 0.1),
            (-glass * top, height - 0.1),
        ],
        GLASS,
    )
    end.polygon(
        [
            (-0.8 * trim, waist + 0.1),
            (-0.2 * trim, waist + 0.1),
            (-0.4 * top, height - 0.14),
            (-0.8 * top, height - 0.14),
        ],
        shade(GLASS, 1.5),
    )
    end.box(-0.98 * half, 0.24, 0.98 * half, 0.42, shade(paint, 0.6))
    if oncoming:
        end.box(-0.46 * half, 0.5, 0.46 * half, 0.66, (30, 30, 32))
        end.box(-0.24, 0.34, 0.24, 0.44, (216, 216, 210))
    else:
        end.box(-0.25, 0.52, 0.25, 0.64, (210, 186, 70))
        end.bar([(-0.8 * half, waist - 0.02), (0.8 * half, waist - 0.02)], 0.03, shade(paint, 0.6))


def _long_side(sheet: Sheet, x: float, z: float, length: float, height: float, boxy: bool, paint: Colour) -> None:
    """The side that shows beside the near end, in the upright plane at x."""
    number = sheet.add(Surface(CAR, upright_plane(x, z, x, z + length), grain=0.03))
    project = sheet.camera.project

    def panel(low: float, high: float, begin: float, end: float, narrow: float, colour: Colour) -> None:
        """A panel between two shares of the length; its upper edge is drawn in by narrow."""
        corners = ((begin, low), (end, low), (end - narrow, high), (begin + narrow, high))
        sheet.polygon([project(x, v, z + length * share) for share, v in corners], colour, number)

    waist = 0.62 * height
    if boxy:
        panel(0.3, height, 0.0, 1.0, 0.0, paint)
        panel(0.52 * height, 0.84 * height, 0.05, 0.97, 0.0, GLASS)
    else:
        panel(0.26, waist, 0.0, 1.0, 0.02, paint)
        panel(waist, height, 0.02, 0.76, 0.12, shade(paint, 0.9))
        panel(waist + 0.03, height - 0.1, 0.07, 0.72, 0.11, GLASS)
        panel(waist + 0.03, height - 0.1, 0.37, 0.41, 0.0, shade(paint, 0.9))
    radius = 0.45 if height > 2.5 else 0.32
    for share in (0.18, 0.82):
        rim: list[Point] = []
        for k in range(10):
            angle = math.tau * k / 10
            rim.append(project(x, radius * (1 + math.sin(angle)), z + length * share + radius * math.cos(angle)))
        sheet.polygon(rim, RUBBER, number)


def crossing_car(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A car that drives across the view; x is its middle."""
    length, height = rng.uniform(3.9, 4.8), rng.uniform(1.42, 1.65)
    paint, half, way = pick(rng, PAINTS), 0.5 * length, 1.0 if rng.random() < 0.5 else -1.0
    sheet.floor(
        [(x - half, z - 0.2), (x + half, z - 0.2), (x + half, z + 1.8), (x - half, z + 1.8)], SHADOW, ROAD_SURFACE
    )
    card = Card(sheet, x, z, sheet.add(Surface(CAR, facing_plane(z), grain=0.03, reflect=0.05)))
    waist = 0.6 * height
    card.polygon(
        [
            (-half, 0.28),
            (half, 0.28),
            (half, waist - 0.1),
            (0.94 * half, waist),
            (-0.94 * half, waist),
            (-half, waist - 0.06),
        ],
        paint,
    )
    for begin, end, low, high, colour in (
        (-0.86, 0.5, waist, height, shade(paint, 0.9)),
        (-0.78, 0.42, waist + 0.04, height - 0.09, GLASS),
    ):
        inset = 0.24
        points = [(begin, low), (end, low), (end - inset, high), (begin + 0.6 * inset, high)]
        card.polygon([(way * half * u, v) for u, v in points], colour)
    card.box(-0.16 * half - 0.05, waist, -0.16 * half + 0.05, height - 0.06, shade(paint, 0.9))
    for u in (-0.62, 0.62):
        card.disc(u * half, 0.33, 0.33, RUBBER)
        card.disc(u * half, 0.33, 0.18, (120, 122, 124))
    nose, tail = way * 0.95 * half, -way * 0.96 * half
    card.box(nose - 0.13, 0.6, nose + 0.13, 0.78, (206, 208, 204), sheet.glow(CAR, HEAD_LIGHT))
    card.box(tail - 0.1, 0.64, tail + 0.1, 0.84, (160, 26, 24), sheet.glow(CAR, TAIL_LIGHT))
