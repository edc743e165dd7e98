"""Night by optics: what is dark stays dark, what is bright grows darker, noise as stated, glow where the label says."""

from __future__ import annotations

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.translators.colour import to_linear, to_pixels
from nightseg.translators.photometric import LitIds, black_body, expose, night_of
from nightseg.translators.settings import LitClasses, PhotometricTranslator

CLASSES = taxonomy("camvid11").classes
SKY, ROAD, CAR = (CLASSES.index(name) for name in ("sky", "road", "car"))
LIT = LitIds.of(LitClasses(), CLASSES)
DEFAULT = PhotometricTranslator(kind="photometric")
CLEAN = DEFAULT.model_copy(update={"electrons": 1e15, "read_noise": 0.0})  # a sensor without noise
PLAIN = CLEAN.model_copy(update={"stops": (-2.0, -2.0), "temperature": (4000.0, 4000.0), "vignette": 0.0, "beam": 0.0})


def night(
    image: np.ndarray, label: np.ndarray | None = None, optics: PhotometricTranslator = DEFAULT, **more: object
) -> np.ndarray:
    arguments = {"seed": 0, "frame_id": "day/1"} | more
    return night_of(image, label, optics=optics, lit=LIT, **arguments)  # type: ignore[arg-type]


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 200, 3), dtype=np.uint8)


def test_black_stays_black_but_for_the_noise() -> None:
    black = np.zeros((64, 96, 3), dtype=np.uint8)
    assert not night(black, optics=CLEAN).any()
    noisy = night(black)
    assert 0 < noisy.mean() < 4 and noisy.max() < 40  # half of the read noise lies below zero


def test_without_a_label_no_pixel_grows_brighter_and_order_is_kept() -> None:
    image = picture()
    made = night(image, optics=CLEAN)
    assert (made <= image).all() and made.mean() < 0.5 * image.mean()
    brighter = np.maximum(image, 200)
    assert (night(brighter, optics=CLEAN) >= made).all()


def test_two_stops_under_a_lamp_of_4000_kelvin() -> None:
    tint = np.array(black_body(4000.0), dtype=np.float32)
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    assert np.array_equal(night(white, optics=PLAIN), to_pixels(np.broadcast_to(0.25 * tint, (8, 8, 3))))


def test_the_lens_loses_its_share_in_the_corners() -> None:
    white = np.full((101, 201, 3), 255, dtype=np.uint8)
    light = to_linear(night(white, optics=PLAIN.model_copy(update={"vignette": 0.5})))[..., 0]
    assert light[50, 100] == pytest.approx(0.25, rel=0.02)
    assert light[0, 0] / light[50, 100] == pytest.approx(0.5, abs=0.02)


def test_our_beam_lights_the_road_ahead() -> None:
    grey = np.full((100, 200, 3), 150, dtype=np.uint8)
    optics = [PLAIN.model_copy(update={"beam": strength}) for strength in (0.0, 2.0)]
    plain, beam = (night(grey, optics=one).astype(int) for one in optics)
    assert (beam - plain)[90, 100].min() > 20 and (beam - plain)[90, 100].min() > (beam - plain)[90, 5].max()
    assert np.array_equal(beam[:50], plain[:50])


@pytest.mark.parametrize(
    ("light", "electrons", "read_noise"), [(0.25, 100.0, 0.01), (0.5, 1000.0, 0.0), (0.02, 400.0, 0.002)]
)
def test_the_noise_has_the_stated_variance(light: float, electrons: float, read_noise: float) -> None:
    flat = np.full((300, 300, 3), light, dtype=np.float32)
    counted = expose(flat, electrons, read_noise, np.random.default_rng(0))
    wanted = light / electrons + read_noise**2
    assert counted.mean(dtype=float) == pytest.approx(light, abs=5 * np.sqrt(wanted / flat.size))
    assert counted.var(dtype=float) == pytest.approx(wanted, rel=0.02)


def test_only_the_labelled_sky_goes_dark() -> None:
    image, label = np.full((60, 80, 3), 200, dtype=np.uint8), np.full((60, 80), ROAD, dtype=np.uint8)
    label[:30] = SKY
    light = to_linear(night(image, label, PLAIN.model_copy(update={"sky": 0.1})))[..., 0]
    assert light[:28].mean() / light[34:].mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(night(image, label, PLAIN)[34:], night(image, None, PLAIN)[34:])


def test_at_dusk_the_sky_may_keep_more_light_than_the_street() -> None:
    image, label = np.full((60, 80, 3), 150, dtype=np.uint8), np.full((60, 80), ROAD, dtype=np.uint8)
    label[:30] = SKY
    light = to_linear(night(image, label, PLAIN.model_copy(update={"sky": 2.0})))[..., 1]
    assert light[:28].mean() / light[34:].mean() == pytest.approx(2.0, abs=0.05)


def test_the_smallest_frames_are_frames_too() -> None:
    for size in ((1, 1), (1, 7), (5, 2)):
        image, label = np.full((*size, 3), 90, dtype=np.uint8), np.full(size, CAR, dtype=np.uint8)
        assert night(image, label).shape == (*size, 3)


def test_glow_is_only_where_the_label_says() -> None:
    image, label = picture(), np.full((64, 200), ROAD, dtype=np.uint8)
    unlit = night(image, label)
    label[40:56, 60:90] = CAR
    lit = night(image, label)
    changed = np.flatnonzero((lit != unlit).any(axis=(0, 2)))
    reach = 3 * round(64 * 0.06)
    assert (lit.astype(int) - unlit)[40:56, 60:90].max() > 60
    assert 60 - reach <= changed.min() and changed.max() < 90 + reach
    assert np.array_equal(night(image, label, DEFAULT.model_copy(update=dict(lights=0.0))), unlit)


def test_a_frame_follows_from_seed_and_id_alone() -> None:
    image, label = picture(), np.full((64, 200), CAR, dtype=np.uint8)
    once = night(image, label)
    assert np.array_equal(once, night(image.copy(), label.copy()))
    assert not np.array_equal(once, night(image, label, seed=1))
    assert not np.array_equal(once, night(image, label, frame_id="day/2"))


def test_black_bodies_have_their_known_colours() -> None:
    assert black_body(2856.0) == pytest.approx((1.0, 0.4477, 0.1264), abs=0.005)  # illuminant A, x 0.4476, y 0.4074
    assert black_body(6504.0) == pytest.approx((1.0, 0.95, 0.98), abs=0.05)
    assert black_body(12000.0)[2] == 1.0
    for joint in (2222.0, 4000.0):  # of the pieces of the fit
        assert black_body(joint) == pytest.approx(black_body(joint + 0.1), abs=0.005)


def test_the_sky_is_drawn_from_its_range_and_bright_skies_are_rare() -> None:
    label, white = np.full((8, 8), SKY, dtype=np.uint8), np.full((8, 8, 3), 255, dtype=np.uint8)
    ranged = PLAIN.model_copy(update={"sky": (0.1, 0.9), "lights": 0.0})
    kept = np.array([to_linear(night(white, label, ranged, seed=seed))[0, 0, 0] / 0.25 for seed in range(400)])
    assert kept.min() > 0.09 and kept.max() < 0.92  # 8-bit values are 1 % apart here
    assert kept.mean() == pytest.approx(0.1 + 0.8 / 3, abs=0.05)  # of u^2; four standard errors of 0.24 / 20


def test_haze_shines_before_the_sky_less_before_what_stands_afar_and_not_at_our_feet() -> None:
    label = np.full((100, 40), ROAD, dtype=np.uint8)
    label[:50, :20] = SKY
    black = np.zeros((100, 40, 3), dtype=np.uint8)
    hazy = PLAIN.model_copy(update={"glow": (0.4, 0.4), "lights": 0.0})
    light = to_linear(night(black, label, hazy))[..., 0]
    assert light[40, 5] == pytest.approx(0.4 * (1 - 0.5 * 0.19), rel=0.03)
    assert light[2, 5] == pytest.approx(0.4 * (1 - 0.5 * 0.95), rel=0.03)
    assert light[40, 35] == pytest.approx(0.1, rel=0.03) and light[99, 30] < 0.002


def test_cameras_differ_in_green_by_up_to_the_tint() -> None:
    grey = np.full((8, 8, 3), 200, dtype=np.uint8)
    tinted = PLAIN.model_copy(update={"tint": 0.2})
    plain = to_linear(night(grey, optics=PLAIN))[0, 0]
    made = np.array([to_linear(night(grey, optics=tinted, seed=seed))[0, 0] for seed in range(200)]) / plain
    assert np.all(made[:, [0, 2]] == 1)  # 8-bit values are 2 % apart here, twice
    assert made[:, 1].min() == pytest.approx(0.8, abs=0.04) and made[:, 1].max() == pytest.approx(1.2, abs=0.04)


@pytest.mark.parametrize("wrong", [{"sky": (0.5, 0.1)}, {"sky": (-0.1, 0.1)}, {"glow": (0.2, 0.1)}])
def test_ranges_of_light_go_from_low_to_high(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="low to high"):
        PhotometricTranslator.model_validate({"kind": "photometric", **wrong})
