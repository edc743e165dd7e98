"""What stands beside a procedural street: houses and shops, fences and hedges, gardens, and the far skyline. Metres."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nightseg.data.scenes.sheet import (
    BOARD,
    BUILDING,
    FENCE,
    SHOP,
    TREE,
    Colour,
    Pattern,
    Plane,
    Sheet,
    Source,
    Stroke,
    Surface,
    facing_plane,
    pick,
    shade,
    upright_plane,
)
from nightseg.data.scenes.things import LEAVES, street_tree

LAST_LOT = 120.0  # metres; beyond it there is only the skyline
WALLS: tuple[Colour, ...] = (
    (150, 92, 74), (128, 78, 64), (176, 150, 118), (196, 184, 162), (150, 148, 142), (118, 118, 120), (206, 202, 194),
    (170, 128, 92), (134, 140, 150), (100, 92, 88), (186, 164, 140), (140, 112, 100),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((112, 66, 54), (74, 72, 74), (92, 84, 80), (60, 62, 68))
RAILINGS: tuple[Colour, ...] = ((52, 56, 56), (150, 112, 76), (196, 194, 186), (112, 84, 60), (120, 124, 124))


def paint_skyline(sheet: Sheet, rng: Generator) -> None:
    """Far buildings and trees along the horizon, and now and then a house where the street ends."""
    camera = sheet.camera
    town = sheet.add(Surface(BUILDING, facing_plane(170.0), grain=0.05, pattern=_windows(rng, 3.4, 60.0)))
    wood = sheet.add(Surface(TREE, facing_plane(150.0), grain=0.22))
    leafy = rng.random()
    x, end = -camera.center_x / camera.focal * 170.0, (camera.width - camera.center_x) / camera.focal * 170.0
    while x < end:
        wide = rng.uniform(8.0, 26.0)
        if rng.random() < leafy:
            colour, high = shade(pick(rng, LEAVES, 0.2), 0.9), rng.uniform(5.0, 11.0)
            tops = [(x + wide * k / 7, high * (0.75 + 0.25 * bump)) for k, bump in enumerate(rng.random(8))]
            corners = [camera.project(u, v, 150.0) for u, v in [(x, 0.0), *tops, (x + wide, 0.0)]]
            sheet.polygon(corners, colour, wood)
        else:
            sheet.wall((x, 170.0, x + wide, 170.0), 0.0, rng.uniform(6.0, 24.0), pick(rng, WALLS, 0.2), town)
        x += 0.9 * wide
    if rng.random() < 0.2:
        z, wide = rng.uniform(70.0, 110.0), rng.uniform(24.0, 50.0)
        front = sheet.add(Surface(BUILDING, facing_plane(z), pattern=_windows(rng, 3.2, 11.0)))
        left = camera.along(rng.uniform(-0.7, -0.3) * wide, z)
        sheet.wall((left, z, left + wide, z), 0.0, 11.5, pick(rng, WALLS, 0.2), front)


def _windows(rng: Generator, first: float, top: float) -> Pattern:
    share_u, share_v = rng.uniform(0.35, 0.72), rng.uniform(0.42, 0.66)
    tone = rng.uniform(0.012, 0.05)
    storey = rng.uniform(2.8, 3.5)
    last = first + storey * max(1.0, math.floor((top - first) / storey))
    return Pattern(
        rng.uniform(1.7, 3.4),
        storey,
        share_u,
        share_v,
        first,
        last,
        tone,
        1.1 * tone,
        1.3 * tone,
        rng.uniform(0.05, 0.6),
    )


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
        foot = (z, end - (0.0 if rng.random() < 0.6 else rng.uniform(0.5, 2.5)))
        kind = rng.random()
        if kind < built:
            height = rng.uniform(4.5, 8.0) if rng.random() < 0.6 - 0.4 * (built > 0.8) else rng.uniform(8.0, 19.0)
            roofs[int(foot[0]) : int(foot[1]) + 1] = height
            setback = 0.0 if built > 0.8 or rng.random() < 0.5 else rng.uniform(3.0, 8.0)
            strokes.append(_house(sheet, rng, wall, foot, height, setback))
        else:
            strokes.append(_green(sheet, rng, wall, foot))
            roofs[int(foot[0]) : int(foot[1]) + 1] = 4.0
        z = end
    return strokes


def _foot(sheet: Sheet, x: float, z0: float, z1: float) -> Plane:
    """The ground segment (x0, z0, x1, z1) that follows the street x metres beside its middle."""
    return (sheet.camera.along(x, z0), z0, sheet.camera.along(x, z1), z1)


def _house(
    sheet: Sheet, rng: Generator, wall: float, span: tuple[float, float], height: float, setback: float
) -> Stroke:
    """A building along the wall line; one with a front garden has a fence or a hedge at the wall line."""
    side = math.copysign(1.0, wall)
    foot = _foot(sheet, wall + side * setback, *span)
    colour, roof = pick(rng, WALLS, 0.16), pick(rng, ROOFS, 0.2)
    shop = setback == 0.0 and rng.random() < 0.5 and span[0] < 70.0
    pattern = _windows(rng, 3.5 if shop else rng.uniform(0.3, 0.9), height - 0.3)
    front = sheet.add(Surface(BUILDING, upright_plane(*foot), grain=0.06, pattern=pattern))
    gable_pattern = pattern._replace(lit=0.5 * pattern.lit) if rng.random() < 0.5 else Pattern()
    gable = sheet.add(Surface(BUILDING, facing_plane(span[0]), grain=0.06, pattern=gable_pattern))
    pitched, awning = (rng.uniform(1.2, 2.4) if height < 9.0 and rng.random() < 0.7 else 0.0), rng.random()
    fascia = pick(rng, ((150, 40, 40), (40, 80, 130), (40, 100, 70), (196, 180, 60), (60, 60, 66), (200, 196, 188)))
    hedge = rng.random() < 0.5
    fence = barrier(sheet, rng, wall, span, hedge=hedge) if setback > 0.0 else None

    def paint() -> None:
        x0, z0 = foot[:2]
        sheet.wall((x0, z0, x0 + side * 12.0, z0), 0.0, height, shade(colour, 0.94), gable)
        sheet.wall(foot, 0.0, height, colour, front)
        sheet.wall(foot, height - 0.25, height, shade(colour, 1.12), front)
        if pitched:
            sheet.wall(foot, height, height + pitched, roof, front)
            sheet.wall((x0, z0, x0 + side * 12.0, z0), height, height + pitched, shade(roof, 0.9), gable)
        if shop:
            _shop(sheet, foot, front, fascia, awning)
        if fence is not None:
            fence()

    return (span[1], paint)


def _shop(sheet: Sheet, foot: Plane, front: int, fascia: Colour, chance: float) -> None:
    """A shop front on the ground floor, bright at night, and the light that it throws on the pavement."""
    x0, z0, x1, z1 = foot

    def panel(begin: float, end: float, low: float, high: float, colour: Colour, surface: int) -> None:
        """Between two shares of the front's length."""
        segment = (x0 + (x1 - x0) * begin, z0 + (z1 - z0) * begin, x0 + (x1 - x0) * end, z0 + (z1 - z0) * end)
        sheet.wall(segment, low, high, colour, surface)

    glass, board = sheet.glow(BUILDING, SHOP), sheet.glow(BUILDING, BOARD) if chance < 0.6 else front
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
    sheet.sources.append(Source(0.48 * (x0 + x1), 1.6, 0.5 * (z0 + z1), SHOP, 0.6 + chance))


def barrier(sheet: Sheet, rng: Generator, x: float, span: tuple[float, float], *, hedge: bool) -> Callable[[], None]:
    """A hedge (class tree) or a fence of bars, planks or rails along the street."""
    foot = _foot(sheet, x, *span)
    if hedge:
        number = sheet.add(Surface(TREE, upright_plane(*foot), grain=0.3))
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
    rail = sheet.add(Surface(FENCE, upright_plane(*foot), grain=0.05, reflect=0.03, pattern=grid))

    def paint_fence() -> None:
        sheet.wall(foot, 0.0, height, colour, rail)

    return paint_fence


def _green(sheet: Sheet, rng: Generator, wall: float, span: tuple[float, float]) -> Stroke:
    """Trees, with a fence or a hedge before them."""
    (z0, z1), side = span, math.copysign(1.0, wall)
    num_trees = 2 + int(rng.random() * 2.0) + (z1 - z0 > 16.0)
    places = sorted(((rng.uniform(z0, z1), rng.uniform(1.0, 7.0)) for _ in range(num_trees)), reverse=True)
    thicket = sheet.add(Surface(TREE, upright_plane(*_foot(sheet, wall + side * 7.0, z0, z1)), grain=0.3))
    leaf, height = shade(pick(rng, LEAVES, 0.2), 0.7), rng.uniform(1.4, 4.0)
    paint_barrier = barrier(sheet, rng, wall, span, hedge=rng.random() < 0.35)

    def paint() -> None:
        sheet.wall(_foot(sheet, wall + side * 7.0, z0, z1), 0.0, height, leaf, thicket)
        for z, beyond in places:
            street_tree(sheet, rng, sheet.camera.along(wall + side * beyond, z), z)
        paint_barrier()

    return (z1, paint)
