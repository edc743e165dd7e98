"""Which frame lends its look: by layout, without a frame lending to itself, whatever the order of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nightseg.data.images import encode_png
from nightseg.errors import UserError
from nightseg.translators.style_images import Lender, LenderReader, Palette, layout, open_palette


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
    assert (described.mean(), described.std()) == pytest.approx((0, 1), abs=1e-5)
    cells = described.reshape(4, 8)
    assert (cells[:, :2] > cells[:, 3:].max()).all()
    dark = layout(textured("left", 0.25))
    assert np.abs(dark - described).max() < 0.2 < np.abs(layout(textured("right")) - described).max()
    assert not layout(np.full((9, 5, 3), 77, np.uint8)).any()


def test_the_nearest_layout_lends(tmp_path: Path) -> None:
    frames = save(tmp_path, left=textured("left", 0.3), right=textured("right", 0.3), top=textured("top", 0.3))
    palette = open_palette(frames, count=10, among=1, seed=0, what="dataset night")
    for where in ("left", "right", "top"):
        assert palette.choose(textured(where), "day/1").frame_id == f"night/{where}"
    drawn = {palette._replace(among=2).choose(textured("left"), f"day/{index}").frame_id for index in range(20)}
    assert len(drawn) == 2 and "night/left" in drawn
    everyone = {palette._replace(among=None).choose(textured("left"), f"day/{index}").frame_id for index in range(30)}
    assert len(everyone) == 3


def test_the_choice_follows_from_seed_and_frame(tmp_path: Path) -> None:
    frames = save(tmp_path, **{f"n{index}": textured("all", 0.1 * index) for index in range(1, 9)})
    first = open_palette(frames, count=4, among=None, seed=1, what="x")
    again = open_palette(frames[::-1], count=4, among=None, seed=1, what="x")
    assert [lender.frame_id for lender in first.lenders] == [lender.frame_id for lender in again.lenders]
    names = [[p.choose(textured("all"), f"day/{i}").frame_id for i in range(9)] for p in (first, again)]
    assert names[0] == names[1]
    other = open_palette(frames, count=4, among=None, seed=2, what="x")
    assert [lender.frame_id for lender in other.lenders] != [lender.frame_id for lender in first.lenders]


def test_a_frame_never_borrows_from_itself_nor_a_translation_from_its_source() -> None:
    flat = np.zeros(32, dtype=np.float32)
    palette = Palette((Lender("day/1", "/1", flat), Lender("day/11", "/11", flat)), None, 0)
    for own in ("day/1", "made/day/1"):
        assert {palette._replace(seed=seed).choose(textured("all"), own).frame_id for seed in range(8)} == {"day/11"}
    alone = Palette(palette.lenders[:1], 3, 0)
    assert alone.choose(textured("all"), "made/day/1").frame_id == "day/1"  # better than none


def test_frames_that_cannot_be_read_do_not_lend(tmp_path: Path) -> None:
    frames = save(tmp_path, good=textured("all"), bad=b"no image")
    palette = open_palette(frames, count=2, among=None, seed=0, what="dataset night")
    assert [lender.frame_id for lender in palette.lenders] == ["night/good"]
    with pytest.raises(UserError, match=r"dataset night: no frame of it can be read.*first of 1: .*bad\.png"):
        open_palette(frames[1:], count=2, among=None, seed=0, what="dataset night")
    with pytest.raises(UserError, match=r"no frame of it can be read, so there is no style image\. Cure: "):
        open_palette([], count=2, among=None, seed=0, what="dataset night")


def test_the_reader_keeps_the_latest_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nightseg.translators import style_images as module

    frames = save(tmp_path, **{f"n{index}": textured("all", 0.1 * index) for index in range(1, 5)})
    palette, read = open_palette(frames, count=4, among=None, seed=0, what="x"), LenderReader()
    image = read(palette.lenders[0])
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * image.nbytes)
    for lender in palette.lenders:
        read(lender)
    assert len(read._kept) == 2
    Path(palette.lenders[-1].uri).unlink()
    assert np.array_equal(read(palette.lenders[-1]), read._kept[palette.lenders[-1].uri])
    Path(palette.lenders[0].uri).unlink()
    with pytest.raises(UserError, match="this node cannot read the style image"):
        read(palette.lenders[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (400, 3)])
def test_frames_of_any_size_have_a_layout(size: tuple[int, int]) -> None:
    described = layout(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert described.shape == (32,) and np.isfinite(described).all()
