"""The things of a procedural street: people on foot and on bicycles, trees, street lamps, signs.

Every painter takes a place in metres (x right of the camera, z ahead) and draws one thing; what shines at night gets a
glow surface, and street lamps add a light source. Sizes in metres.
"""

from __future__ import annotations

import math

from numpy.random import Generator

from nightseg.data.scenes.sheet import (
    BICYCLIST,
    LAMP_EARLY,
    LAMP_LATE,
    PEDESTRIAN,
    POLE,
    SIGN,
    SIGNAL_AMBER,
    SIGNAL_GREEN,
    SIGNAL_RED,
    TAIL_LIGHT,
    TREE,
    Card,
    Colour,
    Point,
    Sheet,
    Source,
    Surface,
    facing_plane,
    pick,
    shade,
)

CLOTHES: tuple[Colour, ...] = (
    (40, 44, 60), (30, 30, 34), (150, 48, 44), (60, 86, 140), (196, 190, 180), (96, 92, 86), (170, 140, 70),
    (70, 110, 84), (120, 70, 110), (214, 120, 50), (52, 60, 52), (84, 60, 44),
)  # fmt: skip
LEAVES: tuple[Colour, ...] = (
    (72, 104, 46), (58, 88, 44), (92, 116, 56), (54, 78, 52), (110, 120, 50), (136, 104, 44), (84, 92, 60),
    (44, 70, 40),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((226, 180, 150), (196, 146, 112), (140, 98, 72), (96, 66, 50))
RUBBER: Colour = (26, 26, 28)
METALS: tuple[Colour, ...] = ((112, 116, 118), (84, 88, 90), (58, 62, 62), (136, 138, 136), (60, 74, 62))


def street_tree(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A broad tree, a poplar or a fir, 4 to 10 m high."""
    card = Card(sheet, x, z, sheet.add(Surface(TREE, facing_plane(z), grain=0.34)))
    leaf = pick(rng, LEAVES, 0.2)
    bark = shade((92, 74, 58), 0.7 + 0.6 * rng.random())
    kind, height = rng.random(), rng.uniform(4.5, 9.5)
    trunk = rng.uniform(0.12, 0.24)
    card.polygon([(-trunk, 0), (trunk, 0), (0.7 * trunk, 0.6 * height), (-0.7 * trunk, 0.6 * height)], bark)
    if kind < 0.14:  # fir
        for step in range(4):
            low, wide = height * (0.12 + 0.2 * step), height * (0.24 - 0.05 * step)
            card.polygon([(-wide, low), (wide, low), (0.0, low + 0.36 * height)], shade(leaf, 0.6 + 0.1 * step))
        return
    radius_u = height * (rng.uniform(0.12, 0.16) if kind < 0.24 else rng.uniform(0.24, 0.38))
    radius_v = 0.5 * height * rng.uniform(0.66, 0.78)
    middle = height - radius_v
    reach = 0.78 + 0.3 * rng.random(20)
    outline = [
        (
            radius_u * r * math.cos(math.tau * k / 20),
            middle + radius_v * r * math.sin(math.tau * k / 20),
        )
        for k, r in enumerate(reach)
    ]
    card.polygon(outline, shade(leaf, 0.78))
    for u, v, size, tone in rng.random((9, 4)):
        top = v - 0.5
        spot = (radius_u * 1.2 * (u - 0.5), middle + radius_v * 1.2 * top)
        card.oval(
            *spot,
            radius_u * (0.2 + 0.24 * size),
            radius_v * (0.14 + 0.2 * size),
            shade(leaf, 0.72 + 0.3 * tone + 0.4 * top),
        )


def lamp_post(sheet: Sheet, rng: Generator, x: float, z: float, toward_road: float) -> None:
    """A street lamp 4.5 to 9 m high; toward_road is the signed length of its arm in metres. One in ten is broken."""
    post = Card(sheet, x, z, sheet.add(Surface(POLE, facing_plane(z), grain=0.05)))
    metal = pick(rng, METALS)
    height, half = rng.uniform(4.6, 8.5), rng.uniform(0.09, 0.15)
    post.box(-half, 0.0, half, height, metal)
    post.box(-1.6 * half, 0.0, 1.6 * half, 0.9, shade(metal, 0.8))
    tip = toward_road
    post.bar([(0.0, height - 0.05), (0.5 * tip, height + 0.22), (tip, height + 0.3)], 1.2 * half, metal)
    working = rng.random() < 0.9
    kind = LAMP_EARLY if rng.random() < 0.5 else LAMP_LATE
    head = sheet.glow(POLE, kind) if working else post.surface
    post.box(tip - 0.34, height + 0.2, tip + 0.34, height + 0.4, (190, 188, 176), head)
    if working:
        sheet.sources.append(Source(x + tip, height + 0.2, z, kind, rng.uniform(0.7, 1.3)))


def bollard(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A post of 1 m at the kerb."""
    card = Card(sheet, x, z, sheet.add(Surface(POLE, facing_plane(z), grain=0.04, reflect=0.3)))
    metal = pick(rng, METALS)
    card.box(-0.1, 0.0, 0.1, 1.0, metal)
    card.box(-0.1, 0.76, 0.1, 0.88, (214, 210, 200))


def road_sign(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A round, triangular or square sign on a post; now and then a large board on two posts."""
    post = Card(sheet, x, z, sheet.add(Surface(POLE, facing_plane(z), grain=0.04)))
    plate = sheet.add(Surface(SIGN, facing_plane(z), grain=0.03, reflect=0.3))
    metal, kind = pick(rng, METALS), rng.random()
    height, half = rng.uniform(2.1, 2.9), rng.uniform(0.34, 0.52)
    blue, red, white = (34, 70, 150), (178, 34, 36), (222, 222, 216)
    if kind < 0.26:
        wide, tall = rng.uniform(0.9, 1.7), rng.uniform(0.9, 1.5)
        board = pick(rng, (blue, (26, 96, 66), (206, 170, 40), white, (120, 66, 40)))
        post.box(-0.7 * wide - 0.05, 0.0, -0.7 * wide + 0.05, height, metal)
        post.box(0.7 * wide - 0.05, 0.0, 0.7 * wide + 0.05, height, metal)
        post.box(-wide, height - 0.4, wide, height + tall, shade(board, 0.8), plate)
        post.box(-0.94 * wide, height - 0.32, 0.94 * wide, height + tall - 0.08, board, plate)
        ink = white if sum(board) < 420 else (40, 40, 44)
        for line in range(2):
            low = height + tall * (0.1 + 0.42 * line)
            post.box(-0.7 * wide, low, wide * (0.2 + 0.5 * rng.random()), low + 0.16 * tall, ink, plate)
        return
    post.box(-0.06, 0.0, 0.06, height, metal)
    middle = height + 0.5 * half
    if kind < 0.55:
        inner = blue if rng.random() < 0.4 else white
        post.disc(0.0, middle, half, red if inner is white else white, plate)
        post.disc(0.0, middle, 0.7 * half, inner, plate)
    elif kind < 0.78:
        post.polygon([(-half, middle - 0.7 * half), (half, middle - 0.7 * half), (0, middle + half)], red, plate)
        post.polygon(
            [(-0.55 * half, middle - 0.42 * half), (0.55 * half, middle - 0.42 * half), (0, middle + 0.5 * half)],
            white,
            plate,
        )
    else:
        post.box(-half, middle - half, half, middle + half, blue, plate)
        post.box(-0.4 * half, middle - 0.5 * half, 0.4 * half, middle + 0.5 * half, white, plate)


def traffic_light(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A signal on its post; it shines in every domain."""
    post = Card(sheet, x, z, sheet.add(Surface(POLE, facing_plane(z), grain=0.04)))
    case = sheet.add(Surface(SIGN, facing_plane(z), grain=0.03))
    post.box(-0.09, 0.0, 0.09, 2.6, pick(rng, METALS))
    post.box(-0.3, 2.3, 0.3, 3.5, (30, 32, 32), case)
    shining = int(rng.random() * 2.4)
    lamps = ((3.2, (150, 40, 36), SIGNAL_RED), (2.6, (50, 130, 70), SIGNAL_GREEN), (2.9, (150, 110, 30), SIGNAL_AMBER))
    for number, (v, colour, kind) in enumerate(lamps):
        if number == shining:
            post.disc(0.0, v, 0.17, colour, sheet.glow(SIGN, kind))
        else:
            post.disc(0.0, v, 0.11, shade(colour, 0.3), case)


def _rider(card: Card, rng: Generator, height: float, low: float) -> None:
    """Torso, arms and head of a person whose hips are low metres up."""
    coat, skin = pick(rng, CLOTHES, 0.2), pick(rng, SKIN)
    wide, neck = rng.uniform(0.22, 0.29), 0.82 * height
    card.polygon(
        [
            (-0.75 * wide, low),
            (0.75 * wide, low),
            (wide, neck - 0.06),
            (0.5 * wide, neck + 0.02),
            (-0.5 * wide, neck + 0.02),
            (-wide, neck - 0.06),
        ],
        coat,
    )
    sleeve = shade(coat, 0.8)
    card.bar([(-wide, neck - 0.08), (-wide - 0.06, low + 0.06)], 0.11, sleeve)
    card.bar([(wide, neck - 0.08), (wide + 0.06, low + 0.06)], 0.11, sleeve)
    card.oval(0.0, 0.915 * height, 0.105, 0.14, skin)
    card.oval(0.0, 0.955 * height, 0.105, 0.09, pick(rng, ((40, 32, 28), (90, 70, 50), (30, 30, 32), (190, 180, 170))))


def pedestrian(sheet: Sheet, rng: Generator, x: float, z: float) -> None:
    """A person on foot, 1.5 to 1.9 m, mid-stride or standing."""
    card = Card(sheet, x, z, sheet.add(Surface(PEDESTRIAN, facing_plane(z), grain=0.05, reflect=0.03)))
    height, stride = rng.uniform(1.5, 1.92), rng.uniform(0.02, 0.3)
    trousers, hip = pick(rng, CLOTHES, 0.2), 0.5 * height
    for side in (-1.0, 1.0):
        foot = side * (0.08 + stride)
        card.polygon([(side * 0.01, hip), (side * 0.17, hip), (foot + 0.07, 0.04), (foot - 0.07, 0.04)], trousers)
        card.box(foot - 0.08, 0.0, foot + 0.1, 0.08, RUBBER)
    _rider(card, rng, height, hip - 0.04)
    if rng.random() < 0.3:
        card.box(0.24, 0.55, 0.46, 0.88, pick(rng, CLOTHES))


def _wheel(card: Card, u: float, radius: float) -> None:
    rim: list[Point] = []
    for k in range(13):
        rim.append((u + radius * math.cos(math.tau * k / 12), radius * (1 + math.sin(math.tau * k / 12))))
    card.bar(rim, 0.06, RUBBER)


def bicyclist(sheet: Sheet, rng: Generator, x: float, z: float, *, crossing: bool) -> None:
    """A person on a bicycle, from behind or, crossing, from the side; bicycle and rider are one class."""
    card = Card(sheet, x, z, sheet.add(Surface(BICYCLIST, facing_plane(z), grain=0.05, reflect=0.05)))
    frame, trousers, height = pick(rng, (*METALS, (160, 40, 40), (40, 70, 130))), pick(rng, CLOTHES, 0.2), 1.78
    if not crossing:
        card.polygon([(-0.05, 0.0), (0.05, 0.0), (0.06, 0.68), (-0.06, 0.68)], RUBBER)
        card.bar([(-0.3, 1.0), (0.3, 1.0)], 0.06, frame)
        card.polygon([(-0.2, 0.98), (-0.02, 0.98), (-0.08, 0.3), (-0.22, 0.3)], trousers)
        card.polygon([(0.2, 0.98), (0.02, 0.98), (0.08, 0.45), (0.22, 0.45)], trousers)
        _rider(card, rng, height, 0.86)
        card.box(-0.06, 0.58, 0.06, 0.7, (170, 34, 30), sheet.glow(BICYCLIST, TAIL_LIGHT))
        return
    way = 1.0 if rng.random() < 0.5 else -1.0
    for u in (-0.54, 0.54):
        _wheel(card, u, 0.34)
    hub, crank, saddle, bars = (0.54 * way, 0.34), (-0.04 * way, 0.3), (-0.2 * way, 0.95), (0.42 * way, 1.02)
    card.bar([(-0.54 * way, 0.34), crank, bars, hub], 0.06, frame)
    card.bar([(-0.54 * way, 0.34), saddle, crank], 0.06, frame)
    card.polygon(
        [(saddle[0] - 0.1, 0.98), (saddle[0] + 0.12, 0.98), (0.2 * way, 0.62), (0.02, 0.3), (-0.12, 0.34)], trousers
    )
    coat = pick(rng, CLOTHES, 0.2)
    shoulder = (0.14 * way, 1.5)
    card.polygon(
        [(saddle[0] - 0.14, 0.92), (saddle[0] + 0.16, 0.92), (shoulder[0] + 0.16, 1.42), (shoulder[0] - 0.14, 1.54)],
        coat,
    )
    card.bar([shoulder, bars], 0.1, shade(coat, 0.8))
    card.oval(shoulder[0] + 0.06 * way, 1.66, 0.11, 0.14, pick(rng, SKIN))
    card.oval(shoulder[0] + 0.04 * way, 1.72, 0.12, 0.09, pick(rng, CLOTHES))
