"""The drawing sheet of the procedural scenes: a pinhole camera, and shapes that carry a colour and a surface number.

Legend: x metres to the right, y metres up, z metres ahead of the camera. The sheet is OVERSAMPLE times larger than the
frame; colour lies in its first three bands and the surface number in the fourth, so one stroke draws both and a label
can never disagree with the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OVERSAMPLE = 2
NEAR = 0.8  # metres; nothing is drawn closer, so a projection never divides by zero
FAR = 250.0  # metres

# Train ids of the taxonomy camvid11.
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

# What shines by itself. A surface has one of these; the illumination says how bright each kind is in its domain.
DARK, LAMP_EARLY, LAMP_LATE, HEAD_LIGHT, TAIL_LIGHT, SIGNAL_RED, SIGNAL_AMBER, SIGNAL_GREEN, SHOP, BOARD = range(10)
NUM_GLOWS = 10

# The surfaces that every sheet has.
SKY_SURFACE, ROAD_SURFACE, PAVEMENT_SURFACE = range(3)

Colour = tuple[int, int, int]
Point = tuple[float, float]
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


PLAIN = Pattern()


class Surface(NamedTuple):
    """What the light needs to know of a shape: its label, its plane, its grain, how it answers or sends light."""

    label: int
    plane: Plane
    grain: float = 0.06
    reflect: float = 0.0  # retro-reflection: how much of our own head lights comes straight back
    glow: int = DARK
    pattern: Pattern = PLAIN


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
        scale = self.focal / max(z, NEAR)
        return (
            OVERSAMPLE * (self.center_x + scale * x),
            OVERSAMPLE * (self.horizon_y + scale * (self.eye - y)),
        )

    def along(self, x: float, z: float) -> float:
        """x of a point that lies x metres beside the road's middle, z metres ahead."""
        return x + self.bend * z * z


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
        size = (OVERSAMPLE * self.camera.width, OVERSAMPLE * self.camera.height)
        self.image = Image.new("RGBA", size, (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        ground = (0.0, 1.0, 0.0, self.camera.eye)
        self.add(Surface(SKY, facing_plane(FAR), grain=0.0))
        self.add(Surface(ROAD, ground, grain=0.09))
        self.add(Surface(PAVEMENT, ground, grain=0.07))

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

    def polygon(self, points: Sequence[Point], colour: Colour, surface: int) -> None:
        """Fill a polygon given in sheet coordinates."""
        self.draw.polygon(points, (*colour, surface))

    def wall(self, foot: Plane, low: float, high: float, colour: Colour, surface: int) -> None:
        """Fill the upright rectangle over the ground segment foot = (x0, z0, x1, z1) from low to high metres."""
        x0, z0, x1, z1 = foot
        project = self.camera.project
        corners = [project(x0, low, z0), project(x1, low, z1), project(x1, high, z1), project(x0, high, z0)]
        self.draw.polygon(corners, (*colour, surface))

    def floor(self, points: Sequence[Point], colour: Colour, surface: int) -> None:
        """Fill a polygon on the ground, given as (x, z) in metres."""
        project = self.camera.project
        self.draw.polygon([project(x, 0.0, z) for x, z in points], (*colour, surface))

    def finish(self) -> Layers:
        """label and surface numbers, uint8 HW; albedo, float32 3HW, linear in [0, 1] (the sheet's colours squared);
        sky, float32 HW, the share of each pixel that is sky (its albedo there is 0)."""
        numbers = self.image.getchannel("A")
        surface = np.ascontiguousarray(np.asarray(numbers)[1::OVERSAMPLE, 1::OVERSAMPLE])
        sky = numbers.point([255] + [0] * 255).reduce(OVERSAMPLE)
        label = np.array([s.label for s in self.surfaces], np.uint8)[surface]
        colours = np.asarray(self.image.convert("RGB").reduce(OVERSAMPLE))
        albedo = np.ascontiguousarray(colours.transpose(2, 0, 1)).astype(np.float32)
        albedo *= np.float32(1 / 255)
        albedo *= albedo
        return Layers(label, surface, albedo, np.asarray(sky, np.float32) * np.float32(1 / 255))


@dataclass(slots=True)
class Card:
    """A flat thing that faces the camera: draws in metres, (u right, v up) from its foot at (x, 0, z)."""

    sheet: Sheet
    x: float
    z: float
    surface: int
    foot: Point = field(init=False)
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.foot = self.sheet.camera.project(self.x, 0.0, self.z)
        self.scale = OVERSAMPLE * self.sheet.camera.focal / max(self.z, NEAR)

    def place(self, u: float, v: float) -> Point:
        """Sheet coordinates of a point of the card."""
        return (self.foot[0] + self.scale * u, self.foot[1] - self.scale * v)

    def polygon(self, points: Sequence[Point], colour: Colour, surface: int | None = None) -> None:
        """Fill a polygon."""
        (x, y), scale = self.foot, self.scale
        number = self.surface if surface is None else surface
        self.sheet.draw.polygon([(x + scale * u, y - scale * v) for u, v in points], (*colour, number))

    def box(self, u0: float, v0: float, u1: float, v1: float, colour: Colour, surface: int | None = None) -> None:
        """Fill a rectangle, at least one pixel of the frame wide and high so that it never vanishes."""
        x0, y0 = self.place(u0, v1)
        x1, y1 = self.place(u1, v0)
        number = self.surface if surface is None else surface
        thin = OVERSAMPLE - 1
        self.sheet.draw.rectangle((x0, y0, max(x1, x0 + thin), max(y1, y0 + thin)), (*colour, number))

    def disc(self, u: float, v: float, radius: float, colour: Colour, surface: int | None = None) -> None:
        """Fill a disc, at least one pixel of the frame wide."""
        self.oval(u, v, radius, radius, colour, surface)

    def oval(
        self, u: float, v: float, radius_u: float, radius_v: float, colour: Colour, surface: int | None = None
    ) -> None:
        """Fill an upright ellipse, at least one pixel of the frame wide and high."""
        x, y = self.place(u, v)
        half_x, half_y = max(self.scale * radius_u, 0.5), max(self.scale * radius_v, 0.5)
        number = self.surface if surface is None else surface
        self.sheet.draw.ellipse((x - half_x, y - half_y, x + half_x, y + half_y), (*colour, number))

    def bar(self, points: Sequence[Point], thick: float, colour: Colour, surface: int | None = None) -> None:
        """Draw a line of thick metres, at least one pixel of the frame."""
        width = max(OVERSAMPLE, round(thick * self.scale))
        number = self.surface if surface is None else surface
        self.sheet.draw.line([self.place(u, v) for u, v in points], (*colour, number), width)
