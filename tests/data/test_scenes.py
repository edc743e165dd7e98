"""Procedural scenes: exact labels, one street in every domain, the same bytes in every process."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from nightseg.data.class_list import taxonomy
from nightseg.data.scenes import Scene, scene
from nightseg.data.scenes.light import DOMAINS
from nightseg.data.scenes.sheet import Camera, Label, Sheet, upright_plane
from nightseg.storage import UserError

NUM_CLASSES = 11


def digest(frame: Scene) -> str:
    return hashlib.sha256(frame.image.tobytes() + frame.label.tobytes()).hexdigest()


def luminance(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    red, green, blue = (image[..., band].astype(np.float64) for band in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("domain", DOMAINS)
def test_shapes_and_values(domain: str) -> None:
    image, label = scene(0, 5, domain)
    assert image.shape == (128, 256, 3) and image.dtype == np.uint8
    assert label.shape == (128, 256) and label.dtype == np.uint8
    assert label.max() < NUM_CLASSES
    assert image.flags.c_contiguous and label.flags.c_contiguous


def test_the_numbers_are_those_of_camvid11() -> None:
    names = [name.upper().replace(" ", "_") for name in taxonomy("camvid11").classes]
    assert [label.name for label in Label] == names and [int(label) for label in Label] == list(range(NUM_CLASSES))


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_arguments_same_bytes_in_another_process(domain: str) -> None:
    here = digest(scene(7, 11, domain, 64, 128))
    assert digest(scene(7, 11, domain, 64, 128)) == here
    program = (
        "import hashlib; from nightseg.data.scenes import scene;"
        f"s = scene(7, 11, {domain!r}, 64, 128);"
        "print(hashlib.sha256(s.image.tobytes() + s.label.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_seed_index_and_domain_all_matter() -> None:
    frames = [scene(0, 0, "day"), scene(1, 0, "day"), scene(0, 1, "day"), scene(0, 0, "night"), scene(0, 0, "twilight")]
    assert len({digest(frame) for frame in frames}) == len(frames)


@pytest.mark.parametrize("index", range(6))
def test_one_street_has_one_label_in_every_domain(index: int) -> None:
    labels = [scene(2, index, domain).label for domain in DOMAINS]
    assert np.array_equal(labels[0], labels[1]) and np.array_equal(labels[0], labels[2])


@pytest.mark.parametrize(("height", "width"), [(96, 160), (256, 512), (120, 160), (33, 47)])
def test_other_sizes(height: int, width: int) -> None:
    for domain in DOMAINS:
        image, label = scene(0, 3, domain, height, width)
        assert image.shape == (height, width, 3) and label.shape == (height, width)
        assert label.max() < NUM_CLASSES


def test_the_size_only_changes_how_finely_a_street_is_drawn() -> None:
    agreements = [
        np.mean(scene(4, index, "day").label == scene(4, index, "day", 256, 512).label[1::2, 1::2])
        for index in range(6)
    ]
    assert min(agreements) > 0.95


def test_every_class_appears() -> None:
    pixels = np.zeros(NUM_CLASSES, np.int64)
    frames_with = np.zeros(NUM_CLASSES, np.int64)
    for index in range(40):
        counts = np.bincount(scene(0, index, "day").label.ravel(), minlength=NUM_CLASSES)
        pixels += counts
        frames_with += counts > 0
    assert (frames_with >= 20).all(), frames_with
    assert pixels.min() / pixels.sum() > 0.005, pixels / pixels.sum()


def test_domains_are_ordered_by_brightness_but_overlap() -> None:
    mean = {
        domain: [luminance(scene(0, index, domain, 64, 128).image).mean() for index in range(40)] for domain in DOMAINS
    }
    assert np.mean(mean["night"]) + 15 < np.mean(mean["twilight"]) < np.mean(mean["day"]) - 15
    assert max(mean["night"]) > min(mean["twilight"])
    assert max(mean["twilight"]) > min(mean["day"])


def test_a_night_has_lights_of_its_own() -> None:
    """Lit windows, lamps and head lights: pixels that outshine the day frame of the very same street."""
    brighter = []
    for index in range(24):
        day, night = scene(0, index, "day"), scene(0, index, "night")
        gain = luminance(night.image) > luminance(day.image) + 25
        brighter.append([gain[night.label == Label.BUILDING].sum(), gain[night.label == Label.CAR].sum()])
    windows, cars = np.array(brighter).T
    assert np.mean(windows > 0) > 0.5 and np.mean(cars > 0) > 0.4
    assert np.median(windows) < 1500  # most of a facade stays dark


def test_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(UserError, match=r"'dusk'.*twilight"):
        scene(0, 0, "dusk")
    with pytest.raises(UserError, match="at least 32"):
        scene(0, 0, "day", 16, 256)
    with pytest.raises(UserError, match="index -1"):
        scene(0, -1, "day")


# -- the sheet -------------------------------------------------------------------------------------------------------


def sheet() -> Sheet:
    return Sheet(Camera(width=40, height=20, focal=20.0, center_x=20.0, horizon_y=10.0, eye=1.5, bend=0.0))


def test_projection() -> None:
    camera = sheet().camera
    assert camera.project(0.0, 1.5, 10.0) == (40.0, 20.0)  # eye height lies on the horizon
    assert camera.project(2.0, 0.0, 4.0) == (60.0, 35.0)  # sheet pixels are twice as fine
    assert camera.project(1.0, 0.0, -3.0) == camera.project(1.0, 0.0, 0.8)


def test_upright_plane_holds_both_points() -> None:
    for x0, z0, x1, z1 in ((5.0, 4.0, 5.0, 20.0), (-6.0, 3.0, -8.0, 30.0), (-3.0, 9.0, 3.0, 9.0)):
        a, b, c, d = upright_plane(x0, z0, x1, z1)
        assert b == 0.0 and d > 0.0
        assert a * x0 + c * z0 == pytest.approx(d) and a * x1 + c * z1 == pytest.approx(d)
        assert a * a + c * c == pytest.approx(1.0)


def test_a_stroke_draws_colour_and_label_together() -> None:
    page = sheet()
    card = page.card(Label.CAR, 0.0, 10.0, grain=0.06)
    card.box(-2.0, 0.5, 2.0, 2.5, (255, 0, 0))  # 16 to 24 across, 8 to 12 down, in pixels of the frame
    frame = page.finish()
    expected = np.zeros((20, 40), np.uint8)
    expected[8:12, 16:24] = Label.CAR
    assert np.array_equal(frame.label, expected)
    assert np.array_equal(frame.albedo[0] == 1.0, expected == Label.CAR)
    assert frame.sky[expected == 0].min() > 0.2 and frame.sky[9:11, 17:23].max() == 0.0
