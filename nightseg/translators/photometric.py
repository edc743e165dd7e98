"""Night by optics: less light, of another colour, through a lens and onto a sensor that add their faults.

    scene  = day x (street light + our beam) [x what is left of the sky]  +  day x light of sources  +  sources  +  haze
    image  = lens(scene) + noise,   noise variance = image / electrons + read_noise^2

All in linear light, 1 = the white of the day frame, whose pixels stand for what the street reflects. Then 8-bit sRGB
again. Where there is no label nothing shines; without haze and tint no pixel grows brighter there, and black stays
black but for the noise.
HW: height, width; HW3 with red, green, blue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nightseg.translators.colour import Floats, Pixels, to_linear, to_pixels
from nightseg.translators.rng import frame_generator
from nightseg.translators.settings import LitClasses, PhotometricTranslator

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

_BLOOM: Final = ((0.008, 0.25), (0.03, 0.35))  # radius as a share of the height, share of a source's light
_POOL_RADIUS, _POOL_GAIN = 0.06, 6.0  # of the light that sources throw on what is around them
_SKY_EDGE: Final = 1 / 240  # of the height: the label's edge is sharper than the camera's


def night_of(
    image_HW3: Pixels, label_HW: Labels | None, *, optics: PhotometricTranslator, lit: LitIds, seed: int, frame_id: str
) -> Pixels:
    """The frame at night, uint8 HW3. `label_HW`: train ids; None = nothing is known, so nothing shines."""
    weather = frame_generator(seed, frame_id, "weather")
    exposure = 2.0 ** weather.uniform(*optics.stops)
    street = black_body(weather.uniform(*optics.temperature))
    scene_HW3 = to_linear(image_HW3)
    height, width = image_HW3.shape[:2]
    shining = None
    if label_HW is not None and optics.lights > 0:
        shining = np.float32(optics.lights) * sources(label_HW, lit, frame_generator(seed, frame_id, "lights"), street)
    lit_HW3 = _falling_light(height, width, exposure, street, optics.beam)
    sky_HW1 = _sky_share(label_HW, lit)[..., None] if label_HW is not None else np.float32(0.0)
    air = frame_generator(seed, frame_id, "air")
    lit_HW3 *= 1 - np.float32(1 - _drawn(optics.sky, air)) * sky_HW1
    if shining is not None:
        lit_HW3 += _POOL_GAIN * _spread(shining, _POOL_RADIUS) * (1 - sky_HW1)  # the sky is no wall to shine on
    scene_HW3 *= lit_HW3
    if shining is not None:
        scene_HW3 += shining
        for radius, share in _BLOOM:
            scene_HW3 += np.float32(share) * _spread(shining, radius)
    glow, green = _drawn(optics.glow, air), 1 + optics.tint * air.uniform(-1.0, 1.0)
    if glow > 0:
        scene_HW3 += np.float32(glow) * _haze(sky_HW1, height) * np.array(street, dtype=np.float32)
    scene_HW3[..., 1] *= np.float32(green)
    scene_HW3 *= _falloff(height, width, optics.vignette)[..., None]
    sensor = frame_generator(seed, frame_id, "sensor")
    return to_pixels(expose(scene_HW3, optics.electrons, optics.read_noise, sensor))


def render_night(
    image_HW3: Pixels, label_HW: Labels, seed: int, *, optics: PhotometricTranslator, lit: LitIds
) -> Pixels:
    """`night_of` where every seed is another night: a training draws one with every sample."""
    return night_of(image_HW3, label_HW, optics=optics, lit=lit, seed=seed, frame_id="")


def expose(light_HW3: Floats, electrons: float, read_noise: float, rng: np.random.Generator) -> Floats:
    """What the sensor counts: the light, cut off at white, with noise of the variance light / electrons + read_noise^2.

    The number of electrons is normal here, not Poisson: the same mean and variance, a tenth of the time.
    """
    counted = np.clip(light_HW3, 0.0, 1.0)
    deviation = np.sqrt(counted / np.float32(electrons) + np.float32(read_noise**2))
    counted += deviation * rng.standard_normal(counted.shape, dtype=np.float32)
    return counted


def black_body(kelvin: float) -> Tint:
    """Colour of a black body as linear sRGB, its largest band 1 (Kang et al., 2002: cubic fit of the Planckian locus).

    Valid from 1667 to 25000 kelvin; bands that sRGB cannot show are 0.
    """
    t = 1000.0 / kelvin
    if kelvin <= 4000:
        x = -0.2661239 * t**3 - 0.2343589 * t**2 + 0.8776956 * t + 0.179910
    else:
        x = -3.0258469 * t**3 + 2.1070379 * t**2 + 0.2226347 * t + 0.240390
    if kelvin <= 2222:
        y = -1.1063814 * x**3 - 1.34811020 * x**2 + 2.18555832 * x - 0.20219683
    elif kelvin <= 4000:
        y = -0.9549476 * x**3 - 1.37418593 * x**2 + 2.09137015 * x - 0.16748867
    else:
        y = 3.0817580 * x**3 - 5.87338670 * x**2 + 3.75112997 * x - 0.37001483
    tristimulus = np.array([x / y, 1.0, (1 - x - y) / y])
    light = np.clip(_XYZ_TO_RGB @ tristimulus, 0.0, None)
    red, green, blue = (light / light.max()).tolist()
    return red, green, blue


_XYZ_TO_RGB = np.array(
    [[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]]
)


def _falling_light(height: int, width: int, exposure: float, street: Tint, beam: float) -> Floats:
    """What the day's light is multiplied by, HW3, at most 1: street light everywhere, our beam on the road ahead."""
    down = np.clip((np.arange(height) + 0.5) / height * 2.0 - 1.0, 0.0, 1.0)[:, None]
    aside = ((np.arange(width) + 0.5) / width - 0.5)[None, :] / 0.35
    beam_HW = (beam * down / (1.0 + aside**4)).astype(np.float32)
    white = np.array((1.0, 0.97, 0.9), dtype=np.float32)
    light = np.array(street, dtype=np.float32) + beam_HW[..., None] * white
    falling: Floats = np.minimum(np.float32(exposure) * light, np.float32(1.0))
    return falling


def _drawn(value: float | tuple[float, float], rng: np.random.Generator) -> float:
    """A number as it is, or one from a range; the square of a uniform one, as the bright end is rare."""
    low, high = value if isinstance(value, tuple) else (value, value)
    return float(low + (high - low) * rng.random() ** 2)


def _haze(sky_HW1: Floats | np.float32, height: int) -> Floats:
    """HW1 or H11: haze that lamps light up, as a share of its light above the horizon: all of it before the sky, less
    higher up; a quarter before what stands afar, none before the road at our feet."""
    above = np.clip(1.0 - (np.arange(height) + 0.5) / height * 2.0, 0.0, 1.0)[:, None, None]
    below = np.clip((np.arange(height) + 0.5) / height * 2.0 - 1.0, 0.0, 1.0)[:, None, None]
    near: Floats = (0.25 * (1.0 - below)).astype(np.float32)
    high: Floats = (1.0 - 0.5 * above).astype(np.float32)
    return near + sky_HW1 * (high - near)


def _sky_share(label_HW: Labels, lit: LitIds) -> Floats:
    """HW: 1 in the sky, 0 on the street, in between where the two meet; sky wins its edge, for bright rims show."""
    share = np.isin(label_HW, lit.sky).astype(np.float32)
    edge: Floats = np.maximum(share, _boxes(share, max(1, round(share.shape[0] * _SKY_EDGE))))
    return edge


def _falloff(height: int, width: int, vignette: float) -> Floats:
    """HW: 1 in the middle, 1 - vignette in the corners, quadratic in between."""
    down = ((np.arange(height) + 0.5) / height * 2.0 - 1.0)[:, None]
    across = ((np.arange(width) + 0.5) / width * 2.0 - 1.0)[None, :]
    falloff: Floats = (1.0 - vignette * (down**2 + across**2) / 2.0).astype(np.float32)
    return falloff


def _spread(light_HW3: Floats, radius: float) -> Floats:
    """The same amount of light over a round spot of about `radius` x height; nothing beyond three times that."""
    pixels = max(1, round(light_HW3.shape[0] * radius))
    return np.stack([_boxes(light_HW3[..., band], pixels) for band in range(3)], axis=-1)


def _boxes(plane_HW: Floats, radius: int) -> Floats:
    """Three box means in a row: nearly a Gaussian, ends at 3 x radius, and costs the same at any radius."""
    for _ in range(3):
        plane_HW = ndimage.uniform_filter(plane_HW, size=2 * radius + 1, mode="constant")
    return plane_HW


# -- lights, placed by the label: radiance is linear, 1 = the white of the frame -------------------------------------


class LitIds(NamedTuple):
    """Train ids of the classes that `LitClasses` names."""

    sky: tuple[int, ...]
    vehicle: tuple[int, ...]
    signal: tuple[int, ...]
    facade: tuple[int, ...]
    lamp: tuple[int, ...]

    @classmethod
    def of(cls, settings: LitClasses, classes: Sequence[str]) -> LitIds:
        """Of the classes that the settings name; those that the class list lacks are left out."""
        named = settings.model_dump()
        return cls(*(tuple(classes.index(name) for name in named[role] if name in classes) for role in cls._fields))


class _Thing(NamedTuple):
    """A connected piece of a class: its box and its pixels in it."""

    top: int
    left: int
    height: int
    width: int
    mask: Mask  # (height, width)


def sources(label_HW: Labels, lit: LitIds, rng: np.random.Generator, street: Tint) -> Floats:
    """Radiance of all lights, float32 HW3: zero outside vehicles, signals, facades and lamps. `street` tints lamps."""
    radiance_HW3 = np.zeros((*label_HW.shape, 3), dtype=np.float32)
    for thing in _things(label_HW, lit.facade):
        _windows(radiance_HW3, thing, rng)
    for thing in _things(label_HW, lit.vehicle):
        _vehicle(radiance_HW3, thing, rng)
    for thing in _things(label_HW, lit.signal):
        _signal(radiance_HW3, thing, rng)
    for thing in _things(label_HW, lit.lamp):
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
