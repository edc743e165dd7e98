"""Night by optics: less light, of another colour, through a lens and onto a sensor that add their faults.

    scene  = day x (street light + our beam) [x what is left of the sky]  +  day x light of the sources  +  sources
    image  = lens(scene) + noise,   noise variance = image / electrons + read_noise^2

All in linear light, 1 = the white of the day frame, whose pixels stand for what the street reflects. Then 8-bit sRGB
again. Where there is no label nothing shines and no pixel grows brighter; black stays black but for the noise.
HW: height, width; HW3 with red, green, blue.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from scipy import ndimage

from nightseg.translators.lights import Labels, Roles, Tint, sources
from nightseg.translators.rng import frame_generator
from nightseg.translators.srgb import Floats, Pixels, to_linear, to_pixels

_BLOOM: Final = ((0.008, 0.25), (0.03, 0.35))  # radius as a share of the height, share of a source's light
_POOL_RADIUS, _POOL_GAIN = 0.06, 6.0  # of the light that sources throw on what is around them
_SKY_EDGE: Final = 1 / 240  # of the height: the label's edge is sharper than the camera's


class Optics(NamedTuple):
    """Everything that makes the night; see `PhotometricTranslator` of the recipe for units and meaning."""

    stops: tuple[float, float]
    temperature: tuple[float, float]
    vignette: float
    electrons: float
    read_noise: float
    sky: float
    beam: float
    lights: float


def night_of(
    image_HW3: Pixels, label_HW: Labels | None, *, optics: Optics, roles: Roles, seed: int, frame_id: str
) -> Pixels:
    """The frame at night, uint8 HW3. `label_HW`: train ids; None = nothing is known, so nothing shines."""
    weather = frame_generator(seed, frame_id, "weather")
    exposure = 2.0 ** weather.uniform(*optics.stops)
    street = black_body(weather.uniform(*optics.temperature))
    scene_HW3 = to_linear(image_HW3)
    height, width = image_HW3.shape[:2]
    shining = None
    if label_HW is not None and optics.lights > 0:
        shining = np.float32(optics.lights) * sources(
            label_HW, roles, frame_generator(seed, frame_id, "lights"), street
        )
    lit_HW3 = _falling_light(height, width, exposure, street, optics.beam)
    sky_HW1 = _sky_share(label_HW, roles)[..., None] if label_HW is not None else np.float32(0.0)
    lit_HW3 *= 1 - np.float32(1 - optics.sky) * sky_HW1
    if shining is not None:
        lit_HW3 += _POOL_GAIN * _spread(shining, _POOL_RADIUS) * (1 - sky_HW1)  # the sky is no wall to shine on
    scene_HW3 *= lit_HW3
    if shining is not None:
        scene_HW3 += shining
        for radius, share in _BLOOM:
            scene_HW3 += np.float32(share) * _spread(shining, radius)
    scene_HW3 *= _falloff(height, width, optics.vignette)[..., None]
    sensor = frame_generator(seed, frame_id, "sensor")
    return to_pixels(expose(scene_HW3, optics.electrons, optics.read_noise, sensor))


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


def _sky_share(label_HW: Labels, roles: Roles) -> Floats:
    """HW: 1 in the sky, 0 on the street, in between where the two meet; sky wins its edge, for bright rims show."""
    share = np.isin(label_HW, roles.sky).astype(np.float32)
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
