"""Light on a painted street: from the sheet's colours and planes to the frame that a camera would record.

Legend: arrays are planar, 3HW or HW, float32, linear light. x right, y up, z ahead in metres. The arithmetic keeps to
the operations that IEEE 754 rounds exactly (no exp, log or matrix product on pixels), so frames do not depend on the
processor's vector library.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from nightseg.data.scenes.sheet import (
    BOARD,
    FAR,
    HEAD_LIGHT,
    NUM_GLOWS,
    PAVEMENT_SURFACE,
    SHOP,
    SKY_SURFACE,
    TAIL_LIGHT,
    Camera,
    Sheet,
)
from nightseg.data.scenes.weather import Tint, Weather, weather_for

Plane2 = NDArray[np.float32]
MOST_SOURCES = 14  # the nearest; what is farther lights too few pixels to see
WARM: Tint = (1.0, 0.72, 0.4)
COLD: Tint = (0.78, 0.9, 1.0)


class _Space(NamedTuple):
    """Where each pixel lies (metres) and which way its surface faces (unit vector), HW each; tables by surface."""

    x: Plane2
    y: Plane2
    z: Plane2
    normal_x: Plane2
    normal_y: Plane2
    normal_z: Plane2
    surface: NDArray[np.uint8]
    planes: Plane2  # (surfaces, 4)


def illuminate(
    sheet: Sheet,
    domain: str,
    *,
    walls: tuple[float, float],
    roofs: NDArray[np.float32],
    weather: Generator,
    grain: Generator,
    sensor: Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The frame, uint8 HWC RGB, and its label, uint8 HW.

    walls: distance of the walls from the street's middle, left and right; roofs: float32 (2, metres), the heights along
    them. weather, grain and sensor draw the light of the domain, the texture of surfaces and the camera's noise.
    """
    camera, frame, light = sheet.camera, sheet.finish(), weather_for(domain, weather)
    space = _space(sheet, frame.surface)
    clouds = _cloud_field(camera, grain)
    albedo = frame.albedo * _texture(sheet, frame.surface, grain)
    shine = _panes(sheet, space, albedo, light)
    painted = albedo.copy()
    falling = _daylight(camera, space, light, walls, roofs)
    _add_lamps(falling, sheet, space, light)
    falling += _own_lights(sheet, space, light)
    albedo *= falling
    radiance = albedo
    kinds = np.array([s.glow for s in sheet.surfaces])
    glow = np.ascontiguousarray(light.glow[kinds].T)[:, frame.surface]
    behind = np.isin(kinds, (SHOP, BOARD))[frame.surface]  # lit from behind: it keeps the colours it is painted with
    glow[:, behind] *= 5 * painted[:, behind]
    shine += glow
    radiance += shine
    _add_haze(radiance, space, light, frame.sky)
    radiance += _sky(camera, light, clouds, grain) * frame.sky
    if light.wet > 0.0:
        _add_reflections(radiance, camera, frame.surface, space, light)
    return _expose(radiance, light, sensor), frame.label


def _column(tint: Tint) -> Plane2:
    return np.array(tint, np.float32)[:, None, None]


def _space(sheet: Sheet, surface: NDArray[np.uint8]) -> _Space:
    camera = sheet.camera
    planes = np.array([s.plane for s in sheet.surfaces], np.float32)
    a, b, c, d = (np.ascontiguousarray(column)[surface] for column in planes.T)
    ray_x = ((np.arange(camera.width) + 0.5 - camera.center_x) / camera.focal).astype(np.float32)[None, :]
    ray_y = ((np.arange(camera.height) + 0.5 - camera.horizon_y) / camera.focal).astype(np.float32)[:, None]
    slope = a * ray_x
    slope += b * ray_y
    slope += c
    z: Plane2 = np.clip(d / np.maximum(slope, np.float32(1e-3)), 0.5, FAR).astype(np.float32, copy=False)
    return _Space(z * ray_x, np.float32(camera.eye) - z * ray_y, z, -a, b, -c, surface, planes)


def _resized(plane: Plane2, width: int, height: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> Plane2:
    return np.asarray(Image.fromarray(plane).resize((width, height), how))


def _texture(sheet: Sheet, surface: NDArray[np.uint8], grain: Generator) -> Plane2:
    """What multiplies the albedo, HW: leaves are rough at two scales, tar is fine-grained, paint is smooth."""
    height, width = surface.shape
    coarse = grain.standard_normal(((height + 2) // 3, (width + 2) // 3), np.float32)
    field = _resized(coarse, width, height) + np.float32(0.6) * grain.standard_normal((height, width), np.float32)
    strength = np.array([s.grain for s in sheet.surfaces], np.float32)[surface]
    return np.maximum(1 + strength * field, np.float32(0.15))


def _cloud_field(camera: Camera, grain: Generator) -> Plane2:
    """Roughly normal, HW; drawn on fixed grids so that the clouds do not depend on the frame's size."""
    size = (camera.width, camera.height)
    field = np.float32(0.7) * _resized(grain.standard_normal((7, 6), np.float32), *size, Image.Resampling.BICUBIC)
    for rows, columns, weight in ((14, 12, 0.5), (30, 24, 0.3)):
        octave = grain.standard_normal((rows, columns), np.float32)
        field = field + np.float32(weight) * _resized(octave, *size, Image.Resampling.BICUBIC)
    return field


def _sky(camera: Camera, light: Weather, clouds: Plane2, grain: Generator) -> Plane2:
    """Radiance of the sky, 3HW: horizon to zenith, clouds, sun or moon, stars."""
    rise = (camera.horizon_y - np.arange(camera.height) - 0.5) / max(camera.horizon_y, 1.0)
    rise = np.clip(rise, 0.0, 1.0).astype(np.float32)[None, :, None]
    low, top = _column(light.sky_low), _column(light.sky_top)
    near = 1 / (1 + 6 * rise * rise + rise)
    sky = top + (low - top) * near
    cover = np.clip((clouds + np.float32(2.0 * light.clouds - 1.0)) * 1.2, 0, 1) * np.float32(0.85)
    shaded = 1 - np.float32(0.25) * np.clip(clouds, -1, 1)
    sky = sky + (_column(light.cloud) * shaded - sky) * cover
    if max(light.disc) > 0.0:
        x = np.arange(camera.width, dtype=np.float32)[None, :] - np.float32(light.disc_place[0] * camera.width)
        up = light.disc_place[1] * camera.horizon_y
        y = np.arange(camera.height, dtype=np.float32)[:, None] - np.float32(camera.horizon_y - up)
        far = (x * x + y * y) / np.float32((light.disc_size * camera.height) ** 2)
        sky = sky + _column(light.disc) * ((1 - np.float32(0.7) * cover) / (1 + far * far) + 0.04 / (1 + 0.1 * far))
    if light.stars > 0.0:
        twinkle = grain.random((camera.height, camera.width), np.float32)
        sky = sky + np.float32(light.stars) * (twinkle > 0.9985) * (1 - cover)
    return np.asarray(sky, np.float32)


def _panes(sheet: Sheet, space: _Space, albedo: Plane2, light: Weather) -> Plane2:
    """Draw windows and the gaps of fences into the albedo; return what the lit windows send, 3HW.

    The share of a pixel that a pane covers is integrated along both axes of the wall (metres per pixel du and dv), so
    far windows melt into a mean tone instead of a moire.
    """
    shine = np.zeros_like(albedo)
    patterns = np.array([s.pattern for s in sheet.surfaces], np.float32)
    surface = space.surface.ravel()
    where = np.flatnonzero((patterns[:, 0] > 0.0)[surface])
    if where.size == 0:
        return shine
    number = surface[where]
    pitch_u, pitch_v, share_u, share_v, first_v, last_v, red, green, blue, lit = patterns[number].T
    a, _, c, d = space.planes[number].T
    x, y, z = space.x.ravel()[where], space.y.ravel()[where], space.z.ravel()[where]
    focal = np.float32(sheet.camera.focal)
    cell_u, cover = _cells(x * c - z * a, pitch_u, share_u, z * z / (d * focal))
    cell_v, cover_v = _cells(y - first_v, pitch_v, share_v, z / focal)
    cover *= cover_v
    cover *= (y >= first_v) & (y < last_v)
    flat, sent = albedo.reshape(3, -1), shine.reshape(3, -1)
    for band, tone in enumerate((red, green, blue)):
        wall = flat[band, where]
        flat[band, where] = wall + (tone - wall) * cover
    mixed = (cell_u * 73856093) ^ (cell_v * 19349663) ^ (number.astype(np.int64) * 83492791)
    chance = ((mixed * 2654435761) >> 7) & 0xFFFF
    brightness = 0.35 + ((chance & 7) / np.float32(7))
    on = cover * (chance < lit * np.float32(light.lit * 65536.0)) * brightness.astype(np.float32)
    on *= np.float32(light.windows)
    mirrored = cover * (lit > 0.0) * np.float32(0.12)  # glass shows some sky
    warm = (chance & 24) > 0
    for band in range(3):
        tint = np.where(warm, np.float32(WARM[band]), np.float32(COLD[band]))
        sent[band, where] = on * tint + mirrored * np.float32(light.sky_low[band])
    return shine


def _cells(
    place: Plane2, pitch: Plane2, share: Plane2, footprint: Plane2
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The number of the cell in which each place lies, and the share of the pixel that the cell's pane covers."""
    steps = place / pitch
    cell = np.floor(steps)
    fine = pitch / footprint  # pixels a cell
    edge = (np.float32(0.5) * share - np.abs(steps - cell - np.float32(0.5))) * fine
    sharp = np.clip(edge + np.float32(0.5), 0, 1)
    trust = np.clip(np.float32(0.5) * fine - np.float32(0.5), 0, 1)
    return cell.astype(np.int64), share + (sharp - share) * trust


def _daylight(
    camera: Camera, space: _Space, light: Weather, walls: tuple[float, float], roofs: NDArray[np.float32]
) -> Plane2:
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
    above = roofs[side][metre] - (space.y + way_y * reach)
    shadow = np.clip(above + np.float32(0.5), 0, 1) * (distance > np.float32(0.1))
    falling += _column(light.sun) * (direct * (1 - shadow))
    return falling


def _add_lamps(falling: Plane2, sheet: Sheet, space: _Space, light: Weather) -> None:
    """Add the irradiance of the street's sources: lamps shine down, head lights toward us, shops around them."""
    throws = light.throw.max(axis=1)
    near = sorted((s for s in sheet.sources if throws[s.glow] > 0.0), key=lambda s: s.z)[:MOST_SOURCES]
    by_kind: dict[int, Plane2] = {}
    for source in near:
        to_x, to_y = np.float32(source.x) - space.x, np.float32(source.y) - space.y
        to_z = np.float32(source.z) - space.z
        square = to_x * to_x + to_y * to_y + to_z * to_z + np.float32(0.3)
        inverse = 1 / square
        nearness = np.sqrt(inverse)
        facing = (space.normal_x * to_x + space.normal_y * to_y + space.normal_z * to_z) * nearness
        amount = np.maximum(facing * np.float32(0.8) + np.float32(0.2), 0) * inverse
        if source.glow == HEAD_LIGHT:
            beam = np.clip((to_z * nearness - np.float32(0.75)) * 4, 0, 1)
            amount *= beam * np.float32(60.0 * source.strength)
        elif source.glow in (SHOP, TAIL_LIGHT):
            amount *= np.float32(12.0 * source.strength)
        else:
            down = np.clip(to_y * nearness + np.float32(0.08), 0, 1)
            amount *= down * np.float32(source.strength * source.y * source.y)
        by_kind[source.glow] = by_kind[source.glow] + amount if source.glow in by_kind else amount
    for kind in range(NUM_GLOWS):
        if kind in by_kind:
            falling += light.throw[kind][:, None, None] * by_kind[kind]


def _own_lights(sheet: Sheet, space: _Space, light: Weather) -> Plane2:
    """Irradiance of our own low beam, HW (white); signs and plates send it straight back."""
    if light.own_lights == 0.0:
        return np.zeros_like(space.z)
    up = space.y - np.float32(0.65)
    square = space.x * space.x + up * up + space.z * space.z
    facing = -(space.normal_x * space.x + space.normal_y * up + space.normal_z * space.z) / np.sqrt(square)
    aside = space.x / (np.float32(0.22) * space.z + 1)
    beam = 1 / (1 + aside * aside * aside * aside)
    cut = np.clip(1 - np.float32(14.0) * up / space.z, np.float32(0.07), 1)  # a low beam ends at the horizon
    reflect = np.array([s.reflect for s in sheet.surfaces], np.float32)[space.surface]
    answer = np.maximum(facing + np.float32(0.12), 0) + 8 * reflect
    falling: Plane2 = answer * beam * cut * (np.float32(light.own_lights * 144.0) / (square + 30))
    return falling


def _add_haze(radiance: Plane2, space: _Space, light: Weather, sky: Plane2) -> None:
    lost = (1 - sky) * space.z / (space.z + np.float32(light.haze))
    for band in range(3):
        radiance[band] += (np.float32(light.sky_low[band]) - radiance[band]) * lost


def _add_reflections(
    radiance: Plane2, camera: Camera, surface: NDArray[np.uint8], space: _Space, light: Weather
) -> None:
    """A wet road mirrors what stands behind it, smeared downward; the flatter the view, the more."""
    rows = np.arange(camera.height)
    mirrored = np.clip(np.rint(2.0 * camera.horizon_y - rows + 0.02 * camera.height), 0, camera.height - 1)
    ground = (surface > SKY_SURFACE) & (surface <= PAVEMENT_SURFACE)
    flat = np.clip(space.z * np.float32(0.04), np.float32(0.08), np.float32(0.8)) * np.float32(light.wet)
    share = np.where(ground, flat, np.float32(0))
    for band in range(3):
        capped = np.minimum(radiance[band], 6)
        smeared = _resized(capped, camera.width, max(camera.height // 8, 4), Image.Resampling.BOX)
        image = _resized(smeared, camera.width, camera.height)[mirrored.astype(np.intp)]
        radiance[band] += (image - np.float32(0.6) * radiance[band]) * share


def _expose(radiance: Plane2, light: Weather, sensor: Generator) -> NDArray[np.uint8]:
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
        encoded[..., band] = np.sqrt(np.clip(signal, 0, 1)) * 255 + np.float32(0.5)
    picture = Image.fromarray(encoded).filter(ImageFilter.GaussianBlur(light.blur * height))
    tone = np.asarray(picture).astype(np.float32)
    # The square root of the tone curve divides an error by the tone: dark parts show noise, bright ones hide it.
    deviation = np.float32(light.shot_noise * 127.5) + np.float32(light.read_noise * 127.5 * 255.0) / (tone + 10)
    grey = sensor.standard_normal((height, width, 1), np.float32)
    noise = grey * np.float32(0.7) + np.float32(0.7) * sensor.standard_normal((height, width, 3), np.float32)
    tone += noise * deviation
    image: NDArray[np.uint8] = np.clip(tone + np.float32(0.5), 0, 255).astype(np.uint8)
    return image


def _halo(band: Plane2, strength: np.float32) -> Plane2:
    """Light that the lens scatters around what is much brighter than white, HW: a pyramid of three widths."""
    height, width = band.shape
    excess = np.maximum(band - np.float32(0.8), 0)
    levels = []
    for step in (max(height // 32, 2), 4, 2):
        size = (max(excess.shape[1] // step, 1), max(excess.shape[0] // step, 1))
        excess = _resized(excess, *size, Image.Resampling.BOX)
        levels.append(excess)
    wide = _resized(levels[2], levels[1].shape[1], levels[1].shape[0], Image.Resampling.BICUBIC)
    middle = _resized(levels[1] + wide, levels[0].shape[1], levels[0].shape[0], Image.Resampling.BICUBIC)
    halo = _resized(levels[0] + middle, width, height, Image.Resampling.BICUBIC)
    return np.maximum(halo, 0) * strength
