"""Light on a painted street: the weather of a domain, and the frame that a camera would record under it.

Legend: arrays are planar, 3HW or HW, float32. Light is linear and relative: a white wall in full daylight is about 1.
Colours are (red, green, blue); x right, y up, z ahead in metres. Each domain draws from wide ranges that touch those
of its neighbours, so neither the mean brightness nor one dark sky tells the domains apart. The arithmetic on pixels
keeps to what IEEE 754 rounds exactly (no exp, log or matrix product), so frames do not depend on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from nightseg.data.scenes.sheet import FAR, PAVEMENT_SURFACE, SKY_SURFACE, Camera, Glow, Sheet

MOST_SOURCES = 14  # the nearest; what is farther lights too few pixels to see
Floats = NDArray[np.float32]
Tint = tuple[float, float, float]
WHITE: Tint = (1.0, 1.0, 1.0)
BLACK: Tint = (0.0, 0.0, 0.0)
WARM: Tint = (1.0, 0.72, 0.4)
COLD: Tint = (0.78, 0.9, 1.0)
# Sodium, warm and cold LED, mercury: the mix is what a town has.
LAMP_TINTS: tuple[Tint, ...] = (
    (1.0, 0.56, 0.17), (1.0, 0.62, 0.26), (1.0, 0.82, 0.56), (0.86, 0.95, 1.0), (0.8, 1.0, 0.78),
)  # fmt: skip
GLOW_TINTS: Mapping[Glow, Tint] = {
    Glow.HEAD_LIGHT: (1.0, 0.95, 0.84),
    Glow.TAIL_LIGHT: (1.0, 0.07, 0.05),
    Glow.SIGNAL_RED: (1.0, 0.08, 0.06),
    Glow.SIGNAL_AMBER: (1.0, 0.6, 0.08),
    Glow.SIGNAL_GREEN: (0.14, 1.0, 0.56),
    Glow.SHOP: (1.0, 0.86, 0.62),
    Glow.BOARD: (0.8, 0.9, 1.0),
}
SIGNALS = (Glow.SIGNAL_RED, Glow.SIGNAL_AMBER, Glow.SIGNAL_GREEN)


class Weather(NamedTuple):
    """Everything that lights and exposes one scene."""

    sky_top: Tint
    sky_low: Tint
    cloud: Tint
    clouds: float  # share of the sky
    ambient: Tint
    haze: float  # metres at which half of the light is lost
    glow: Floats  # (kinds of glow, 3) radiance of what shines
    windows: float  # radiance of a lit window
    lit: float  # factor on the share of lit windows
    wet: float
    exposure: float
    read_noise: float
    shot_noise: float
    blur: float  # share of the frame's height
    bloom: float
    vignette: float
    cast: Tint
    throw: Floats = np.zeros((len(Glow), 3), np.float32)  # irradiance below or near a source
    own_lights: float = 0.0
    stars: float = 0.0
    disc: Tint = BLACK  # sun, moon: radiance
    disc_place: tuple[float, float] = (0.5, 0.5)  # share of the width, share of the sky's height above the horizon
    disc_size: float = 0.05  # share of the frame's height
    sun: Tint = BLACK
    sun_way: Tint = (0.0, 1.0, 0.0)  # unit vector toward the sun: right, up, ahead


def _times(tint: Tint, factor: float) -> Tint:
    return (tint[0] * factor, tint[1] * factor, tint[2] * factor)


def _blend(first: Tint, second: Tint, share: float) -> Tint:
    red, green, blue = (one + (other - one) * share for one, other in zip(first, second, strict=True))
    return (red, green, blue)


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return low * math.pow(high / low, rng.random())


def _cast(rng: Generator, spread: float) -> Tint:
    return (1.0 + rng.uniform(-spread, spread), 1.0, 1.0 + rng.uniform(-spread, spread))


def _sun_way(rng: Generator) -> Tint:
    elevation, azimuth = rng.uniform(0.5, 1.25), rng.uniform(0.0, math.tau)
    flat = math.cos(elevation)
    return (flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth))


def _lamp(rng: Generator) -> Tint:
    return LAMP_TINTS[int(rng.random() * len(LAMP_TINTS))]


def _glows(levels: Mapping[Glow, float], early: Tint = WHITE, late: Tint = WHITE) -> Floats:
    """The (kinds of glow, 3) table of tint times level; `early` and `late` are the colours of lamps."""
    tints = {**GLOW_TINTS, Glow.LAMP_EARLY: early, Glow.LAMP_LATE: late}
    table = np.zeros((len(Glow), 3), np.float32)
    for kind, level in levels.items():
        table[kind] = _times(tints[kind], level)
    return table


def _day(rng: Generator) -> Weather:
    kind = rng.random()
    sunny, rain = kind < 0.5, kind > 0.85
    sky = rng.uniform(0.75, 1.3) if not rain else rng.uniform(0.3, 0.6)
    top = _times((0.42, 0.66, 1.0) if sunny else (0.9, 0.95, 1.0), sky * rng.uniform(0.55, 0.9))
    warmth = rng.random()
    sun = _times(_blend((1.0, 0.96, 0.88), (1.0, 0.8, 0.56), warmth), rng.uniform(1.5, 2.6) if sunny else 0.0)
    levels = dict.fromkeys(SIGNALS, 0.9) | {Glow.HEAD_LIGHT: 1.2 * rain, Glow.TAIL_LIGHT: 0.5 * rain, Glow.SHOP: 0.12}
    return Weather(
        sky_top=top,
        sky_low=_times((0.92, 0.96, 1.0), sky),
        cloud=_times(WHITE, sky * rng.uniform(0.8, 1.1)),
        clouds=rng.uniform(0.1, 0.6) if sunny else rng.uniform(0.5, 1.0),
        disc=_times((1.0, 0.95, 0.85), 4.0 if sunny and rng.random() < 0.3 else 0.0),
        disc_place=(rng.random(), rng.uniform(0.2, 1.0)),
        ambient=_times((0.86, 0.95, 1.06) if sunny else (0.96, 1.0, 1.03), (0.42 if sunny else 0.95) * sky),
        sun=sun,
        sun_way=_sun_way(rng),
        haze=_log_uniform(rng, 250.0, 2500.0) * (0.4 if rain else 1.0),
        glow=_glows(levels),
        windows=0.25,
        lit=0.06 if not rain else 0.4,
        wet=rng.uniform(0.3, 0.7) if rain else 0.0,
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
    low = _times(_blend((0.85, 0.85, 0.95), (1.0, 0.62, 0.42), rng.random()), 1.2 * sky)
    lamp, on = _lamp(rng), rng.uniform(0.3, 1.0)
    late = on if rng.random() < deep else 0.0
    levels = dict.fromkeys(SIGNALS, 1.3) | {
        Glow.LAMP_EARLY: 5.0 * on, Glow.LAMP_LATE: 5.0 * late, Glow.HEAD_LIGHT: 6.0, Glow.TAIL_LIGHT: 0.7,
        Glow.SHOP: 0.4, Glow.BOARD: 0.35,
    }  # fmt: skip
    throws = {
        Glow.LAMP_EARLY: 0.3 * on, Glow.LAMP_LATE: 0.3 * late, Glow.HEAD_LIGHT: 0.2, Glow.TAIL_LIGHT: 0.04,
        Glow.SHOP: 0.12,
    }  # fmt: skip
    return Weather(
        sky_top=_times(_blend((0.45, 0.6, 1.0), (0.25, 0.42, 1.0), deep), 0.7 * sky),
        sky_low=low,
        cloud=_times((0.8, 0.78, 0.9), 0.55 * sky),
        clouds=rng.uniform(0.1, 0.8),
        ambient=_times(_blend((0.9, 0.95, 1.1), (0.62, 0.8, 1.3), deep), 0.8 * sky),
        haze=_log_uniform(rng, 200.0, 1500.0),
        glow=_glows(levels, lamp, lamp),
        throw=_glows(throws, lamp, lamp),
        own_lights=0.25 + 0.3 * deep,
        windows=rng.uniform(0.12, 0.4),
        lit=rng.uniform(0.4, 0.9),
        wet=rng.uniform(0.2, 0.6) if rng.random() < 0.25 else 0.0,
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
    town = _lamp(rng)
    other = town if rng.random() < 0.7 else _lamp(rng)
    glow = 0.045 * math.pow(0.07, dark) * _log_uniform(rng, 0.6, 1.7)  # of the sky over the town
    orange = _blend(town, (0.8, 0.8, 1.0), rng.random())
    lamps = 0.9 * math.pow(0.3, dark) * _log_uniform(rng, 0.7, 1.4)
    late = lamps if rng.random() < 0.7 else 0.0  # saving towns switch every second lamp off
    shops, boards = rng.uniform(0.25, 1.0), rng.uniform(0.1, 0.7)
    levels = dict.fromkeys(SIGNALS, 2.2) | {
        Glow.LAMP_EARLY: 9.0, Glow.LAMP_LATE: 9.0 * (late > 0.0), Glow.HEAD_LIGHT: 14.0, Glow.TAIL_LIGHT: 1.6,
        Glow.SHOP: shops, Glow.BOARD: boards,
    }  # fmt: skip
    throws = {
        Glow.LAMP_EARLY: lamps, Glow.LAMP_LATE: late, Glow.HEAD_LIGHT: 0.4, Glow.TAIL_LIGHT: 0.06,
        Glow.SHOP: 0.3 * shops,
    }  # fmt: skip
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
        haze=_log_uniform(rng, 150.0, 1500.0),
        glow=_glows(levels, town, other),
        throw=_glows(throws, town, other),
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


_WEATHER: Mapping[str, Callable[[Generator], Weather]] = {"day": _day, "twilight": _twilight, "night": _night}
DOMAINS = tuple(_WEATHER)


# -- pixels ----------------------------------------------------------------------------------------------------------


class _Space(NamedTuple):
    """Where each pixel lies (metres) and which way its surface faces (unit vector), HW each; tables by surface."""

    x: Floats
    y: Floats
    z: Floats
    normal_x: Floats
    normal_y: Floats
    normal_z: Floats
    surface: NDArray[np.uint8]
    planes: Floats  # (4, surfaces)


def illuminate(
    sheet: Sheet,
    walls: tuple[float, float],
    roofs: Floats,
    domain: str,
    *,
    weather: Generator,
    grain: Generator,
    sensor: Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The frame, uint8 HWC RGB, and its label, uint8 HW.

    walls: distance of the walls from the street's middle, left and right; roofs: float32 (2, metres), the heights along
    them. weather, grain and sensor draw the light of the domain, the texture of surfaces and the camera's noise.
    """
    camera, frame, light = sheet.camera, sheet.finish(), _WEATHER[domain](weather)
    space = _space(sheet, frame.surface)
    clouds = _cloud_field(camera, grain)
    radiance = frame.albedo
    radiance *= _texture(sheet, frame.surface, grain)
    shine = _panes(sheet, space, radiance, light)
    shine += _glow(sheet, frame.surface, radiance, light)
    falling = _daylight(camera, space, light, walls, roofs)
    _add_lamps(falling, sheet, space, light)
    if light.own_lights > 0.0:
        falling += _own_lights(sheet, space, light)
    radiance *= falling
    radiance += shine
    _add_haze(radiance, space, light, frame.sky)
    radiance += _sky(camera, light, clouds, grain) * frame.sky
    if light.wet > 0.0:
        _add_reflections(radiance, camera, space, light)
    return _expose(radiance, light, sensor), frame.label


def _column(tint: Tint) -> Floats:
    return np.array(tint, np.float32)[:, None, None]


def _resized(plane: Floats, width: int, height: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> Floats:
    return np.asarray(Image.fromarray(plane).resize((width, height), how))


def _space(sheet: Sheet, surface: NDArray[np.uint8]) -> _Space:
    camera = sheet.camera
    planes = np.ascontiguousarray(np.array([s.plane for s in sheet.surfaces], np.float32).T)
    a, b, c, d = planes.take(surface, axis=1)
    ray_x = ((np.arange(camera.width) + 0.5 - camera.center_x) / camera.focal).astype(np.float32)[None, :]
    ray_y = ((np.arange(camera.height) + 0.5 - camera.horizon_y) / camera.focal).astype(np.float32)[:, None]
    z = np.clip(d / np.maximum(a * ray_x + b * ray_y + c, np.float32(1e-3)), 0.5, FAR)
    return _Space(z * ray_x, np.float32(camera.eye) - z * ray_y, z, -a, b, -c, surface, planes)


def _texture(sheet: Sheet, surface: NDArray[np.uint8], grain: Generator) -> Floats:
    """What multiplies the albedo, HW: leaves are rough at two scales, tar is fine-grained, paint is smooth."""
    height, width = surface.shape
    coarse = grain.standard_normal(((height + 2) // 3, (width + 2) // 3), np.float32)
    fine = grain.standard_normal((height, width), np.float32)
    field = np.float32(0.6) * fine + _resized(coarse, width, height)
    rough = np.array([s.grain for s in sheet.surfaces], np.float32).take(surface)
    texture: Floats = np.maximum(rough * field + 1, np.float32(0.15))
    return texture


def _cloud_field(camera: Camera, grain: Generator) -> Floats:
    """Roughly normal, HW; drawn on fixed grids so that the clouds do not depend on the frame's size."""
    field = np.zeros((camera.height, camera.width), np.float32)
    for rows, columns, weight in ((7, 6, 0.7), (14, 12, 0.5), (30, 24, 0.3)):
        drawn = grain.standard_normal((rows, columns), np.float32)
        field += np.float32(weight) * _resized(drawn, camera.width, camera.height, Image.Resampling.BICUBIC)
    return field


def _sky(camera: Camera, light: Weather, clouds: Floats, grain: Generator) -> Floats:
    """Radiance of the sky, 3HW: horizon to zenith, clouds, sun or moon, stars."""
    rise = (camera.horizon_y - np.arange(camera.height) - 0.5) / max(camera.horizon_y, 1.0)
    rise = np.clip(rise, 0.0, 1.0).astype(np.float32)[None, :, None]
    low, top = _column(light.sky_low), _column(light.sky_top)
    clear = top + (low - top) * (1 / (1 + 6 * rise * rise + rise))
    cover = np.clip((clouds + np.float32(2.0 * light.clouds - 1.0)) * 1.2, 0, 1) * np.float32(0.85)
    shaded = 1 - np.float32(0.25) * np.clip(clouds, -1, 1)
    sky: Floats = (_column(light.cloud) * shaded - clear) * cover + clear
    if max(light.disc) > 0.0:
        x = np.arange(camera.width, dtype=np.float32)[None, :] - np.float32(light.disc_place[0] * camera.width)
        up = light.disc_place[1] * camera.horizon_y
        y = np.arange(camera.height, dtype=np.float32)[:, None] - np.float32(camera.horizon_y - up)
        far = (x * x + y * y) / np.float32((light.disc_size * camera.height) ** 2)
        sky += _column(light.disc) * ((1 - np.float32(0.7) * cover) / (1 + far * far) + 0.04 / (1 + 0.1 * far))
    if light.stars > 0.0:
        twinkle = grain.random((camera.height, camera.width), np.float32)
        sky += np.float32(light.stars) * (twinkle > 0.9985) * (1 - cover)
    return sky


def _panes(sheet: Sheet, space: _Space, albedo: Floats, light: Weather) -> Floats:
    """Draw windows and the gaps of fences into the albedo; return what the lit windows send, 3HW.

    The share of a pixel that a pane covers is integrated along both axes of the wall (metres per pixel du and dv), so
    far windows melt into a mean tone instead of a moire.
    """
    shine = np.zeros_like(albedo)
    patterns = np.ascontiguousarray(np.array([s.pattern for s in sheet.surfaces], np.float32).T)
    where = np.flatnonzero((patterns[0] > 0.0).take(space.surface))
    if where.size == 0:
        return shine
    number = space.surface.take(where)
    pitch_u, pitch_v, share_u, share_v, first_v, last_v, red, green, blue, lit = patterns.take(number, axis=1)
    a, c, d = space.planes[[0, 2, 3]].take(number, axis=1)
    x, y, z = (places.take(where) for places in space[:3])
    focal = np.float32(sheet.camera.focal)
    cell_u, cover = _cells(x * c - z * a, pitch_u, share_u, z * z / (d * focal))
    cell_v, cover_v = _cells(y - first_v, pitch_v, share_v, z / focal)
    cover *= cover_v * ((y >= first_v) & (y < last_v))
    mixed = (cell_u * 73856093) ^ (cell_v * 19349663) ^ (number.astype(np.int64) * 83492791)
    chance = ((mixed * 2654435761) >> 7) & 0xFFFF
    brightness = 0.35 + ((chance & 7) / np.float32(7))
    is_on = chance < lit * np.float32(light.lit * 65536.0)
    on = cover * is_on * brightness.astype(np.float32) * np.float32(light.windows)
    mirrored = cover * (lit > 0.0) * np.float32(0.12)  # glass shows some sky
    warm = (chance & 24) > 0
    flat, sent = albedo.reshape(3, -1), shine.reshape(3, -1)
    for band, tone in enumerate((red, green, blue)):
        wall = flat[band].take(where)
        flat[band, where] = wall + (tone - wall) * cover
        tint = np.where(warm, np.float32(WARM[band]), np.float32(COLD[band]))
        sent[band, where] = on * tint + mirrored * np.float32(light.sky_low[band])
    return shine


def _cells(place: Floats, pitch: Floats, share: Floats, footprint: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The number of the cell in which each place lies, and the share of the pixel that the cell's pane covers."""
    steps = place / pitch
    cell = np.floor(steps)
    fine = pitch / footprint  # pixels a cell
    edge = (np.float32(0.5) * share - np.abs(steps - cell - np.float32(0.5))) * fine
    sharp = np.clip(edge + np.float32(0.5), 0, 1)
    trust = np.clip(np.float32(0.5) * fine - np.float32(0.5), 0, 1)
    return cell.astype(np.int64), share + (sharp - share) * trust


def _glow(sheet: Sheet, surface: NDArray[np.uint8], albedo: Floats, light: Weather) -> Floats:
    """What lamps, signals and shops send, 3HW."""
    kinds = np.array([s.glow for s in sheet.surfaces])
    glow: Floats = np.ascontiguousarray(light.glow[kinds].T).take(surface, axis=1)
    # lit from behind: it keeps the colours it is painted with
    behind = np.flatnonzero(np.isin(kinds, (Glow.SHOP, Glow.BOARD)).take(surface))
    glow.reshape(3, -1)[:, behind] *= 5 * albedo.reshape(3, -1)[:, behind]
    return glow


def _daylight(camera: Camera, space: _Space, light: Weather, walls: tuple[float, float], roofs: Floats) -> Floats:
    """Irradiance of sky and sun, 3HW; houses between a point and the sun throw a shadow."""
    open_sky = np.float32(0.72) + np.float32(0.28) * space.normal_y
    open_sky += np.float32(0.02) * np.clip(space.y, 0, 10)
    falling = _column(light.ambient) * open_sky
    if max(light.sun) == 0.0:
        return falling
    way_x, way_y, way_z = (np.float32(part) for part in light.sun_way)
    direct = np.maximum(space.normal_x * way_x + space.normal_y * way_y + space.normal_z * way_z, 0)
    side = 1 if way_x > 0.0 else 0
    sideways = np.float32(max(abs(float(way_x)), 0.05))
    beside = space.x - np.float32(camera.bend) * space.z * space.z
    distance = np.float32(walls[side]) - (beside if side else -beside)  # to the wall, metres
    reach = distance / sideways
    metre = np.clip(space.z + way_z * reach, 0, roofs.shape[1] - 1).astype(np.int32)
    above = roofs[side].take(metre) - (space.y + way_y * reach)
    shadow = np.clip(above + np.float32(0.5), 0, 1) * (distance > np.float32(0.1))
    falling += _column(light.sun) * (direct * (1 - shadow))
    return falling


def _add_lamps(falling: Floats, sheet: Sheet, space: _Space, light: Weather) -> None:
    """Add the irradiance of the street's sources: lamps shine down, head lights toward us, shops around them."""
    throws = light.throw.max(axis=1)
    near = sorted((s for s in sheet.sources if throws[s.glow] > 0.0), key=lambda s: s.z)[:MOST_SOURCES]
    by_kind: dict[int, Floats] = {}
    for source in near:
        to_x, to_y = np.float32(source.x) - space.x, np.float32(source.y) - space.y
        to_z = np.float32(source.z) - space.z
        inverse = 1 / (to_x * to_x + to_y * to_y + to_z * to_z + np.float32(0.3))
        nearness = np.sqrt(inverse)
        cosine = (space.normal_x * to_x + space.normal_y * to_y + space.normal_z * to_z) * nearness
        amount = np.maximum(cosine * np.float32(0.8) + np.float32(0.2), 0) * inverse
        if source.glow == Glow.HEAD_LIGHT:
            beam = np.clip((to_z * nearness - np.float32(0.75)) * 4, 0, 1)
            amount *= beam * np.float32(60.0 * source.strength)
        elif source.glow in (Glow.SHOP, Glow.TAIL_LIGHT):
            amount *= np.float32(12.0 * source.strength)
        else:
            down = np.clip(to_y * nearness + np.float32(0.08), 0, 1)
            amount *= down * np.float32(source.strength * source.y * source.y)
        by_kind[source.glow] = by_kind[source.glow] + amount if source.glow in by_kind else amount
    for kind in sorted(by_kind):
        falling += light.throw[kind][:, None, None] * by_kind[kind]


def _own_lights(sheet: Sheet, space: _Space, light: Weather) -> Floats:
    """Irradiance of our own low beam, HW (white); signs and plates send it straight back."""
    up = space.y - np.float32(0.65)
    square = space.x * space.x + up * up + space.z * space.z
    facing = -(space.normal_x * space.x + space.normal_y * up + space.normal_z * space.z) / np.sqrt(square)
    aside = space.x / (np.float32(0.22) * space.z + 1)
    beam = 1 / (1 + aside * aside * aside * aside)
    cut = np.clip(1 - np.float32(14.0) * up / space.z, np.float32(0.07), 1)  # a low beam ends at the horizon
    reflect = np.array([s.reflect for s in sheet.surfaces], np.float32).take(space.surface)
    answer = np.maximum(facing + np.float32(0.12), 0) + 8 * reflect
    falling: Floats = answer * beam * cut * (np.float32(light.own_lights * 144.0) / (square + 30))
    return falling


def _add_haze(radiance: Floats, space: _Space, light: Weather, sky: Floats) -> None:
    lost = (1 - sky) * space.z / (space.z + np.float32(light.haze))
    radiance += (_column(light.sky_low) - radiance) * lost


def _add_reflections(radiance: Floats, camera: Camera, space: _Space, light: Weather) -> None:
    """A wet road mirrors what stands behind it, smeared downward; the flatter the view, the more."""
    rows = np.arange(camera.height)
    mirrored = np.clip(np.rint(2.0 * camera.horizon_y - rows + 0.02 * camera.height), 0, camera.height - 1)
    ground = (space.surface > SKY_SURFACE) & (space.surface <= PAVEMENT_SURFACE)
    flat = np.clip(space.z * np.float32(0.04), np.float32(0.08), np.float32(0.8)) * np.float32(light.wet)
    share = np.where(ground, flat, np.float32(0))
    for band in range(3):
        capped = np.minimum(radiance[band], 6)
        smeared = _resized(capped, camera.width, max(camera.height // 8, 4), Image.Resampling.BOX)
        image = _resized(smeared, camera.width, camera.height)[mirrored.astype(np.intp)]
        radiance[band] += (image - np.float32(0.6) * radiance[band]) * share


def _expose(radiance: Floats, light: Weather, sensor: Generator) -> NDArray[np.uint8]:
    """Lens and sensor: bloom, vignette, exposure, colour cast, tone curve, blur, noise; uint8 HWC."""
    _, height, width = radiance.shape
    x = (np.arange(width, dtype=np.float32) * np.float32(2.0 / width) - 1)[None, :]
    y = (np.arange(height, dtype=np.float32) * np.float32(2.0 / height) - 1)[:, None]
    falloff = 1 - np.float32(0.5 * light.vignette) * (x * x + np.float32(0.5) * y * y)
    encoded = np.empty((height, width, 3), np.uint8)
    for band in range(3):
        signal = radiance[band] + _halo(radiance[band], np.float32(light.bloom))
        signal *= falloff * np.float32(light.exposure * light.cast[band])
        signal *= (1 + np.float32(0.1) * signal) / (1 + np.float32(0.5) * signal)
        encoded[..., band] = np.sqrt(np.clip(signal, 0, 1, out=signal)) * 255 + np.float32(0.5)
    picture = Image.fromarray(encoded).filter(ImageFilter.GaussianBlur(light.blur * height))
    tone = np.asarray(picture).astype(np.float32)
    # The square root of the tone curve divides an error by the tone: dark parts show noise, bright ones hide it.
    deviation = np.float32(light.read_noise * 127.5 * 255.0) / (tone + 10) + np.float32(light.shot_noise * 127.5)
    grey = sensor.standard_normal((height, width, 1), np.float32)
    colour = sensor.standard_normal((height, width, 3), np.float32)
    noise = (np.float32(0.7) * colour + np.float32(0.7) * grey) * deviation
    image: NDArray[np.uint8] = np.clip(tone + noise + np.float32(0.5), 0, 255).astype(np.uint8)
    return image


def _halo(band: Floats, strength: np.float32) -> Floats:
    """Light that the lens scatters around what is much brighter than white, HW: a pyramid of three widths."""
    height, width = band.shape
    excess = np.maximum(band - np.float32(0.8), 0)
    levels = []
    for step in (max(height // 32, 2), 4, 2):
        size = (max(excess.shape[1] // step, 1), max(excess.shape[0] // step, 1))
        excess = _resized(excess, *size, Image.Resampling.BOX)
        levels.append(excess)
    halo = levels[2]
    for level in (levels[1], levels[0]):
        halo = level + _resized(halo, level.shape[1], level.shape[0], Image.Resampling.BICUBIC)
    return np.maximum(_resized(halo, width, height, Image.Resampling.BICUBIC), 0) * strength
