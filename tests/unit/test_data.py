"""Unpaired crops: every frame once an epoch, the same batches for any number of workers, threads and restarts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nightseg.data.images import encode_png
from nightseg.storage import Location, UserError
from nightseg.unit import data
from nightseg.unit.data import FrameReader, FrameRef, UnpairedCrops, mix_seed


def write_frames(folder: Path, count: int, height: int = 12, width: int = 16) -> list[FrameRef]:
    """Frame k has red = k everywhere; green grows to the right."""
    refs = []
    for index in range(count):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0] = index
        image[..., 1] = np.arange(width)
        file = folder / f"{index}.png"
        Location.of(file).write_bytes(encode_png(image))
        refs.append(FrameRef(f"toy/{index}", str(file), height, width))
    return refs


def crops_of(folder: Path, **spread: int) -> UnpairedCrops:
    day = FrameReader(write_frames(folder / "day", 5), short_side=None, crop=(8, 8))
    night = FrameReader(write_frames(folder / "night", 3), short_side=None, crop=(8, 8))
    return UnpairedCrops(day, night, seed=1, batch=4, **spread)


def test_every_frame_is_used_once_an_epoch(tmp_path: Path) -> None:
    crops = crops_of(tmp_path)
    day = [int(red) for iteration in range(5) for red in crops.at(iteration)[0][:, 0, 0, 0]]
    night = [int(red) for iteration in range(3) for red in crops.at(iteration)[1][:, 0, 0, 0]]
    for start in range(0, 20, 5):
        assert sorted(day[start : start + 5]) == list(range(5))
    for start in range(0, 12, 3):
        assert sorted(night[start : start + 3]) == list(range(3))
    assert day[:5] != day[5:10] or day[5:10] != day[10:15]


def test_crops_are_uint8_contiguous_pieces_mirrored_half_the_time(tmp_path: Path) -> None:
    crops = crops_of(tmp_path)
    mirrored, lefts = 0, set()
    for iteration in range(50):
        day_B3HW, night_B3HW = crops.at(iteration)
        assert day_B3HW.shape == night_B3HW.shape == (4, 3, 8, 8)
        assert day_B3HW.dtype == torch.uint8
        assert day_B3HW.is_contiguous(memory_format=torch.channels_last)
        for row in day_B3HW[:, 1, 0].tolist():
            steps = {b - a for a, b in itertools.pairwise(row)}
            assert steps in ({1}, {-1})
            mirrored += steps == {-1}
            lefts.add(min(row))
    assert 70 < mirrored < 130
    assert lefts == set(range(9))


def test_batches_do_not_depend_on_workers_threads_memory_or_restarts(tmp_path: Path) -> None:
    whole = [crops_of(tmp_path).at(iteration) for iteration in range(6)]
    shared = [crops_of(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    for iteration, (day, _) in enumerate(whole):
        for rank in (0, 1):
            assert torch.equal(day[rank::2], shared[rank].at(iteration)[0])
    kept = crops_of(tmp_path)
    assert kept.keep_in_memory(threads=2)
    for file in tmp_path.rglob("*.png"):
        file.rename(file.with_suffix(".gone"))
    for (day, night), again in zip(whole[2:], kept.batches(2, 6, threads=0), strict=True):
        assert torch.equal(day, again[0]) and torch.equal(night, again[1])
    for (day, night), again in zip(whole, kept.batches(0, 6, threads=3), strict=True):
        assert torch.equal(day, again[0]) and torch.equal(night, again[1])


def test_frames_that_do_not_fit_in_memory_are_read_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 8 * 12 * 16 * 3 - 1)
    crops = crops_of(tmp_path)
    assert not crops.keep_in_memory(threads=1)
    assert len(list(crops.batches(0, 9, threads=2))) == 9


@pytest.mark.parametrize(
    ("size", "short_side", "crop", "expected"),
    [
        ((100, 200), None, (8, 8), (100, 200)),
        ((100, 200), 50, (8, 8), (50, 100)),
        ((200, 100), 50, (8, 8), (100, 50)),
        ((33, 77), 16, (16, 32), (16, 37)),
        ((10, 40), None, (20, 20), (20, 80)),  # smaller than the crop: enlarged until it fits
        ((100, 100), 10, (16, 32), (32, 32)),
    ],
)
def test_target_size(
    size: tuple[int, int], short_side: int | None, crop: tuple[int, int], expected: tuple[int, int]
) -> None:
    reader = FrameReader([], short_side=short_side, crop=crop)
    assert reader.target_size(*size) == expected
    plain = 1.0 if short_side is None else short_side / min(size)
    assert reader.is_too_small(*size) == any(round(plain * s) < c for s, c in zip(size, crop, strict=True))


def test_frames_are_resized_as_they_are_read(tmp_path: Path) -> None:
    refs = write_frames(tmp_path, 1, height=20, width=30)
    image = FrameReader(refs, short_side=10, crop=(8, 8)).image(0)
    assert image.shape == (10, 15, 3)
    with Image.open(refs[0].uri) as original:
        assert np.array_equal(image, np.asarray(original.resize((15, 10), Image.Resampling.BILINEAR)))


def test_a_bad_frame_is_named(tmp_path: Path) -> None:
    refs = write_frames(tmp_path, 2)
    Path(refs[1].uri).write_bytes(b"not an image")
    reader = FrameReader(refs, short_side=None, crop=(8, 8))
    with pytest.raises(UserError, match=r"toy/1 \(.*1\.png\) cannot be read any more: not_an_image"):
        reader.image(1)


def test_mixed_seeds_differ() -> None:
    seeds = {mix_seed(*numbers) for numbers in np.ndindex(3, 3, 3, 3)}
    assert len(seeds) == 81
    assert mix_seed(0, 1, 2, 3) == mix_seed(0, 1, 2, 3)
