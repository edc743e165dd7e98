"""What shines at night, placed by the label: head and tail lights on vehicles, signals, lit windows, street lamps.

Radiance is linear and relative, 1 = the white of the frame. HW: height, width; HW3 with red, green, blue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Tint = tuple[float, float, float]

HEADLIGHT: Final[Tint] = (1.0, 0.94, 0.82)
TAIL_LIGHT: Final[Tint] = (1.0, 0.06, 0.03)
SIGNALS: Final[tuple[tuple[float, Tint], ...]] = (  # height in the box of lamps, colour
    (1 / 6, (1.0, 0.07, 0.04)),
    (1 / 2, (1.0, 0.55, 0.06)),
    (5 / 6, (0.12, 1.0, 0.5)),
)
WINDOWS: Final[tuple[Tint, ...]] = ((1.0, 0.72, 0.38), (1.0, 0.85, 0.62), (0.8, 0.92, 1.0))

_SMALLEST: Final = 12  # pixels of a thing that can carry a light
_ONCOMING: Final = 0.4  # share of vehicles seen from the front
_LAMPS_LIT: Final = 0.8


class Roles(NamedTuple):
    """Train ids of the classes that play a part at night."""

    sky: tuple[int, ...]
    vehicle: tuple[int, ...]
    signal: tuple[int, ...]
    facade: tuple[int, ...]
    lamp: tuple[int, ...]

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Roles:
        """From names of classes; those that the class list lacks play no part."""
        return cls(*(tuple(classes.index(name) for name in names[role] if name in classes) for role in cls._fields))


class _Thing(NamedTuple):
    """A connected piece of a class: its box and its pixels in it."""

    top: int
    left: int
    height: int
    width: int
    mask: Mask  # (height, width)


def sources(label_HW: Labels, roles: Roles, rng: np.random.Generator, street: Tint) -> Floats:
    """Radiance of all lights, float32 HW3: zero outside vehicles, signals, facades and lamps. `street` tints lamps."""
    radiance_HW3 = np.zeros((*label_HW.shape, 3), dtype=np.float32)
    for thing in _things(label_HW, roles.facade):
        _windows(radiance_HW3, thing, rng)
    for thing in _things(label_HW, roles.vehicle):
        _vehicle(radiance_HW3, thing, rng)
    for thing in _things(label_HW, roles.signal):
        _signal(radiance_HW3, thing, rng)
    for thing in _things(label_HW, roles.lamp):
        _lamp(radiance_HW3, thing, rng, street)
    return radiance_HW3


def _things(label_HW: Labels, ids: Sequence[int]) -> Iterator[_Thing]:
    """Pieces of these classes that hang together (8 neighbours), from the top of the frame down."""
    if not ids:
        return
    pieces_HW, _ = ndimage.label(np.isin(label_HW, ids), structure=np.ones((3, 3), dtype=int))
    for number, box in enumerate(ndimage.find_objects(pieces_HW), 1):
        mask = pieces_HW[box] == number
        if mask.sum() >= _SMALLEST:
            rows, columns = box
            yield _Thing(rows.start, columns.start, mask.shape[0], mask.shape[1], mask)


def _vehicle(radiance_HW3: Floats, thing: _Thing, rng: np.random.Generator) -> None:
    """A pair of lights at 60 % of its height: white if it comes, red if it goes."""
    oncoming, strength = rng.random() < _ONCOMING, rng.uniform(0.6, 1.4)
    tint, level = (HEADLIGHT, 10.0) if oncoming else (TAIL_LIGHT, 1.5)
    radius = max(0.8, 0.06 * min(thing.width, 1.6 * thing.height))
    for share in (0.16, 0.84):
        _disc(radiance_HW3, thing, 0.6 * thing.height, share * thing.width, radius, tint, level * strength)


def _signal(radiance_HW3: Floats, thing: _Thing, rng: np.random.Generator) -> None:
    """One of its three lamps."""
    place, tint = SIGNALS[int(rng.integers(len(SIGNALS)))]
    radius = max(0.8, 0.3 * min(thing.width, thing.height / 3))
    _disc(radiance_HW3, thing, place * thing.height, 0.5 * thing.width, radius, tint, 2.5)


def _lamp(radiance_HW3: Floats, thing: _Thing, rng: np.random.Generator, street: Tint) -> None:
    """The head of a tall and slender pole, if it is lit."""
    is_lit = rng.random() < _LAMPS_LIT
    if not is_lit or thing.height < max(0.08 * radiance_HW3.shape[0], 3 * min(thing.width, thing.height)):
        return
    across = float(np.flatnonzero(thing.mask[0]).mean())
    _disc(radiance_HW3, thing, 0.0, across, max(1.5, 0.012 * radiance_HW3.shape[0]), street, 12.0)


def _windows(radiance_HW3: Floats, thing: _Thing, rng: np.random.Generator) -> None:
    """A regular grid of panes over the facade, some of them lit; a pane that does not lie wholly on it stays dark."""
    height = radiance_HW3.shape[0]
    pitch = max(4, round(height * rng.uniform(0.03, 0.055)))
    lit_share, brightness = rng.uniform(0.05, 0.3), rng.uniform(0.15, 0.5)
    pane_rows, pane_columns = max(2, round(0.5 * pitch)), max(1, round(0.4 * pitch))
    rows, columns = thing.height // pitch, thing.width // pitch
    lit = rng.random((rows, columns)) < lit_share
    levels, tints = rng.uniform(0.4, 1.0, (rows, columns)), rng.integers(len(WINDOWS), size=(rows, columns))
    for row, column in zip(*np.nonzero(lit), strict=True):
        top, left = row * pitch + (pitch - pane_rows) // 2, column * pitch + (pitch - pane_columns) // 2
        if thing.mask[top : top + pane_rows, left : left + pane_columns].all():
            place = slice(thing.top + top, thing.top + top + pane_rows)
            across = slice(thing.left + left, thing.left + left + pane_columns)
            colour = np.array(WINDOWS[tints[row, column]], dtype=np.float32)
            radiance_HW3[place, across] = colour * np.float32(brightness * levels[row, column])


def _disc(
    radiance_HW3: Floats, thing: _Thing, row: float, column: float, radius: float, tint: Tint, level: float
) -> None:
    """A round source in the coordinates of the thing's box, cut off at its mask; the brighter light wins."""
    rows, columns = np.ogrid[: thing.height, : thing.width]
    inside = ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2) & thing.mask
    part = radiance_HW3[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width]
    part[inside] = np.maximum(part[inside], np.array(tint, dtype=np.float32) * np.float32(level))
