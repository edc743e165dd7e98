"""Mean brightness of blocks, and which frames look alike by it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nightseg.data.images import decode_image
from nightseg.data.scenes import scene
from nightseg.data.thumbnails import NUM_VALUES, num_near, thumbnail


@pytest.mark.parametrize("scale", [1, 3, 40])
def test_the_means_of_blocks_are_those_of_the_pixels(scale: int) -> None:
    """Also where rows and columns are left out, because blocks are flat."""
    blocks = np.arange(0, 128, 2, dtype=np.uint8).reshape(8, 8)
    image = np.repeat(np.repeat(blocks, 2 * scale, axis=0), 5 * scale, axis=1)[..., None].repeat(3, axis=2)
    assert thumbnail(image).tolist() == blocks.reshape(-1).tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (13, 200), (4000, 10)])
def test_any_size_has_one(size: tuple[int, int]) -> None:
    assert thumbnail(np.full((*size, 3), 9, np.uint8)).tolist() == [9] * NUM_VALUES


def test_scenes_saved_again_are_found_and_others_are_not() -> None:
    scenes = [scene(0, number, domain, 128, 256).image for number in range(12) for domain in ("day", "night")]
    seen = np.array([thumbnail(image) for image in scenes])

    def again(image: np.ndarray, quality: int) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return thumbnail(decode_image(file.getvalue()))

    for quality in (95, 75):
        assert num_near(seen, np.array([again(image, quality) for image in scenes])) == len(scenes)
    assert [num_near(np.delete(seen, number, axis=0), seen[number : number + 1]) for number in range(24)] == [0] * 24


def test_flat_frames_look_like_nothing_and_empty_sets_hold_nothing() -> None:
    flat = np.full((3, NUM_VALUES), 20, np.uint8)
    nothing = np.empty((0, NUM_VALUES), np.uint8)
    assert num_near(flat, flat) == num_near(nothing, flat) == num_near(flat, nothing) == 0
    steps = np.arange(NUM_VALUES, dtype=np.uint8)[None]
    assert num_near(steps, steps) == 1 and num_near(nothing, steps) == 0
    moved = steps.copy()
    moved[0, 5] += 3
    assert num_near(steps, moved) == 1
    moved[0, 5] += 1
    assert num_near(steps, moved) == 0
