import numpy as np
import pytest

from nightseg.data.day_night import Separation, Tone, luminance, luminance_histogram, separate, tone_of, whole

HEIGHT, WIDTH = 90, 160


def street(sky: float, ground: float, seed: int, gain: float = 1.0, lift: float = 0.0, lamps: int = 12) -> np.ndarray:
    """A sky and a street of these mean luminances in [0, 1], with noise and lamps, and a camera's gain and lift."""
    rng = np.random.default_rng(seed)
    rows = np.where(np.arange(HEIGHT) < HEIGHT / 3, sky, ground)[:, None]
    scene = np.clip(rows + rng.normal(0, 0.08, (HEIGHT, WIDTH)), 0, 1)
    scene[rng.integers(0, HEIGHT, lamps), rng.integers(0, WIDTH, lamps)] = 1.0
    tint = np.array([1.0, 0.95, 0.85])
    return (np.clip(scene * gain + lift, 0, 1)[..., None] * tint * 255).astype(np.uint8)


def day(seed: int, **camera: float) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000)
    return street(rng.uniform(0.7, 0.95), rng.uniform(0.25, 0.5), seed, **camera)  # type: ignore[arg-type]


def night(seed: int, **camera: float) -> np.ndarray:
    rng = np.random.default_rng(seed + 2000)
    return street(rng.uniform(0.02, 0.1), rng.uniform(0.2, 0.35), seed, lamps=60, **camera)  # type: ignore[arg-type]


def verdict(images: list[np.ndarray], **options: float) -> Separation:
    tones = [tone_of(image) for image in images]
    return separate(np.array([tone.bands for tone in tones]), [tone.chroma for tone in tones], **options)


# -- histograms ------------------------------------------------------------------------------------------------------


def test_luma_of_the_primaries() -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], dtype=np.uint8)
    assert luminance(primaries).tolist() == [[76, 149, 28, 255, 0]]


def test_half_black_half_white() -> None:
    image = np.zeros((6, 4, 3), dtype=np.uint8)
    image[:, 2:] = 255
    histogram = luminance_histogram(image)
    assert histogram.shape == (64,) and histogram.dtype == np.float32
    assert histogram[0] == histogram[63] == 0.5 and histogram.sum() == 1


def test_bands_are_the_upper_third_and_the_rest() -> None:
    image = np.zeros((9, 4, 3), dtype=np.uint8)
    image[:3] = 255
    tone = tone_of(image)
    assert tone.bands[0, 63] == 1 and tone.bands[1, 0] == 1
    assert whole(tone.bands)[63] == pytest.approx(1 / 3)
    assert tone.chroma == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (1080, 1920)])
def test_any_size_has_a_histogram(size: tuple[int, int]) -> None:
    tone = tone_of(np.full((*size, 3), 200, dtype=np.uint8))
    assert tone.bands.sum(axis=1).tolist() == [1, 1]


def test_a_large_frame_is_sampled_and_means_the_same() -> None:
    small = day(1)
    large = small.repeat(12, axis=0).repeat(12, axis=1)
    assert np.abs(tone_of(large).bands - tone_of(small).bands).max() < 0.02


def test_what_is_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="uint8"):
        luminance_histogram(np.zeros((4, 4)))  # type: ignore[arg-type]


# -- day and night ---------------------------------------------------------------------------------------------------


def test_a_mixed_pool_comes_apart() -> None:
    got = verdict([day(i) for i in range(40)] + [night(i) for i in range(25)])
    assert got.domain == ["day"] * 40 + ["night"] * 25
    assert (got.score[:40] > 0.2).all() and (got.score[40:] < -0.2).all()
    assert (np.abs(got.score) <= 1).all() and np.array_equal(got.margin, np.abs(got.score))


def test_exposure_does_not_matter() -> None:
    # The night frames are brighter than the day frames: amplified, with lifted blacks.
    bright_nights = [night(i, gain=0.6, lift=0.4) for i in range(20)]
    dim_days = [day(i, gain=0.35) for i in range(20)]
    assert np.mean([image.mean() for image in bright_nights]) > np.mean([image.mean() for image in dim_days])
    got = verdict(dim_days + bright_nights)
    assert got.domain == ["day"] * 20 + ["night"] * 20


@pytest.mark.parametrize(("frames", "domain"), [(day, "day"), (night, "night")])
def test_a_pool_of_one_domain_stays_whole(frames: object, domain: str) -> None:
    for count in (1, 2, 200):
        got = verdict([frames(i) for i in range(count)])  # type: ignore[operator]
        assert got.domain == [domain] * count


def test_a_bright_sky_over_a_dark_street_is_twilight() -> None:
    dusk = [street(0.5, 0.04, seed, lamps=150) for seed in range(6)]
    got = verdict([day(i) for i in range(10)] + dusk + [night(i) for i in range(10)])
    assert got.domain[10:16] == ["twilight"] * 6
    assert (got.margin[10:16] == 0).all()


def test_a_larger_margin_leaves_more_out_and_changes_no_score() -> None:
    images = [street(sky, 0.3, seed, lamps=40) for seed, sky in enumerate(np.linspace(0.02, 0.95, 40))]
    few, many = verdict(images, margin=0.05), verdict(images, margin=0.5)
    assert np.array_equal(few.score, many.score)
    assert few.domain.count("twilight") < many.domain.count("twilight")
    assert verdict(images, margin=0.0).domain.count("twilight") <= few.domain.count("twilight")


def test_a_grey_frame_among_coloured_ones_is_unknown() -> None:
    grey = np.repeat(luminance(night(3))[..., None], 3, axis=2)
    got = verdict([day(0), night(0), night(1), grey])
    assert got.domain == ["day", "night", "night", "unknown"] and got.margin[3] == 0


def test_a_pool_of_grey_cameras_is_separated() -> None:
    grey = [np.repeat(luminance(image)[..., None], 3, axis=2) for image in (night(3), night(4), day(3))]
    assert verdict(grey).domain == ["night", "night", "day"]


def test_order_does_not_matter_and_runs_agree() -> None:
    images = [day(i) for i in range(12)] + [night(i) for i in range(12)]
    order = np.random.default_rng(0).permutation(24)
    one, again, mixed = verdict(images), verdict(images), verdict([images[i] for i in order])
    assert np.array_equal(one.score, again.score)
    np.testing.assert_allclose(mixed.score, one.score[order], atol=1e-9)
    assert mixed.domain == [one.domain[i] for i in order]


def test_extremes_have_a_score() -> None:
    flat = [np.full((30, 30, 3), value, dtype=np.uint8) for value in (0, 128, 255)]
    got = verdict(flat)
    assert np.isfinite(got.score).all() and (np.abs(got.score) <= 1).all()
    empty = separate(np.empty((0, 2, 64)), np.empty(0))
    assert empty.domain == [] and empty.score.shape == (0,)


def test_margin_is_a_fraction() -> None:
    with pytest.raises(ValueError, match="margin"):
        separate(np.empty((0, 2, 64)), np.empty(0), margin=1.5)


def test_tone_is_what_the_split_needs() -> None:
    assert Tone._fields == ("bands", "chroma")
