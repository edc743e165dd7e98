"""Folder layouts as lists of frames; on made-up trees always, on real data where it lies beside the project."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightseg.data.class_list import taxonomy
from nightseg.data.images import read_image, read_label
from nightseg.data.layouts import Candidate, count, fingerprint, list_frames, scene_domains
from nightseg.data.settings import FolderDataset
from nightseg.storage import Location, UserError

# Real frames, not part of the project; NIGHTSEG_DATA may point elsewhere.
DATA = Path(os.environ.get("NIGHTSEG_DATA", Path(__file__).parents[3] / "shared" / "data"))


def tree(root: Path, *files: str) -> Location:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not opened here")
    return Location.of(root)


def at(layout: Any, root: Location, **settings: Any) -> FolderDataset:
    return FolderDataset(layout=layout, root=root.uri, **settings)


def ids(candidates: list[Candidate]) -> list[str]:
    return [candidate.frame_id for candidate in candidates]


# -- camvid ----------------------------------------------------------------------------------------------------------


def test_camvid(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "train/images/Seq05VD_f2.JPG",
        "train/images/Seq05VD_f1.png",
        "train/images/lonely.png",
        "train/images/._lonely.png",
        "train/images/notes.txt",
        "train/labels/Seq05VD_f1.png",
        "train/labels/Seq05VD_f2.PNG",
        "val/images/x.png",
    )
    frames = list_frames(at("camvid", root, split="train", domain="day"), "day")
    assert ids(frames) == ["day/Seq05VD_f1", "day/Seq05VD_f2", "day/lonely"]
    assert frames[0] == Candidate(
        frame_id="day/Seq05VD_f1",
        uri=f"{tmp_path}/train/images/Seq05VD_f1.png",
        label_uri=f"{tmp_path}/train/labels/Seq05VD_f1.png",
        sequence="Seq05VD",
        domain="day",
        label_encoding="camvid12",
    )
    assert frames[1].label_uri == f"{tmp_path}/train/labels/Seq05VD_f2.PNG"
    assert frames[2].label_uri == f"{tmp_path}/train/labels/lonely.png", "named, so that it can be missed"
    assert frames[2].sequence is None
    assert list_frames(at("camvid", root / "train", domain="day"), "day") == frames
    assert count(at("camvid", root, split="train")) == 3 and count(at("camvid", root, split="train", limit=2)) == 2
    assert ids(list_frames(at("camvid", root, split="train", limit=2), "d")) == ["d/Seq05VD_f1", "d/Seq05VD_f2"]


def test_unlabelled_frames_need_no_label_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, "val/images/x.png")
    (frame,) = list_frames(at("camvid", root, split="val", labelled=False), "d")
    assert frame.label_uri is None and frame.label_encoding is None
    with pytest.raises(UserError, match=r"no label folder .*val/labels.*labelled: false"):
        list_frames(at("camvid", root, split="val"), "d")


def test_encoding_can_be_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "images/x.png", "labels/x.png")
    (frame,) = list_frames(at("camvid", root, label_encoding="train_ids"), "d")
    assert frame.label_encoding == "train_ids"


# -- cityscapes and nighttime driving --------------------------------------------------------------------------------


def cityscapes(root: Path, *suffixes: str, kind: str = "gtFine", split: str = "val") -> Location:
    for city, number in (("ulm", 2), ("aachen", 1)):
        stem = f"{split}/{city}/{city}_{number}_"
        tree(root, f"leftImg8bit/{stem}leftImg8bit.png", *(f"{kind}/{stem}{kind}_{suffix}.png" for suffix in suffixes))
    return Location.of(root)


def test_cityscapes_pairs_label_ids(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, "labelIds", "labelTrainIds", "color", "instanceIds")
    frames = list_frames(at("cityscapes", root, split="val"), "cs")
    assert ids(frames) == ["cs/aachen/aachen_1", "cs/ulm/ulm_2"]
    assert frames[0].label_uri == f"{tmp_path}/gtFine/val/aachen/aachen_1_gtFine_labelIds.png"
    assert (frames[0].sequence, frames[0].label_encoding, frames[0].domain) == ("aachen", "label_ids", "unknown")
    chosen = list_frames(at("cityscapes", root, split="val", label_encoding="train_ids"), "cs")
    assert chosen[1].label_uri == f"{tmp_path}/gtFine/val/ulm/ulm_2_gtFine_labelTrainIds.png"


def test_cityscapes_with_train_ids_only_and_with_coarse_labels_only(tmp_path: Path) -> None:
    frames = list_frames(at("cityscapes", cityscapes(tmp_path / "a", "labelTrainIds"), split="val"), "cs")
    assert {frame.label_encoding for frame in frames} == {"train_ids"}
    root = cityscapes(tmp_path / "b", "labelIds", kind="gtCoarse", split="train_extra")
    frames = list_frames(at("cityscapes", root, split="train_extra"), "cs")
    assert frames[0].label_uri == f"{tmp_path}/b/gtCoarse/train_extra/aachen/aachen_1_gtCoarse_labelIds.png"


def test_cityscapes_cities_may_be_links(tmp_path: Path) -> None:
    root = cityscapes(tmp_path / "real", "labelIds")
    linked = tmp_path / "linked"
    for kind in ("leftImg8bit", "gtFine"):
        (linked / kind / "val").mkdir(parents=True)
        (linked / kind / "val" / "ulm").symlink_to(root.local / kind / "val" / "ulm")
    assert ids(list_frames(at("cityscapes", Location.of(linked), split="val"), "cs")) == ["cs/ulm/ulm_2"]


def test_nighttime_driving(tmp_path: Path) -> None:
    stem = "test/night/0_GOPR0356_frame_000321_"
    root = tree(
        tmp_path,
        f"leftImg8bit/{stem}leftImg8bit.png",
        f"gtCoarse_daytime_trainvaltest/{stem}gtCoarse_labelTrainIds.png",
        f"gtCoarse_daytime_trainvaltest/{stem}gtCoarse_labelIds.png",
    )
    (frame,) = list_frames(at("nighttime_driving", root), "nd")
    assert frame.frame_id == "nd/night/0_GOPR0356_frame_000321"
    assert frame.label_uri == f"{tmp_path}/gtCoarse_daytime_trainvaltest/{stem}gtCoarse_labelTrainIds.png"
    assert (frame.label_encoding, frame.domain, frame.sequence) == ("train_ids", "night", "night")
    (frame,) = list_frames(at("nighttime_driving", root, split="test", domain="twilight"), "nd")
    assert frame.domain == "twilight", "what the recipe says wins over the folder's name"


# -- plain folders and names -----------------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    root = tree(tmp_path, "b/c/2.PNG", "a.JpG", "b/1.jpeg", "b/readme.md", ".thumbs/a.png", "b/.hidden.png")
    frames = list_frames(at("images", root, labelled=True), "pool")
    assert ids(frames) == ["pool/a", "pool/b/1", "pool/b/c/2"]
    assert [frame.sequence for frame in frames] == [None, "b", "b/c"]
    assert all(frame.label_uri is None and frame.label_encoding is None for frame in frames)
    assert ids(list_frames(at("images", root, split="b"), "pool")) == ["pool/1", "pool/c/2"]


def test_names_with_spaces_letters_and_dots(tmp_path: Path) -> None:
    root = tree(tmp_path, "Straße bei Nacht.png", "夜 1.v2.png")
    frames = list_frames(at("images", root), "d")
    assert ids(frames) == ["d/Straße bei Nacht", "d/夜 1.v2"]
    assert frames[0].uri == f"{tmp_path}/Straße bei Nacht.png" and not frames[0].problem


def test_names_that_collide_keep_their_suffix(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.png", "a.jpg", "a.png.jpg", "b.png")
    assert ids(list_frames(at("images", root), "d")) == ["d/a.jpg", "d/a.png", "d/a.png.jpg", "d/b"]


def test_names_no_table_can_hold_are_listed_as_a_problem(tmp_path: Path) -> None:
    root = tree(tmp_path, "good.png", "back\\slash.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as stream:
        stream.write(b"latin-1")
    frames = {frame.frame_id: frame for frame in list_frames(at("images", root), "d")}
    assert frames["d/good"].problem == ""
    assert "UTF-8" in frames["d/caf\\udce9"].problem and "backslash" in frames["d/back\\slash"].problem
    for frame in frames.values():
        frame.uri.encode(), frame.problem.encode()
    assert count(at("images", root)) == 3 and len(fingerprint(at("images", root))) == 64


# -- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/images/a.png", "train/labels/a.png", "empty/images/readme.md", "leftImg8bit/val/x")
    for layout, where, split, message in (
        ("camvid", root / "nowhere", "", "no such folder: .*nowhere"),
        ("camvid", root, "trian", "unknown split 'trian', did you mean 'train'.*has empty, leftImg8bit, train"),
        ("camvid", root, "leftImg8bit", "no such folder: .*leftImg8bit/images"),
        ("camvid", root, "empty", "no image in .*empty/images"),
        ("camvid", root, "../x", "leads out"),
        ("cityscapes", root, "", "a split is needed; .*leftImg8bit has val"),
        ("images", root / "empty", "", "no image in"),
    ):
        for ask in (lambda dataset: list_frames(dataset, "d"), count, fingerprint):
            with pytest.raises(UserError, match=message):
                ask(at(layout, where, split=split, labelled=False))


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_what_is_read_and_only_then(tmp_path: Path) -> None:
    root = tree(tmp_path, "images/a.png", "labels/a.png")
    labelled, images = fingerprint(at("camvid", root)), fingerprint(at("camvid", root, labelled=False))
    tree(tmp_path, "images/readme.txt", "other/b.png")
    assert fingerprint(at("camvid", root)) == labelled
    (tmp_path / "labels/a.png").write_bytes(b"longer than before, by far")
    assert fingerprint(at("camvid", root)) != labelled and fingerprint(at("camvid", root, labelled=False)) == images
    os.utime(tmp_path / "images/a.png", ns=(1, 1))
    touched = fingerprint(at("camvid", root, labelled=False))
    (tmp_path / "images/a.png").rename(tmp_path / "images/b.png")
    assert len({images, touched, fingerprint(at("camvid", root, labelled=False))}) == 3


# -- domains of scenes -----------------------------------------------------------------------------------------------


def test_shares_are_exact_and_interleaved() -> None:
    assert scene_domains({"night": 0.5, "day": 0.5}, 0, 6) == ["day", "night"] * 3
    domains = scene_domains({"day": 0.4, "night": 0.4, "twilight": 0.2}, 0, 100)
    assert Counter(domains) == {"day": 40, "night": 40, "twilight": 20}
    assert Counter(domains[50:60]) == {"day": 4, "night": 4, "twilight": 2}
    assert scene_domains({"night": 1.0}, 7, 3) == ["night"] * 3


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any), st.integers(0, 50))
def test_every_prefix_has_its_share_to_less_than_one_scene(weights: list[int], first: int) -> None:
    mix = {name: weight / sum(weights) for name, weight in zip(("day", "night", "twilight"), weights, strict=True)}
    domains = scene_domains(mix, 0, 200)
    given_out = dict.fromkeys(mix, 0)
    for number, domain in enumerate(domains, start=1):
        given_out[domain] += 1
        assert all(abs(given_out[name] - share * number) < 1 for name, share in mix.items())
    assert scene_domains(mix, first, 60) == domains[first : first + 60], "a function of the index only"
    assert Counter(domains[: sum(weights)]) == Counter(
        {name: weight for name, weight in zip(mix, weights, strict=True) if weight}
    )


# -- real data -------------------------------------------------------------------------------------------------------


def real(name: str) -> Location:
    if not (DATA / name).is_dir():
        pytest.skip(f"needs the real frames of {DATA / name}")
    return Location.of(DATA / name)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_cityscapes(split: str) -> None:
    root = real("cityscapes_sample")
    if not (root / "leftImg8bit" / split).is_folder():
        pytest.skip(f"the sample has no {split}")
    classes = taxonomy("cityscapes19")
    frames = list_frames(at("cityscapes", root, split=split, domain="day"), "cs")
    for frame in frames:
        image, label = read_image(Location.of(frame.uri)), read_label(Location.of(frame.label_uri or ""))
        assert image.shape == (1024, 2048, 3) and label.shape == (1024, 2048)
        train_ids = classes.to_train_ids(label, frame.label_encoding or "")
        assert set(train_ids.ravel()) <= {*range(19), 255} and (train_ids == 0).any(), "road is in every frame"


def test_a_frame_never_takes_the_label_of_another(tmp_path: Path) -> None:
    names = [f"{kind}/{stem}.png" for kind in ("images", "labels") for stem in ("cam", "cam_color", "cam_instance")]
    root = tree(tmp_path, *names, "images/x_color.png", "images/x.png", "labels/x.png")
    labels = {frame.uri: frame.label_uri for frame in list_frames(at("camvid", root), "day")}
    for stem in ("cam", "cam_color", "cam_instance", "x", "x_color"):
        assert labels[f"{tmp_path}/images/{stem}.png"] == f"{tmp_path}/labels/{stem}.png"  # the last is not there


def test_real_camvid() -> None:
    root, classes = real("camvid"), taxonomy("camvid11")
    assert [count(at("camvid", root / "day", split=split)) for split in ("train", "val", "test")] == [305, 101, 171]
    frames = list_frames(at("camvid", root / "day", split="val", limit=25), "day")
    for frame in frames:
        image, label = read_image(Location.of(frame.uri)), read_label(Location.of(frame.label_uri or ""))
        assert image.shape == (360, 480, 3) and label.shape == (360, 480)
        classes.to_train_ids(label, frame.label_encoding or "")
    dusk = list_frames(at("camvid", root / "dusk", split="unlabelled", labelled=False), "dusk")
    assert len(dusk) == 62 and {frame.sequence for frame in dusk} == {"0001TP"}


def test_real_street() -> None:
    frames = list_frames(at("images", real("street")), "street")
    assert len(frames) == sum(file.is_file() for file in (DATA / "street").glob("*.*g"))
    for frame in frames[::25]:
        assert read_image(Location.of(frame.uri)).shape[2] == 3
