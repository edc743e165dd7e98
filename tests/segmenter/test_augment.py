"""Image and label move together: the label is written into the image, and must still be there afterwards."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from nightseg.segmenter.augment import Wanted, augment, resize_image, resize_label, sample_rng
from nightseg.segmenter.settings import Augmentation

FILL = (1, 2, 3)


def still(scale: tuple[float, float] = (1.0, 1.0), flip: float = 0.0, **strengths: float) -> Augmentation:
    """Nothing moves or changes but what is asked for."""
    return Augmentation(scale=scale, flip=flip, **strengths)


def coded(height: int, width: int, block: int = 8) -> tuple[Tensor, Tensor]:
    """A label of blocks, and an image whose every channel is 10 times the label."""
    blocks = np.random.default_rng(0).integers(0, 20, (-(-height // block), -(-width // block)), dtype=np.uint8)
    label = torch.from_numpy(np.kron(blocks, np.ones((block, block), np.uint8))[:height, :width].copy())
    return (label * 10)[None].repeat(3, 1, 1), label


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.3, 0.6), (0.5, 2.0), (2.0, 4.0)])
@pytest.mark.parametrize("crop", [(40, 56), (64, 96), (200, 120)])
def test_image_and_label_stay_aligned(scale: tuple[float, float], crop: tuple[int, int]) -> None:
    image, label = coded(128, 192, block=32)
    settings = Augmentation(scale=scale, flip=0.5)
    for index in range(12):
        moved, moved_label = augment(image, label, sample_rng(3, 0, 0, index), crop=crop, settings=settings, fill=FILL)
        assert moved.shape == (3, *crop)
        assert moved_label.shape == crop
        assert moved.dtype == moved_label.dtype == torch.uint8
        padded = moved_label == 255
        assert (moved[:, padded] == torch.tensor(FILL)[:, None]).all()
        # Bilinear mixes neighbours at block borders; away from them the image says exactly what the label says.
        inside = ~padded & _far_from_borders(moved_label, 2 if scale[1] <= 2 else 3)
        assert inside.any()
        assert torch.equal(moved[0][inside], moved_label[inside] * 10)


def _far_from_borders(label_HW: Tensor, distance: int) -> Tensor:
    values = label_HW.float()[None, None]
    size = 2 * distance + 1
    highest = torch.nn.functional.max_pool2d(values, size, 1, distance)
    lowest = -torch.nn.functional.max_pool2d(-values, size, 1, distance)
    return (highest == lowest)[0, 0]


@pytest.mark.parametrize(
    "scale", [Fraction(1, 2), Fraction(3, 4), Fraction(1), Fraction(3, 2), Fraction(2), Fraction(4)]
)
def test_cutting_before_scaling_is_scaling_before_cutting(scale: Fraction) -> None:
    """Where the cut falls between pixels of the scaled frame, so that there is something to compare with."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 96, 144), dtype=np.uint8))  # noise: the hardest case
    label = torch.from_numpy(rng.integers(0, 19, (96, 144), dtype=np.uint8))
    whole_size = (int(96 * scale), int(144 * scale))
    whole, whole_label = resize_image(image, whole_size), resize_label(label, whole_size)
    crop, ring, compared = (36, 48), max(1, math.ceil(scale / 2)), 0
    for index in range(300):
        draws = sample_rng(0, 0, 0, index)
        draws.random(5)  # scale, flip, colours
        taken = [int(draws.random() * (side - cut / scale + 1)) for side, cut in zip((96, 144), crop, strict=True)]
        if any((start * scale).denominator > 1 for start in taken):
            continue
        compared += 1
        settings = still(scale=(float(scale), float(scale)))
        found, found_label = augment(image, label, sample_rng(0, 0, 0, index), crop=crop, settings=settings)
        top, left = (int(start * scale) for start in taken)
        expected = whole[:, top : top + crop[0], left : left + crop[1]]
        apart = (found.int() - expected.int()).abs()
        assert apart[:, ring:-ring, ring:-ring].max() <= 1
        if scale == 1:
            assert torch.equal(found, expected)
        assert torch.equal(found_label, whole_label[top : top + crop[0], left : left + crop[1]])
    assert compared >= 15


def test_views_do_not_depend_on_how_a_frame_lies_in_memory() -> None:
    """Decoders give pixels, cached frames are pixels; tensors made by hand are planes."""
    planes = torch.randint(0, 256, (3, 70, 110), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    label = torch.zeros((70, 110), dtype=torch.uint8)
    settings = Augmentation(brightness=0.3, contrast=0.3, saturation=0.3, noise=0.1)
    for index in range(20):
        first, second = (
            augment(image, label, sample_rng(0, 0, 0, index), crop=(40, 60), settings=settings)[0]
            for image in (planes, pixels)
        )
        assert torch.equal(first, second)
    assert torch.equal(resize_image(planes, (31, 47)), resize_image(pixels, (31, 47)))


def test_labels_are_never_interpolated() -> None:
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 32:] = 18
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    settings = Augmentation(scale=(0.4, 3.0), flip=0.5)
    seen: set[int] = set()
    for index in range(20):
        _, moved = augment(image, label, sample_rng(0, 0, 0, index), crop=(48, 48), settings=settings)
        seen |= set(moved.flatten().tolist())
    assert seen <= {0, 18, 255}


def test_a_frame_smaller_than_the_crop_is_padded_with_ignore_and_fill() -> None:
    image, label = coded(16, 16)
    moved, moved_label = augment(image, label, sample_rng(0, 0, 0, 0), crop=(32, 40), settings=still(), fill=FILL)
    assert int((moved_label != 255).sum()) == 16 * 16
    assert moved_label[moved_label != 255].tolist() == label.flatten().tolist()
    assert (moved[:, moved_label == 255] == torch.tensor(FILL)[:, None]).all()


def test_nothing_drawn_changes_nothing() -> None:
    image, label = coded(32, 48)
    moved, moved_label = augment(image, label, sample_rng(0, 0, 0, 0), crop=(32, 48), settings=still())
    assert torch.equal(moved, image)
    assert torch.equal(moved_label, label)


def test_a_flip_is_a_mirror() -> None:
    image, label = coded(32, 48)
    moved, moved_label = augment(image, label, sample_rng(0, 0, 0, 0), crop=(32, 48), settings=still(flip=1.0))
    assert torch.equal(moved, image.flip(-1))
    assert torch.equal(moved_label, label.flip(-1))


def test_the_same_generator_gives_the_same_view_and_others_give_others() -> None:
    image, label = coded(64, 96)
    settings = Augmentation(scale=(0.5, 2.0), flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, noise=0.1)

    def view(*key: int) -> Tensor:
        return augment(image, label, sample_rng(*key), crop=(32, 32), settings=settings)[0]

    assert torch.equal(view(1, 2, 0, 3), view(1, 2, 0, 3))
    for other in ((2, 2, 0, 3), (1, 3, 0, 3), (1, 2, 1, 3), (1, 2, 0, 4)):
        assert not torch.equal(view(1, 2, 0, 3), view(*other))


def test_colour_moves_the_image_only_and_not_its_geometry() -> None:
    image, label = coded(32, 48)
    plain = still(flip=0.5)
    coloured = still(flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4)
    for index in range(6):
        rngs = [sample_rng(0, 0, 0, index) for _ in range(2)]
        _, expected = augment(image, label, rngs[0], crop=(32, 48), settings=plain)
        moved, moved_label = augment(image, label, rngs[1], crop=(32, 48), settings=coloured)
        assert torch.equal(moved_label, expected)
        assert not torch.equal(moved[0], expected * 10)


@pytest.mark.parametrize("chosen", list(itertools.product((False, True), repeat=3)))
def test_colours_are_those_of_torchvision_bit_for_bit(chosen: tuple[bool, bool, bool]) -> None:
    image = torch.randint(0, 256, (3, 150, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    strengths = {name: 0.6 * on for name, on in zip(("brightness", "contrast", "saturation"), chosen, strict=True)}
    for index in range(5):
        draws = sample_rng(0, 0, 0, index).random(5)[2:]
        expected = image
        for (name, strength), draw in zip(strengths.items(), draws, strict=True):
            if strength:
                expected = getattr(functional, f"adjust_{name}")(expected, 1 + strength * (2 * draw - 1))
        found, _ = augment(image, image[0], sample_rng(0, 0, 0, index), crop=(150, 90), settings=still(**strengths))
        assert torch.equal(found, expected)


def test_resize_keeps_native_when_asked_and_agrees_between_image_and_label() -> None:
    image, label = coded(64, 96)
    assert resize_image(image, None) is image
    assert resize_label(label, None) is label
    small, small_label = resize_image(image, (32, 48)), resize_label(label, (32, 48))
    assert small_label.shape == (32, 48)
    inside = _far_from_borders(small_label, 1)
    assert torch.equal(small[0][inside], small_label[inside] * 10)


def test_noise_is_of_the_drawn_strength_and_leaves_label_and_other_draws_alone() -> None:
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    label = torch.zeros((64, 64), dtype=torch.uint8)
    deviations = []
    for index in range(60):
        noisy, same = augment(image, label, sample_rng(0, 0, 0, index), crop=(64, 64), settings=still(noise=0.1))
        deviations.append(float(noisy.float().std()))
        assert torch.equal(same, label) and abs(float(noisy.float().mean()) - 128) < 2
    assert max(deviations) < 26 and min(deviations) < 3 and abs(np.mean(deviations) - 25.5 / 2) < 3
    plain = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    views = [
        augment(
            plain, label[:40, :40], sample_rng(0, 0, 0, 7), crop=(20, 20), settings=still(scale=(0.8, 1.5), noise=n)
        )
        for n in (0.0, 1e-6)
    ]
    assert torch.equal(views[0][0], views[1][0])


def test_an_image_shrinks_to_a_single_pixel_its_mean() -> None:
    for height, width in ((1, 1), (2, 1), (2, 2), (2, 40)):
        image = torch.arange(3 * height * width, dtype=torch.uint8).reshape(3, height, width)
        made = resize_image(image, (1, 1))
        # The filter is symmetric, and so are the values around their mean.
        assert made.dtype == torch.uint8 and (made[:, 0, 0] - image.float().mean((1, 2))).abs().max() <= 0.5 + 1e-4


def test_a_crop_shows_the_class_that_it_should_if_ten_draws_find_it() -> None:
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:16, :16] = 3
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    settings = Augmentation(scale=(1.0, 1.0), flip=0.0)

    def share(shows: Wanted | None) -> float:
        views = (augment(image, label, sample_rng(0, 0, 0, i), crop=(32, 32), settings=settings, shows=shows)
                 for i in range(200))  # fmt: skip
        return sum(int((view[1] == 3).sum()) >= 102 for view in views) / 200

    plain, sought = share(None), share(Wanted(3, 0.1))
    assert 0 < plain < 0.5  # a tenth of the crop lies in the corner in some draws
    assert sought > 1 - (1 - plain) ** 10 - 4 * (plain / 200) ** 0.5  # one of ten; four standard deviations
    assert share(Wanted(5, 0.1)) < 0.5  # what no crop shows is not sought for ever


def test_a_tone_curve_keeps_black_and_white_and_the_exponent_is_in_powers_of_two() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, None]
    found = {
        int(augment(image, torch.zeros(1, 256, dtype=torch.uint8), sample_rng(0, 0, 0, i), crop=(1, 256),
                    settings=Augmentation(scale=(1.0, 1.0), flip=0.0, gamma=1.0))[0][0, 0, 128])
        for i in range(200)
    }  # fmt: skip
    darkest, brightest = 255 * (128 / 255) ** 2, 255 * (128 / 255) ** 0.5
    assert round(darkest) <= min(found) < 80 and 165 < max(found) <= round(brightest)


def test_a_blur_keeps_the_mean_and_spreads_an_edge() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 200
    label = torch.zeros(32, 32, dtype=torch.uint8)
    settings = Augmentation(scale=(1.0, 1.0), flip=0.0, blur=3.0)
    views = [augment(image, label, sample_rng(0, 0, 0, i), crop=(32, 32), settings=settings)[0] for i in range(20)]
    between = [int(((view > 0) & (view < 200)).sum()) for view in views]
    assert max(between) > 500
    assert all(abs(float(view.float().mean()) - 100) < 1 for view in views)  # rounding is half a grey level at most


@pytest.mark.parametrize("size", [(1, 40), (2, 40), (6, 6), (40, 1)])
def test_a_blur_wider_than_the_frame_reaches_as_far_as_there_are_pixels(size: tuple[int, int]) -> None:
    image, label = torch.full((3, *size), 7, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    settings = Augmentation(scale=(1.0, 1.0), flip=0.0, blur=16.0)
    for index in range(5):
        view, _ = augment(image, label, sample_rng(0, 0, 0, index), crop=(40, 40), settings=settings, fill=(7, 7, 7))
        assert bool((view == 7).all())
