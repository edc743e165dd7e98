"""The light of a procedural scene for one domain: sky, sun, lamps, windows, and how the camera exposes them.

Radiance and irradiance are linear and relative: a white wall in full daylight is about 1. Colours are (red, green,
blue). Each domain draws from wide ranges that touch those of its neighbours: there are bright night streets and dull
rainy days, so neither the mean brightness nor one dark sky tells the domains apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nightseg.data.scenes.sheet import (
    BOARD,
    HEAD_LIGHT,
    LAMP_EARLY,
    LAMP_LATE,
    NUM_GLOWS,
    SHOP,
    SIGNAL_AMBER,
    SIGNAL_GREEN,
    SIGNAL_RED,
    TAIL_LIGHT,
)

DOMAINS = ("day", "twilight", "night")
Tint = tuple[float, float, float]

# Colours of what shines: sodium, warm and cold LED, mercury; the mix is what a town has.
LAMP_TINTS: tuple[Tint, ...] = (
    (1.0, 0.56, 0.17), (1.0, 0.62, 0.26), (1.0, 0.82, 0.56), (0.86, 0.95, 1.0), (0.8, 1.0, 0.78),
)  # fmt: skip
GLOW_TINTS: dict[int, Tint] = {
    HEAD_LIGHT: (1.0, 0.95, 0.84),
    TAIL_LIGHT: (1.0, 0.07, 0.05),
    SIGNAL_RED: (1.0, 0.08, 0.06),
    SIGNAL_AMBER: (1.0, 0.6, 0.08),
    SIGNAL_GREEN: (0.14, 1.0, 0.56),
    SHOP: (1.0, 0.86, 0.62),
    BOARD: (0.8, 0.9, 1.0),
}


class Weather(NamedTuple):
    """Everything that lights and exposes one scene."""

    sky_top: Tint
    sky_low: Tint
    cloud: Tint
    clouds: float  # share of the sky
    disc: Tint  # sun, moon: radiance
    disc_place: tuple[float, float]  # share of the width, share of the sky's height above the horizon
    disc_size: float  # share of the frame's height
    ambient: Tint
    sun: Tint
    sun_way: Tint  # unit vector toward the sun: right, up, ahead
    haze: float  # metres at which half of the light is lost
    glow: NDArray[np.float32]  # (NUM_GLOWS, 3) radiance of what shines
    throw: NDArray[np.float32]  # (NUM_GLOWS, 3) irradiance below or near a source
    own_lights: float
    windows: float  # radiance of a lit window
    lit: float  # factor on the share of lit windows
    wet: float
    stars: float
    exposure: float
    read_noise: float
    shot_noise: float
    blur: float  # share of the frame's height
    bloom: float
    vignette: float
    cast: Tint


def weather_for(domain: str, rng: Generator) -> Weather:
    """Draw the light of a scene for "day", "twilight" or "night"."""
    match domain:
        case "day":
            return _day(rng)
        case "twilight":
            return _twilight(rng)
        case _:
            return _night(rng)


def _times(tint: Tint, factor: float) -> Tint:
    return (tint[0] * factor, tint[1] * factor, tint[2] * factor)


def _blend(first: Tint, second: Tint, share: float) -> Tint:
    return (
        first[0] + (second[0] - first[0]) * share,
        first[1] + (second[1] - first[1]) * share,
        first[2] + (second[2] - first[2]) * share,
    )


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return low * math.pow(high / low, rng.random())


def _cast(rng: Generator, spread: float) -> Tint:
    return (1.0 + rng.uniform(-spread, spread), 1.0, 1.0 + rng.uniform(-spread, spread))


def _sun_way(rng: Generator, low: float, high: float) -> Tint:
    elevation, azimuth = rng.uniform(low, high), rng.uniform(0.0, math.tau)
    flat = math.cos(elevation)
    return (flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth))


def _glows(lamp_early: Tint, lamp_late: Tint, levels: dict[int, float]) -> NDArray[np.float32]:
    """The (NUM_GLOWS, 3) table of tint times level."""
    tints = {**GLOW_TINTS, LAMP_EARLY: lamp_early, LAMP_LATE: lamp_late}
    table = np.zeros((NUM_GLOWS, 3), np.float32)
    for kind, level in levels.items():
        table[kind] = _times(tints[kind], level)
    return table


def _day(rng: Generator) -> Weather:
    kind = rng.random()
    sunny, rain = kind < 0.5, kind > 0.85
    sky = rng.uniform(0.75, 1.3) if not rain else rng.uniform(0.3, 0.6)
    blue, grey = (0.42, 0.66, 1.0), (0.9, 0.95, 1.0)
    top = _times(blue if sunny else grey, sky * rng.uniform(0.55, 0.9))
    low = _times((0.92, 0.96, 1.0), sky)
    ambient = _times((0.86, 0.95, 1.06) if sunny else (0.96, 1.0, 1.03), (0.42 if sunny else 0.95) * sky)
    warmth = rng.random()
    sun = _times(_blend((1.0, 0.96, 0.88), (1.0, 0.8, 0.56), warmth), rng.uniform(1.5, 2.6) if sunny else 0.0)
    signals = _glows(
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        {
            SIGNAL_RED: 0.9,
            SIGNAL_AMBER: 0.9,
            SIGNAL_GREEN: 0.9,
            HEAD_LIGHT: 1.2 * rain,
            TAIL_LIGHT: 0.5 * rain,
            SHOP: 0.12,
        },
    )
    return Weather(
        sky_top=top,
        sky_low=low,
        cloud=_times((1.0, 1.0, 1.0), sky * rng.uniform(0.8, 1.1)),
        clouds=rng.uniform(0.1, 0.6) if sunny else rng.uniform(0.5, 1.0),
        disc=_times((1.0, 0.95, 0.85), 4.0 if sunny and rng.random() < 0.3 else 0.0),
        disc_place=(rng.random(), rng.uniform(0.2, 1.0)),
        disc_size=0.05,
        ambient=ambient,
        sun=sun,
        sun_way=_sun_way(rng, 0.5, 1.25),
        haze=_log_uniform(rng, 250.0, 2500.0) * (0.4 if rain else 1.0),
        glow=signals,
        throw=np.zeros((NUM_GLOWS, 3), np.float32),
        own_lights=0.0,
        windows=0.25,
        lit=0.06 if not rain else 0.4,
        wet=rng.uniform(0.3, 0.7) if rain else 0.0,
        stars=0.0,
        exposure=_log_uniform(rng, 0.75, 1.6),
        read_noise=0.002,
        shot_noise=_log_uniform(rng, 0.006, 0.02),
        blur=rng.uniform(0.0, 0.005),
        bloom=0.04,
        vignette=rng.uniform(0.05, 0.4),
        cast=_cast(rng, 0.1),
    )


def _twilight(rng: Generator) -> Weather:
    deep = rng.random()  # 0 just after sunset, 1 nearly night
    sky = 0.42 * math.pow(0.06, deep) * rng.uniform(0.8, 1.25)
    top = _times(_blend((0.45, 0.6, 1.0), (0.25, 0.42, 1.0), deep), 0.7 * sky)
    low = _times(_blend((0.85, 0.85, 0.95), (1.0, 0.62, 0.42), rng.random()), 1.2 * sky)
    lamp, on = LAMP_TINTS[int(rng.random() * len(LAMP_TINTS))], rng.uniform(0.3, 1.0)
    late = on if rng.random() < deep else 0.0
    levels = {
        LAMP_EARLY: 5.0 * on,
        LAMP_LATE: 5.0 * late,
        HEAD_LIGHT: 6.0,
        TAIL_LIGHT: 0.7,
        SIGNAL_RED: 1.3,
        SIGNAL_AMBER: 1.3,
        SIGNAL_GREEN: 1.3,
        SHOP: 0.4,
        BOARD: 0.35,
    }
    throws = {LAMP_EARLY: 0.3 * on, LAMP_LATE: 0.3 * late, HEAD_LIGHT: 0.2, TAIL_LIGHT: 0.04, SHOP: 0.12}
    return Weather(
        sky_top=top,
        sky_low=low,
        cloud=_times((0.8, 0.78, 0.9), 0.55 * sky),
        clouds=rng.uniform(0.1, 0.8),
        disc=(0.0, 0.0, 0.0),
        disc_place=(0.5, 0.5),
        disc_size=0.05,
        ambient=_times(_blend((0.9, 0.95, 1.1), (0.62, 0.8, 1.3), deep), 0.8 * sky),
        sun=(0.0, 0.0, 0.0),
        sun_way=(0.0, 1.0, 0.0),
        haze=_log_uniform(rng, 200.0, 1500.0),
        glow=_glows(lamp, lamp, levels),
        throw=_glows(lamp, lamp, throws),
        own_lights=0.25 + 0.3 * deep,
        windows=rng.uniform(0.12, 0.4),
        lit=rng.uniform(0.4, 0.9),
        wet=rng.uniform(0.2, 0.6) if rng.random() < 0.25 else 0.0,
        stars=0.0,
        exposure=rng.uniform(1.3, 2.2) * (1.0 + 0.8 * deep),
        read_noise=0.0025,
        shot_noise=_log_uniform(rng, 0.012, 0.03),
        blur=rng.uniform(0.001, 0.006),
        bloom=rng.uniform(0.08, 0.2),
        vignette=rng.uniform(0.1, 0.5),
        cast=_cast(rng, 0.12),
    )


def _night(rng: Generator) -> Weather:
    dark = rng.random()  # 0 a bright city street, 1 a road that hardly has a light
    town = LAMP_TINTS[int(rng.random() * len(LAMP_TINTS))]
    other = town if rng.random() < 0.7 else LAMP_TINTS[int(rng.random() * len(LAMP_TINTS))]
    glow = 0.045 * math.pow(0.07, dark) * _log_uniform(rng, 0.6, 1.7)  # of the sky over the town
    orange = _blend(town, (0.8, 0.8, 1.0), rng.random())
    lamps = 0.9 * math.pow(0.3, dark) * _log_uniform(rng, 0.7, 1.4)
    late = lamps if rng.random() < 0.7 else 0.0  # saving towns switch every second lamp off
    levels = {
        LAMP_EARLY: 9.0,
        LAMP_LATE: 9.0 * (late > 0.0),
        HEAD_LIGHT: 14.0,
        TAIL_LIGHT: 1.6,
        SIGNAL_RED: 2.2,
        SIGNAL_AMBER: 2.2,
        SIGNAL_GREEN: 2.2,
        SHOP: rng.uniform(0.25, 1.0),
        BOARD: rng.uniform(0.1, 0.7),
    }
    throws = {LAMP_EARLY: lamps, LAMP_LATE: late, HEAD_LIGHT: 0.4, TAIL_LIGHT: 0.06, SHOP: 0.3 * levels[SHOP]}
    moon = 2.0 if rng.random() < 0.12 else 0.0
    return Weather(
        sky_top=_times(_blend((0.3, 0.4, 1.0), orange, 0.4), 0.35 * glow),
        sky_low=_times(orange, glow),
        cloud=_times(orange, 0.8 * glow),
        clouds=rng.uniform(0.0, 0.9),
        disc=_times((0.9, 0.95, 1.0), moon),
        disc_place=(rng.random(), rng.uniform(0.4, 1.0)),
        disc_size=0.02,
        ambient=_times(_blend(orange, (0.7, 0.85, 1.2), 0.4), 0.5 * glow + 0.006),
        sun=(0.0, 0.0, 0.0),
        sun_way=(0.0, 1.0, 0.0),
        haze=_log_uniform(rng, 150.0, 1500.0),
        glow=_glows(town, other, levels),
        throw=_glows(town, other, throws),
        own_lights=rng.uniform(0.2, 0.9),
        windows=_log_uniform(rng, 0.08, 0.6),
        lit=rng.uniform(0.25, 1.2),
        wet=rng.uniform(0.3, 0.8) if rng.random() < 0.3 else 0.0,
        stars=0.3 * (dark > 0.6),
        exposure=_log_uniform(rng, 0.8, 2.6),
        read_noise=_log_uniform(rng, 0.0012, 0.0045),
        shot_noise=_log_uniform(rng, 0.018, 0.05),
        blur=rng.uniform(0.002, 0.007),
        bloom=_log_uniform(rng, 0.1, 0.4),
        vignette=rng.uniform(0.1, 0.6),
        cast=_cast(rng, 0.18),
    )
