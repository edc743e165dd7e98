"""Style images: by layout, never the frame itself, whatever the order of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nightseg.data.images import encode_png
from nightseg.errors import UserError
from nightseg.translators.style_images import StyleImage, StyleImageReader, StyleImages, draw_style_images, layout
from tests.rounding import assert_near


def textured(where: str, brightness: float = 1.0) -> np.ndarray:
    """A frame with structure in one part of it only."""
    image = np.full((64, 128, 3), 128.0)
    rough = np.random.default_rng(0).uniform(60, 200, (64, 128, 1))
    part = {"left": np.s_[:, :40], "right": np.s_[:, -40:], "top": np.s_[:20], "all": np.s_[:]}[where]
    image[part] = np.broadcast_to(rough, image.shape)[part]
    return np.clip(image * brightness, 0, 255).astype(np.uint8)


def save(folder: Path, **images: np.ndarray | bytes) -> list[tuple[str, str]]:
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image if isinstance(image, bytes) else encode_png(image))
    return [(f"night/{name}", str(folder / f"{name}.png")) for name in images]


def test_a_layout_says_where_structure_is_not_how_bright_it_is() -> None:
    described = layout(textured("left"))
    assert described.shape == (32,) and described.dtype == np.float32
    assert_near((described.mean(), described.std()), (0.0, 1.0), terms=4 * 32)  # means and deviations of 32 numbers
    cells = described.reshape(4, 8)
    assert (cells[:, :2] > cells[:, 3:].max()).all()
    dark = layout(textured("left", 0.25))
    assert np.abs(dark - described).max() < 0.2 < np.abs(layout(textured("right")) - described).max()
    assert not layout(np.full((9, 5, 3), 77, np.uint8)).any()


def test_the_nearest_layout_is_chosen(tmp_path: Path) -> None:
    frames = save(tmp_path, left=textured("left", 0.3), right=textured("right", 0.3), top=textured("top", 0.3))
    style_images = draw_style_images(frames, count=10, nearest=1, seed=0, what="dataset night")
    for where in ("left", "right", "top"):
        assert style_images.choose(textured(where), "day/1").frame_id == f"night/{where}"
    drawn = {style_images._replace(nearest=2).choose(textured("left"), f"day/{index}").frame_id for index in range(20)}
    assert len(drawn) == 2 and "night/left" in drawn
    everyone = {
        style_images._replace(nearest=None).choose(textured("left"), f"day/{index}").frame_id for index in range(30)
    }
    assert len(everyone) == 3


def test_the_choice_follows_from_seed_and_frame(tmp_path: Path) -> None:
    frames = save(tmp_path, **{f"n{index}": textured("all", 0.1 * index) for index in range(1, 9)})
    first = draw_style_images(frames, count=4, nearest=None, seed=1, what="x")
    again = draw_style_images(frames[::-1], count=4, nearest=None, seed=1, what="x")
    assert [image.frame_id for image in first.images] == [image.frame_id for image in again.images]
    names = [[p.choose(textured("all"), f"day/{i}").frame_id for i in range(9)] for p in (first, again)]
    assert names[0] == names[1]
    other = draw_style_images(frames, count=4, nearest=None, seed=2, what="x")
    assert [image.frame_id for image in other.images] != [image.frame_id for image in first.images]


def test_a_frame_is_never_its_own_style_image_nor_that_of_its_translation() -> None:
    flat = np.zeros(32, dtype=np.float32)
    style_images = StyleImages((StyleImage("day/1", "/1", flat), StyleImage("day/11", "/11", flat)), None, 0)
    for own in ("day/1", "made/day/1"):
        assert {style_images._replace(seed=seed).choose(textured("all"), own).frame_id for seed in range(8)} == {
            "day/11"
        }
    alone = StyleImages(style_images.images[:1], 3, 0)
    assert alone.choose(textured("all"), "made/day/1").frame_id == "day/1"  # better than none


def test_frames_that_cannot_be_read_are_no_style_images(tmp_path: Path) -> None:
    frames = save(tmp_path, good=textured("all"), bad=b"no image")
    style_images = draw_style_images(frames, count=2, nearest=None, seed=0, what="dataset night")
    assert [image.frame_id for image in style_images.images] == ["night/good"]
    with pytest.raises(UserError, match=r"dataset night: no frame of it can be read.*first of 1: .*bad\.png"):
        draw_style_images(frames[1:], count=2, nearest=None, seed=0, what="dataset night")
    with pytest.raises(UserError, match=r"no frame of it can be read, so there is no style image\. Cure: "):
        draw_style_images([], count=2, nearest=None, seed=0, what="dataset night")


def test_the_reader_keeps_the_latest_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nightseg.translators import style_images as module

    frames = save(tmp_path, **{f"n{index}": textured("all", 0.1 * index) for index in range(1, 5)})
    style_images, read = draw_style_images(frames, count=4, nearest=None, seed=0, what="x"), StyleImageReader()
    image = read(style_images.images[0].uri)
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * image.nbytes)
    for chosen in style_images.images:
        read(chosen.uri)
    assert len(read._kept) == 2
    Path(style_images.images[-1].uri).unlink()
    assert np.array_equal(read(style_images.images[-1].uri), read._kept[style_images.images[-1].uri])
    Path(style_images.images[0].uri).unlink()
    with pytest.raises(UserError, match="this node cannot read the style image"):
        read(style_images.images[0].uri)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (400, 3)])
def test_frames_of_any_size_have_a_layout(size: tuple[int, int]) -> None:
    described = layout(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert described.shape == (32,) and np.isfinite(described).all()
