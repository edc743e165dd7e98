"""Order and augmentation follow from the seed alone; frames are decoded once; a changed frame is refused."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.data.images import decode_image, encode_png
from nightseg.data.table import frame_table
from nightseg.data.taxonomy import Taxonomy
from nightseg.segmenter import data as module
from nightseg.segmenter.augment import augment, sample_rng
from nightseg.segmenter.data import (
    Batch,
    InMemory,
    LabelledFrames,
    Part,
    Reading,
    Sampler,
    reading_threads,
    training_batches,
)
from nightseg.segmenter.settings import Augmentation, ClassSampling, Training
from nightseg.storage import Location, UserError, sha256_of

CLASSES = Taxonomy("three", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), {"raw": {7: 0, 8: 1, 9: 2, 0: 255}})


def write_frames(folder: Location, count: int, height: int = 24, width: int = 32) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        files = {
            "image": encode_png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            "label": encode_png(rng.integers(7, 10, (height, width), dtype=np.uint8)),
        }
        for kind, data in files.items():
            (folder / f"{kind}{index}.png").write_bytes(data)
        rows.append(
            {
                "frame_id": f"frame{index}",
                "uri": (folder / f"image{index}.png").uri,
                "label_uri": (folder / f"label{index}.png").uri,
                "label_encoding": "raw",
                "sha256": sha256_of(files["image"]),
                "label_sha256": sha256_of(files["label"]),
            }
        )
    return frame_table(rows)


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    return write_frames(Location.of(tmp_path), 6)


def labelled(rows: pa.Table, cache: int = 1 << 20, size: tuple[int, int] | None = None) -> LabelledFrames:
    return LabelledFrames(rows, CLASSES, size=size, resize_labels=True, cache=InMemory(cache))


def batches(
    frames: LabelledFrames, rank: int = 0, world_size: int = 1, threads: int = 1, **changed: Any
) -> list[Batch]:
    settings: dict[str, Any] = {"seed": 5, "epoch": 2, "fill": (0, 0, 0), **changed}
    parts = [Part.whole(len(frames))]
    order = Sampler(parts).epoch(10, settings["seed"], settings["epoch"])
    return list(
        training_batches(
            frames,
            parts,
            order,
            Training(batch=4, crop=(16, 16), augmentation=Augmentation(scale=(0.5, 2.0), flip=0.5)),
            Reading(rank, world_size, threads=threads, pin_memory=False, **settings),
        )
    )


def test_every_frame_is_drawn_once_before_any_is_drawn_again() -> None:
    order = Sampler([Part.whole(5)]).epoch(12, seed=0, epoch=0)
    assert len(order) == len(set(order)) == 12
    assert {sample.row for sample in order[:5]} == {sample.row for sample in order[5:10]} == set(range(5))
    assert Counter(sample.repeat for sample in order) == {0: 5, 1: 5, 2: 2}


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler = Sampler([Part.whole(50)])
    assert sampler.epoch(50, 1, 2) == Sampler([Part.whole(50)]).epoch(50, 1, 2)
    assert sampler.epoch(50, 1, 2) != sampler.epoch(50, 1, 3)
    assert sampler.epoch(50, 1, 2) != sampler.epoch(50, 2, 2)


def test_two_ranks_together_see_what_one_sees(rows: pa.Table) -> None:
    whole = batches(labelled(rows))
    halves = [batches(labelled(rows), rank=rank, world_size=2) for rank in range(2)]
    assert [len(batch.labels) for batch in whole] == [4, 4, 2]
    for one, even, odd in zip(whole, *halves, strict=True):
        assert torch.equal(one.images[0::2], even.images)
        assert torch.equal(one.images[1::2], odd.images)
        assert torch.equal(one.labels[1::2], odd.labels)


def test_threads_and_cache_change_nothing(rows: pa.Table) -> None:
    expected = batches(labelled(rows))
    for found in (batches(labelled(rows), threads=4), batches(labelled(rows, cache=0))):
        assert all(torch.equal(a.images, b.images) for a, b in zip(expected, found, strict=True))
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(expected, found, strict=True))


def test_batches_are_what_augmentation_of_each_frame_gives(rows: pa.Table) -> None:
    """Also in the memory layout that convolutions want; read ahead by threads or not."""
    frames, order = labelled(rows), Sampler([Part.whole(6)]).epoch(10, 5, 2)
    settings = Augmentation(scale=(0.5, 2.0), flip=0.5)
    found = batches(frames, threads=3)
    for place, sample in enumerate(order):
        rng = sample_rng(5, 2, sample.repeat, sample.entry)
        image, label = augment(*frames[sample.row], rng, crop=(16, 16), settings=settings, fill=(0, 0, 0))
        assert torch.equal(found[place // 4].images[place % 4], image)
        assert torch.equal(found[place // 4].labels[place % 4], label)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in found)


def test_a_frame_drawn_twice_is_augmented_twice(rows: pa.Table) -> None:
    first, second = (batches(labelled(rows.slice(0, 1)))[0].images[i] for i in range(2))
    assert not torch.equal(first, second)


def test_labels_are_train_ids_by_the_rows_encoding(rows: pa.Table) -> None:
    image, label = labelled(rows)[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 24, 32))
    assert set(label.flatten().tolist()) == {0, 1, 2}


def test_frames_and_labels_are_resized_or_the_frame_alone(rows: pa.Table) -> None:
    image, label = labelled(rows, size=(12, 16))[0]
    assert tuple(image.shape) == (3, 12, 16)
    assert tuple(label.shape) == (12, 16)
    native = LabelledFrames(rows, CLASSES, size=(12, 16), resize_labels=False, cache=InMemory(0))[0]
    assert tuple(native[1].shape) == (24, 32)


def test_frames_are_decoded_once_while_they_fit(rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(data: bytes) -> Any:
        decoded.append(1)
        return decode_image(data)

    monkeypatch.setattr(module, "decode_image", counted)
    one_frame = 24 * 32 * 4
    for cache, expected in ((6 * one_frame, 6), (2 * one_frame, 6 + 4), (0, 12)):
        decoded.clear()
        frames = labelled(rows, cache=cache)
        for index in [*range(6), *range(6)]:
            frames[index]
        assert len(decoded) == expected


def test_readers_work_on_one_core_each_and_the_training_keeps_its_threads(
    rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's number of threads belongs to the thread that asks, and new threads begin with what was set last."""
    seen: dict[str, set[int]] = {"readers": set(), "training": set()}

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        seen["readers"].add(torch.get_num_threads())
        return augment(*arguments, **settings)

    monkeypatch.setattr(module, "augment", watched)
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        frames = labelled(rows)
        parts = [Part.whole(6)]
        order = Sampler(parts).epoch(12, 0, 0)
        settings: dict[str, Any] = {"rank": 0, "world_size": 1, "seed": 0, "epoch": 0}
        settings |= {"fill": (0, 0, 0), "threads": 2, "pin_memory": False}
        for _ in training_batches(frames, parts, order, Training(batch=4, crop=(8, 8)), Reading(**settings)):
            seen["training"].add(torch.get_num_threads())
            late = ThreadPoolExecutor(1)
            seen["training"].add(late.submit(torch.get_num_threads).result())
            late.shutdown()
        seen["training"].add(torch.get_num_threads())
    finally:
        torch.set_num_threads(own)
    assert seen == {"readers": {1}, "training": {3}}


@pytest.mark.parametrize(
    ("cpus", "device", "threads"),
    [(1, "cpu", 1), (2, "cpu", 1), (16, "cpu", 4), (1, "cuda", 1), (6, "cuda", 5), (64, "cuda", 8)],
)
def test_readers_leave_the_cores_to_the_training(cpus: int, device: str, threads: int) -> None:
    assert reading_threads(cpus, device) == threads


def test_an_error_of_a_reader_ends_the_batches_and_its_threads(rows: pa.Table) -> None:
    Location.of(rows["uri"][3].as_py()).delete()
    with pytest.raises(UserError, match=r"frame3: missing"):
        batches(labelled(rows), threads=3)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("frames")]


def test_a_frame_that_is_not_what_was_collected_is_refused(rows: pa.Table) -> None:
    uri = rows["uri"][1].as_py()
    label_uri = rows["label_uri"][2].as_py()
    Location.of(uri).write_bytes(encode_png(np.zeros((24, 32, 3), np.uint8)))
    Location.of(label_uri).delete()
    frames = labelled(rows)
    with pytest.raises(UserError, match=r"(?s)frame1: .*has changed.*image1\.png"):
        frames[1]
    with pytest.raises(UserError, match=r"(?s)frame2: label_missing.*label2\.png"):
        frames[2]
    with pytest.raises(UserError, match="frame1"):
        batches(frames)


def test_a_label_value_outside_the_map_names_file_and_value(tmp_path: Path) -> None:
    rows = write_frames(Location.of(tmp_path), 1)
    data = encode_png(np.full((24, 32), 3, np.uint8))
    (Location.of(tmp_path) / "label0.png").write_bytes(data)
    changed = rows.set_column(rows.schema.get_field_index("label_sha256"), "label_sha256", [[sha256_of(data)]])
    with pytest.raises(UserError, match=r"(?s)frame0: label_value: .*3 \(768 pixels\).*label0\.png"):
        labelled(changed)[0]


# -- parts, weights, classes ------------------------------------------------------------------------------------------


def test_parts_have_their_shares_of_an_epoch_and_every_frame_comes_before_any_comes_again() -> None:
    sampler = Sampler([Part((0, 1, 2), 1.0), Part((3, 4), 2.0), Part((0, 1, 2), 1.0)])
    order = sampler.epoch(24, seed=1, epoch=0)
    assert Counter(sample.part for sample in order) == {0: 6, 1: 12, 2: 6}
    assert Counter(sample.entry for sample in order) == {0: 2, 1: 2, 2: 2, 3: 6, 4: 6, 5: 2, 6: 2, 7: 2}
    assert [sample.row for sample in order] == [[0, 1, 2, 3, 4, 0, 1, 2][sample.entry] for sample in order]
    assert len(set(order)) == 24  # no two are augmented alike
    assert [sample.part for sample in order] != sorted(sample.part for sample in order)
    assert order == sampler.epoch(24, seed=1, epoch=0) != sampler.epoch(24, seed=1, epoch=1)


@pytest.mark.parametrize(
    ("count", "weights", "shares"),
    [(10, [1, 1, 1], [4, 3, 3]), (8, [0.5, 0.25, 0.25], [4, 2, 2]), (1, [1, 3], [0, 1]), (7, [1, 2], [2, 5])],
)
def test_samples_are_shared_out_by_largest_remainders(count: int, weights: list[float], shares: list[int]) -> None:
    assert module.shares_of(count, weights).tolist() == shares


def test_without_weights_parts_are_one_set_and_drawn_as_ever() -> None:
    whole, parts = Sampler([Part.whole(6)]), Sampler([Part((0, 1)), Part((2, 3, 4, 5))])
    assert [(s.row, s.repeat, s.entry) for s in parts.epoch(9, 3, 1)] == [
        (s.row, s.repeat, s.entry) for s in whole.epoch(9, 3, 1)
    ]
    assert {sample.part for sample in parts.epoch(9, 3, 1) if sample.row < 2} == {0}


def test_rare_classes_are_drawn_as_often_as_the_softmax_says() -> None:
    pixels_NK = np.array([[90, 10, 0], [100, 0, 0], [70, 30, 0]])  # shares 260 / 300, 40 / 300, none
    likely = module.likely_classes(pixels_NK, temperature=0.5)
    exact = np.exp(np.array([40, 260]) / 300 / 0.5)
    assert likely == pytest.approx([*(exact / exact.sum()), 0.0], rel=1e-12)
    sampler = Sampler([Part.whole(3)], ClassSampling(temperature=0.5, min_share=0.2), pixels_NK)
    order = sampler.epoch(4000, seed=0, epoch=0)
    shown = Counter(sample.shows for sample in order)
    # Four standard deviations of a binomial count.
    assert abs(shown[1] - 4000 * likely[1]) < 4 * np.sqrt(4000 * likely[1] * likely[0])
    assert {sample.row for sample in order if sample.shows == 1} == {2}  # the only one with a fifth of it
    assert {sample.row for sample in order if sample.shows == 0} == {0, 1, 2}
    assert len({(sample.entry, sample.repeat) for sample in order}) == 4000


def test_a_part_whose_labels_were_not_counted_is_drawn_frame_by_frame() -> None:
    sampler = Sampler([Part((0,), 1.0), Part((1, 2), 1.0)], ClassSampling(), np.array([[5, 5], [0, 0], [0, 0]]))
    order = sampler.epoch(8, 0, 0)
    assert {sample.shows is None for sample in order if sample.part == 1} == {True}
    assert {sample.shows is None for sample in order if sample.part == 0} == {False}


def test_a_rendered_part_is_rendered_anew_with_every_sample_and_cropped_alike(rows: pa.Table) -> None:
    frames, seeds = labelled(rows), []

    def render(image: Any, label: Any, seed: int) -> Any:
        assert image.shape == (24, 32, 3) and label.shape == (24, 32)
        seeds.append(seed)
        return np.full_like(image, seed % 251)

    plain, rendered = [Part.whole(6)], [Part(tuple(range(6)), None, render)]
    order = Sampler(plain).epoch(12, 5, 2)
    settings = Training(batch=12, crop=(16, 16), augmentation=Augmentation(scale=(1.0, 2.0), flip=0.5))
    reading = Reading(0, 1, seed=5, epoch=2, fill=(0, 0, 0), threads=1, pin_memory=False)
    one, two = (next(training_batches(frames, parts, order, settings, reading)) for parts in (plain, rendered))
    assert torch.equal(one.labels, two.labels)  # the same crops
    assert len(set(seeds)) == 12
    assert two.images[:, 0, 0, 0].tolist() == [seed % 251 for seed in seeds]


def test_half_counted_parts_are_drawn_frame_by_frame_and_absent_classes_never() -> None:
    counted = np.array([[10, 0, 0], [-1, -1, -1], [0, 10, 0]])
    half = Sampler([Part((0, 1))], ClassSampling(), counted).epoch(6, 0, 0)
    assert Counter(sample.row for sample in half) == {0: 3, 1: 3} and all(sample.shows is None for sample in half)
    every = Sampler([Part((0, 2))], ClassSampling(min_share=0.0), counted).epoch(20, 0, 0)
    assert {(sample.row, sample.shows) for sample in every} == {(0, 0), (2, 1)}


def test_a_tiny_temperature_draws_the_rarest_class_alone() -> None:
    assert module.likely_classes(np.array([[97, 3, 0]]), temperature=1e-6).tolist() == [0.0, 1.0, 0.0]


def test_parts_without_a_frame_give_no_sample() -> None:
    for classes in (None, ClassSampling()):
        sampler = Sampler([Part((0, 1)), Part(())], classes, np.array([[5, 5], [5, 5]]))
        assert {sample.part for sample in sampler.epoch(6, 0, 0)} == {0}
