"""Published data sets, on tiny trees of their official layouts; and pairs of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nightseg.data.layouts import PLACES, Candidate, check_folders, count, fingerprint, list_frames
from nightseg.data.settings import FolderDataset
from nightseg.storage import UserError
from tests.data.test_layouts import at, tree

DOMAINS = ("day", "night", "twilight")
KINDS = ("labelIds", "labelTrainIds", "labelColor", "invGray", "invIds")
Told = tuple[str, str | None, str, str | None, str | None]


def told(root: Path, frames: list[Candidate]) -> list[Told]:
    """(id, label below the root, domain, sequence, encoding) of each frame."""
    return [
        (one.frame_id, None if one.label_uri is None else one.label_uri.removeprefix(f"{root}/"), one.domain,
         one.sequence, one.label_encoding)
        for one in frames
    ]  # fmt: skip


def test_the_page_on_own_data_has_the_places_of_all_layouts() -> None:
    page = (Path(__file__).parents[2] / "docs/own-data.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    known = FolderDataset.model_json_schema()["properties"]["layout"]["enum"]
    assert set(PLACES) == set(known)
    for layout in known:
        for place in PLACES[layout]:
            assert "/" not in place or place in rows[layout], layout


def test_acdc(tmp_path: Path) -> None:
    files = [
        f"{kind}/{condition}/{split}/GOPR1/GOPR1_frame_1_{ending}.png"
        for condition in ("night", "fog")
        for split in ("train", "val")
        for kind, ending in (("rgb_anon", "rgb_anon"), *(("gt", f"gt_{one}") for one in KINDS))
    ]  # fmt: skip
    files.append("rgb_anon/night/train_ref/GOPR1/GOPR1_frame_1_rgb_ref_anon.png")
    root = tree(tmp_path, *files)
    night = list_frames(at("acdc", root, split="night/train"), "a")
    label = "night/train/GOPR1/GOPR1_frame_1_gt_labelTrainIds.png"
    assert told(tmp_path, night) == [("a/GOPR1/GOPR1_frame_1", f"gt/{label}", "night", "GOPR1", "train_ids")]
    both = list_frames(at("acdc", root, split="train"), "a")
    assert [(one.frame_id, one.domain) for one in both] == [
        ("a/fog/train/GOPR1/GOPR1_frame_1", "day"), ("a/night/train/GOPR1/GOPR1_frame_1", "night"),
    ]  # fmt: skip
    assert all(one.label_uri for one in both) and count(at("acdc", root, split="train")) == 2
    (reference,) = list_frames(at("acdc", root, split="night/train_ref", labelled=False), "a")
    assert reference.domain == "day", "references are frames of the same places by day"
    with pytest.raises(UserError, match="unknown split 'nigt/train'"):
        list_frames(at("acdc", root, split="nigt/train"), "a")
    ids = list_frames(at("acdc", root, split="night/val", label_encoding="label_ids"), "a")
    assert str(ids[0].label_uri).endswith("GOPR1_frame_1_gt_labelIds.png")


def test_dark_zurich(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        *(f"rgb_anon/train/{one}/GOPR{n}/GOPR{n}_frame_1_rgb_anon.png" for n, one in enumerate(DOMAINS)),
        "rgb_anon/val/night/GOPR0356/GOPR0356_frame_7_rgb_anon.png",
        *(f"gt/val/night/GOPR0356/GOPR0356_frame_7_gt_{one}.png" for one in KINDS),
    )  # fmt: skip
    pool = list_frames(at("dark_zurich", root, split="train", labelled=False), "z")
    assert sorted(one.domain for one in pool) == ["day", "night", "twilight"]
    (night,) = list_frames(at("dark_zurich", root, split="train/night", labelled=False), "z")
    assert (night.domain, night.sequence) == ("night", "GOPR1")
    label = "gt/val/night/GOPR0356/GOPR0356_frame_7_gt_labelTrainIds.png"
    assert told(tmp_path, list_frames(at("dark_zurich", root, split="val/night"), "z")) == [
        ("z/GOPR0356/GOPR0356_frame_7", label, "night", "GOPR0356", "train_ids")
    ]
    with pytest.raises(UserError, match=r"no label folder .*gt/train/night.*labelled: false"):
        list_frames(at("dark_zurich", root, split="train/night"), "z")


def test_bdd100k(tmp_path: Path) -> None:
    new = tmp_path / "new"
    root = tree(
        new,
        "images/10k/train/0a-1.jpg",
        "images/100k/train/0a-2.jpg",
        "labels/sem_seg/masks/train/0a-1.png",
        "labels/sem_seg/colormaps/train/0a-1.png",
    )
    label = "labels/sem_seg/masks/train/0a-1.png"
    frames = told(new, list_frames(at("bdd100k", root, split="train"), "b"))
    assert frames == [("b/0a-1", label, "unknown", None, "train_ids")]
    old = tmp_path / "seg"
    root = tree(old, "images/val/0a-1.jpg", "labels/val/0a-1_train_id.png", "color_labels/val/0a-1_train_color.png")
    frames = told(old, list_frames(at("bdd100k", root, split="val"), "b"))
    assert frames == [("b/0a-1", "labels/val/0a-1_train_id.png", "unknown", None, "train_ids")]


@pytest.mark.parametrize(
    ("image", "labels", "label"),
    [
        ("NightCity-images/images/val/N_1.png", "NightCity-label/label/val", "N_1_labelIds.png"),
        ("images/val/N_1.png", "labels/val", "N_1_trainIds.png"),
        ("images/val/N_1.png", "label/val", "N_1_labelTrainIds.png"),
        ("val/img/N_1.png", "val/lbl", "N_1_trainIds.png"),
    ],
)
def test_nightcity(tmp_path: Path, image: str, labels: str, label: str) -> None:
    root = tree(tmp_path, image, f"{labels}/{label}", f"{labels}/N_1_color.png", f"{labels}/N_1_instanceIds.png")
    encoding = "label_ids" if label.endswith("_labelIds.png") else "train_ids"
    frames = list_frames(at("nightcity", root, split="val"), "n")
    assert told(tmp_path, frames) == [("n/N_1", f"{labels}/{label}", "night", None, encoding)]


@pytest.mark.parametrize("labels", ["labels", "v1.2/labels"])
def test_mapillary(tmp_path: Path, labels: str) -> None:
    root = tree(tmp_path, "training/images/x_1.jpg", f"training/{labels}/x_1.png", "training/instances/x_1.png")
    frames = list_frames(at("mapillary", root, split="training"), "m")
    assert told(tmp_path, frames) == [("m/x_1", f"training/{labels}/x_1.png", "unknown", None, "ids")]


def test_nexet(tmp_path: Path) -> None:
    names = ("frame_1.jpg", "frame_2.jpg", "frame_3.jpg")
    root = tree(tmp_path, *(f"nexet_2017_1/{name}" for name in names))
    rows = [f"{name},{light},NYC" for name, light in zip(names, ("Day", "Night", "Twilight"), strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["image_filename,lighting,city", *rows]) + "\n")
    frames = list_frames(at("nexet", root, labelled=False), "n")
    assert [(one.frame_id, one.domain) for one in frames] == [
        ("n/nexet_2017_1/frame_1", "day"), ("n/nexet_2017_1/frame_2", "night"), ("n/nexet_2017_1/frame_3", "twilight"),
    ]  # fmt: skip
    (night,) = list_frames(at("nexet", root, split="night", labelled=False), "n")
    assert night.uri.endswith("frame_2.jpg")
    sorted_already = tmp_path / "sorted"
    root = tree(sorted_already, "day/1.jpg", "night/2.jpg", "night/a/3.jpg")
    frames = list_frames(at("nexet", root, labelled=False), "n")
    assert [(one.frame_id, one.domain) for one in frames] == [
        ("n/day/1", "day"),
        ("n/night/2", "night"),
        ("n/night/a/3", "night"),
    ]
    assert count(at("nexet", root, split="night", labelled=False)) == 2


# -- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "label", "settings"),
    [
        ("images/a.jpg", "labels/a.png", {}),
        ("images/a.JPG", "labels/a.tif", {}),
        ("rgb/a.webp", "masks/a_mask.png", {"images": "rgb", "labels": "masks/{name}_mask"}),
        ("rgb/s/a.jpg", "masks/s/a.png", {"images": "rgb", "labels": "masks"}),
        ("rgb/s/a.jpg", "masks/a.png", {"images": "rgb", "labels": "masks"}),
        ("rgb/a_rgb.png", "masks/a_gt.png", {"images": "rgb", "labels": "masks"}),
        ("rgb/a_rgb.png", "masks/a_gt.png", {"images": "rgb/{name}_rgb.png", "labels": "masks/{name}_gt.png"}),
        ("frames/a.jpg", "frames/a.png", {"images": "frames", "labels": "frames"}),
        ("frames/a.png", "frames/a_label.png", {"images": "frames", "labels": "frames"}),
        ("frames/a.png", "frames/a_seg.png", {"images": "frames", "labels": "frames/{name}_seg.png"}),
        ("a.jpg", "gt/a.png", {"images": "*.jpg", "labels": "gt"}),
        ("ulm/rgb/1.jpg", "ulm/gt/x1.png", {"images": "{city}/rgb/{name}.jpg", "labels": "{city}/gt/x{name}.png"}),
        ("train/img/a.jpg", "train/gt/a.png", {"images": "{split}/img", "labels": "{split}/gt", "split": "train"}),
        ("img [day]/a.jpg", "gt/a.png", {"images": "img [day]", "labels": "gt"}),
        ("cam_1/im/a.jpg", "cam_1/lb/a.png", {"images": "*/im/*.jpg", "labels": "*/lb/*.png"}),
    ],
)
def test_pairs(tmp_path: Path, image: str, label: str, settings: dict[str, Any]) -> None:
    root = tree(tmp_path, image, label)
    (frame,) = list_frames(at("pairs", root, domain="day", **settings), "p")
    assert (frame.uri, frame.label_uri) == (f"{tmp_path}/{image}", f"{tmp_path}/{label}")
    assert (frame.domain, frame.label_encoding, frame.problem) == ("day", "ids", "")


def test_a_label_that_is_not_there_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "images/a.jpg", "images/b.jpg", "labels/a_gt.png", "labels/b.png")
    frames = list_frames(at("pairs", root, labels="labels/{name}_gt.png"), "p")
    assert [one.label_uri for one in frames] == [f"{tmp_path}/labels/{one}_gt.png" for one in "ab"]


def test_labels_elsewhere_and_sequences_by_template(tmp_path: Path) -> None:
    root = tree(tmp_path / "x", "drive1/a.jpg", "drive2/a.jpg")
    labels = tree(tmp_path / "y", "drive1_a.png", "drive2_a.png")
    dataset = at("pairs", root, images="{sequence}/{name}.jpg", labels=f"{labels.uri}/{{sequence}}_{{name}}.png")
    frames = list_frames(dataset, "p")
    assert [(one.frame_id, one.sequence, one.label_uri) for one in frames] == [
        (f"p/drive{n}/a", f"drive{n}", f"{tmp_path}/y/drive{n}_a.png") for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "pictures"}, r"images: no such folder: .*/pictures; .* has images, labels. Cure: set images to"),
        ({"labels": "gt/{name}.png"}, r"labels: no such folder: .*/gt; .*or set labelled: false"),
        ({"labels": "labels/{city}/{name}.png"}, r"labels: \{city\} is in .*, and not in images"),
        ({"labels": "labels/{name"}, "labels: .*a brace without a placeholder"),
        ({"images": "images/*.bmp"}, "layout pairs: no image in"),
        (
            {"labels": "images"},
            r"labels: no label in .*/images; looked for .bmp, .*; there are a.jpg. .*never JPEG",
        ),
        ({"labels": "labels/{name}_gt.png"}, r"labels: no label in .*/labels that fits 'labels/\{name\}_gt.png'"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    root = tree(tmp_path, "images/a.jpg", "labels/a.png")
    with pytest.raises(UserError, match=message):
        list_frames(at("pairs", root, **settings), "p")


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("camvid", {"images": "rgb"}, "images and labels are for layout: pairs, and the layout is camvid"),
        ("pairs", {"split": "train"}, r"split 'train' is used by nothing: write \{split\} where it stands"),
        ("pairs", {"map": {"a": "b"}}, "give its `taxonomy`"),
    ],
)
def test_keys_that_go_together(layout: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FolderDataset.model_validate({"layout": layout, "root": "x", **settings})


# -- split lists -----------------------------------------------------------------------------------------------------


def test_split_lists_of_any_layout(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"images/{one}.jpg" for one in "abc"), *(f"labels/{one}.png" for one in "abcx"))
    (tmp_path / "train.txt").write_text("a\nimages/c.jpg labels/x.png\n")
    dataset = at("pairs", root, split_list="train.txt")
    check_folders(dataset)
    frames = list_frames(dataset, "p")
    assert [(one.frame_id, one.label_uri) for one in frames] == [
        ("p/a", f"{tmp_path}/labels/a.png"), ("p/c", f"{tmp_path}/labels/x.png"),
    ]  # fmt: skip
    assert count(dataset) == 2
    before = fingerprint(dataset)
    (tmp_path / "train.txt").write_text("a\nimages/c.jpg labels/c.png\n")
    assert fingerprint(dataset) != before != fingerprint(at("pairs", root))
    (tmp_path / "train.csv").write_text("image,part\na,train\nb,val\nz,train\n")
    found = list_frames(at("images", root / "images", split_list=f"{tmp_path}/train.csv", split="val"), "p")
    assert [one.uri for one in found] == [f"{tmp_path}/images/b.jpg"]
    named = list_frames(at("images", root / "images", split_list=f"{tmp_path}/train.csv", split="train"), "p")
    assert [(one.frame_id, bool(one.problem)) for one in named] == [("p/a", False), ("p/z", True)]
