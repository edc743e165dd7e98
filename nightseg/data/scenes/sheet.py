"""The drawing sheet of the procedural scenes: a pinhole camera, and shapes that carry a colour and a surface number.

Legend: x metres to the right, y metres up, z metres ahead of the camera. The sheet is OVERSAMPLE times larger than the
frame; colour lies in its first three bands and the surface number in the fourth, so one stroke draws both and a label
can never disagree with the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OVERSAMPLE = 2
NEAR = 0.8  # metres; nothing is drawn closer, so a projection never divides by zero
FAR = 250.0  # metres

Label = IntEnum(  # train ids of the taxonomy camvid11
    "Label", "SKY BUILDING POLE ROAD PAVEMENT TREE SIGN FENCE CAR PEDESTRIAN BICYCLIST", start=0
)
Glow = IntEnum(  # what shines by itself; the light of a domain says how bright each kind is
    "Glow", "NONE LAMP_EARLY LAMP_LATE HEAD_LIGHT TAIL_LIGHT SIGNAL_RED SIGNAL_AMBER SIGNAL_GREEN SHOP BOARD", start=0
)
SKY_SURFACE, ROAD_SURFACE, PAVEMENT_SURFACE = range(3)  # every sheet has these

Colour = tuple[int, int, int]
Point = tuple[float, float]
Foot = tuple[float, float, float, float]
"""(x0, z0, x1, z1): a segment on the ground."""
Plane = tuple[float, float, float, float]
"""(a, b, c, d): the points with a * x + b * (eye - y) + c * z = d, d > 0; (a, b, c) is a unit vector."""
Stroke = tuple[float, Callable[[], None]]
"""Something to paint: its distance in metres (the farthest is painted first) and the call that paints it."""


class Pattern(NamedTuple):
    """A grid of panes on a surface (windows, the gaps of a fence); pitch_u = 0 is none. Metres, shares in [0, 1]."""

    pitch_u: float = 0.0
    pitch_v: float = 1.0
    share_u: float = 0.0
    share_v: float = 0.0
    first_v: float = 0.0
    last_v: float = 0.0
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0
    lit: float = 0.0


class Surface(NamedTuple):
    """What the light needs to know of a shape: its label, its plane, its grain, how it answers or sends light."""

    label: int
    plane: Plane
    grain: float = 0.06
    reflect: float = 0.0  # retro-reflection: how much of our own head lights comes straight back
    glow: int = Glow.NONE
    pattern: Pattern = Pattern()


class Source(NamedTuple):
    """A point light in the street: place in metres, kind of glow, strength relative to its kind."""

    x: float
    y: float
    z: float
    glow: int
    strength: float


@dataclass(frozen=True, slots=True)
class Camera:
    """Pinhole camera that looks along z. focal, center_x and horizon_y in pixels of the frame, eye in metres.

    bend (1/metre): the road's middle lies at x = bend * z * z.
    """

    width: int
    height: int
    focal: float
    center_x: float
    horizon_y: float
    eye: float
    bend: float

    def project(self, x: float, y: float, z: float) -> Point:
        """Sheet coordinates of a point; z below NEAR is taken as NEAR."""
        scale = self.focal / (z if z > NEAR else NEAR)
        return OVERSAMPLE * (self.center_x + scale * x), OVERSAMPLE * (self.horizon_y + scale * (self.eye - y))

    def along(self, x: float, z: float) -> float:
        """x of a point that lies x metres beside the road's middle, z metres ahead."""
        return x + self.bend * z * z

    def foot(self, x: float, z0: float, z1: float) -> Foot:
        """The ground segment that follows the street x metres beside its middle."""
        return self.along(x, z0), z0, self.along(x, z1), z1


def facing_plane(z: float) -> Plane:
    """The plane that faces the camera at distance z."""
    return (0.0, 0.0, 1.0, max(z, NEAR))


def upright_plane(x0: float, z0: float, x1: float, z1: float) -> Plane:
    """The upright plane through (x0, z0) and (x1, z1)."""
    length = float(np.sqrt((x1 - x0) ** 2 + (z1 - z0) ** 2))
    a, c = (z1 - z0) / length, (x0 - x1) / length
    d = a * x0 + c * z0
    if d < 0.0:
        a, c, d = -a, -c, -d
    return (a, 0.0, c, max(d, 1e-3))


def pick(rng: Generator, palette: Sequence[Colour], spread: float = 0.08) -> Colour:
    """A colour of the palette, made a little brighter or darker."""
    colour = palette[int(rng.random() * len(palette))]
    return shade(colour, 1.0 + spread * (2.0 * rng.random() - 1.0))


def shade(colour: Colour, factor: float) -> Colour:
    """The colour times factor, at most 255."""
    red, green, blue = colour
    return (min(255, int(red * factor)), min(255, int(green * factor)), min(255, int(blue * factor)))


class Layers(NamedTuple):
    """What a sheet holds once painted, at the size of the frame; see Sheet.finish."""

    label: NDArray[np.uint8]
    surface: NDArray[np.uint8]
    albedo: NDArray[np.float32]
    sky: NDArray[np.float32]


@dataclass(slots=True)
class Sheet:
    """Shapes are drawn far to near; each belongs to one of at most 256 surfaces."""

    camera: Camera
    surfaces: list[Surface] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    image: Image.Image = field(init=False)
    draw: ImageDraw.ImageDraw = field(init=False)
    glowing: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # RGBX, not RGBA: Pillow would weigh the colours by the fourth band when it makes the sheet smaller
        self.image = Image.new("RGBX", (OVERSAMPLE * self.camera.width, OVERSAMPLE * self.camera.height), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        ground = (0.0, 1.0, 0.0, self.camera.eye)
        self.add(Surface(Label.SKY, facing_plane(FAR), grain=0.0))
        self.add(Surface(Label.ROAD, ground, grain=0.09))
        self.add(Surface(Label.PAVEMENT, ground, grain=0.07))

    def add(self, surface: Surface) -> int:
        """The number of a new surface."""
        assert len(self.surfaces) < 256, "a street has more surfaces than the sheet's fourth band can number"
        self.surfaces.append(surface)
        return len(self.surfaces) - 1

    def glow(self, label: int, kind: int) -> int:
        """The surface shared by all lights of one label and kind: what shines needs no exact distance."""
        key = (label, kind)
        if key not in self.glowing:
            self.glowing[key] = self.add(Surface(label, facing_plane(20.0), grain=0.0, glow=kind))
        return self.glowing[key]

    def card(self, label: int, x: float, z: float, *, grain: float, reflect: float = 0.0) -> Card:
        """A flat thing of its own surface that faces the camera at (x, z)."""
        return Card(self, x, z, self.add(Surface(label, facing_plane(z), grain, reflect)))

    def polygon(self, points: Sequence[Point], colour: Colour, surface: int) -> None:
        """Fill a polygon given in sheet coordinates."""
        self.draw.polygon(points, (*colour, surface))

    def wall(self, foot: Foot, low: float, high: float, colour: Colour, surface: int) -> None:
        """Fill the upright rectangle over a ground segment from low to high metres."""
        x0, z0, x1, z1 = foot
        project = self.camera.project
        self.polygon(
            [project(x0, low, z0), project(x1, low, z1), project(x1, high, z1), project(x0, high, z0)], colour, surface
        )

    def floor(self, points: Sequence[Point], colour: Colour, surface: int) -> None:
        """Fill a polygon on the ground, given as (x, z) in metres."""
        project = self.camera.project
        self.polygon([project(x, 0.0, z) for x, z in points], colour, surface)

    def finish(self) -> Layers:
        """label and surface numbers, uint8 HW; albedo, float32 3HW, linear in [0, 1] (the sheet's colours squared);
        sky, float32 HW, the share of each pixel that is sky (its albedo there is 0)."""
        numbers = self.image.getchannel("X")
        surface = np.ascontiguousarray(np.asarray(numbers)[1::OVERSAMPLE, 1::OVERSAMPLE])
        sky = numbers.point([255] + [0] * 255).reduce(OVERSAMPLE)
        label = np.array([s.label for s in self.surfaces], np.uint8).take(surface)
        colours = np.asarray(self.image.reduce(OVERSAMPLE))[..., :3]
        albedo = np.ascontiguousarray(colours.transpose(2, 0, 1)).astype(np.float32)
        albedo *= np.float32(1 / 255)
        albedo *= albedo
        return Layers(label, surface, albedo, np.asarray(sky, np.float32) * np.float32(1 / 255))


@dataclass(slots=True)
class Card:
    """A flat thing that faces the camera: draws in metres, (u right, v up) from its foot at (x, 0, z).

    What is drawn is at least one pixel of the frame wide and high, so that it never vanishes. `surface`: another one
    than the card's own.
    """

    sheet: Sheet
    x: float
    z: float
    surface: int
    foot: Point = field(init=False)
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.foot = self.sheet.camera.project(self.x, 0.0, self.z)
        self.scale = OVERSAMPLE * self.sheet.camera.focal / max(self.z, NEAR)

    def _places(self, points: Sequence[Point]) -> list[Point]:
        (x, y), scale = self.foot, self.scale
        return [(x + scale * u, y - scale * v) for u, v in points]

    def _ink(self, colour: Colour, surface: int | None) -> tuple[int, int, int, int]:
        return (*colour, self.surface if surface is None else surface)

    def polygon(self, points: Sequence[Point], colour: Colour, surface: int | None = None) -> None:
        """Fill a polygon."""
        self.sheet.draw.polygon(self._places(points), self._ink(colour, surface))

    def symmetric(self, right: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon that is symmetric about u = 0, given by its right side from bottom to top."""
        left = [(-u, v) for u, v in right]
        self.polygon([left[0], *right, *left[:0:-1]], colour)

    def box(self, u0: float, v0: float, u1: float, v1: float, colour: Colour, surface: int | None = None) -> None:
        """Fill a rectangle."""
        (x0, y0), (x1, y1) = self._places([(u0, v1), (u1, v0)])
        thin = OVERSAMPLE - 1
        corners = (x0, y0, max(x1, x0 + thin), max(y1, y0 + thin))
        self.sheet.draw.rectangle(corners, self._ink(colour, surface))

    def block(self, u: float, half: float, v0: float, v1: float, colour: Colour, surface: int | None = None) -> None:
        """Fill the rectangle from u - half to u + half."""
        self.box(u - half, v0, u + half, v1, colour, surface)

    def oval(
        self, u: float, v: float, radius_u: float, radius_v: float, colour: Colour, surface: int | None = None
    ) -> None:
        """Fill an upright ellipse."""
        x, y = self.foot[0] + self.scale * u, self.foot[1] - self.scale * v
        half_x, half_y = max(self.scale * radius_u, 0.5), max(self.scale * radius_v, 0.5)
        self.sheet.draw.ellipse((x - half_x, y - half_y, x + half_x, y + half_y), self._ink(colour, surface))

    def disc(self, u: float, v: float, radius: float, colour: Colour, surface: int | None = None) -> None:
        """Fill a disc."""
        self.oval(u, v, radius, radius, colour, surface)

    def bar(self, points: Sequence[Point], thick: float, colour: Colour) -> None:
        """Draw a line of thick metres."""
        width = max(OVERSAMPLE, round(thick * self.scale))
        self.sheet.draw.line(self._places(points), (*colour, self.surface), width)


def unit_circle(steps: int) -> list[Point]:
    """Points of a circle of radius 1 around 0, the first on its right; of `steps` to a turn one more closes it."""
    return [(math.cos(math.tau * k / steps), math.sin(math.tau * k / steps)) for k in range(steps + 1)]
