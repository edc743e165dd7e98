"""Names of label files: which frame, what its ids mean, which of several files of a frame is the label."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nightseg.data.label_names import labels_of_frames, name_of, named_encoding
from nightseg.data.layouts import list_frames
from nightseg.data.pairing import pair_up
from nightseg.data.settings import FolderDataset
from nightseg.data.table import file_name
from nightseg.storage import Entry, Location, UserError


@pytest.mark.parametrize(
    ("path", "frame", "encoding", "holds_ids"),
    [
        ("ulm/ulm_1_gtFine_labelIds.png", "ulm/ulm_1", "label_ids", True),
        ("x_gt_labelTrainIds.PNG", "x", "train_ids", True),
        ("x_gtFine_labelcsTrainIds.png", "x", "train_ids", True),
        ("0004a4c0-d4dff0ad_train_id.png", "0004a4c0-d4dff0ad", "train_ids", True),
        ("Chicago_0010_trainIds.png", "Chicago_0010", "train_ids", True),
        ("x_gt_labelColor.png", "x", None, False),
        ("x_gt_invIds.png", "x", None, False),
        ("x_gtFine_instanceTrainIds.png", "x", None, False),
        ("x_train_color.png", "x", None, False),
        ("colormaps/val/x.png", "colormaps/val/x", None, False),
        ("0001TP_006690_L.png", "0001TP_006690", None, True),
        ("left_l.png", "left_l", None, True),
        ("x_rgb_anon.png", "x", None, True),
        ("labelIds.png", "labelIds", None, True),
        ("_labelIds.png", "_labelIds", None, True),
        ("a.v2_color.png", "a.v2", None, False),
        ("a_color_labelIds.png", "a_color", "label_ids", True),
        ("v/x_000_leftImg8bit_foggy_beta_0.02.png", "v/x_000", None, True),
        ("x_leftImg8bit_rain_alpha_0.03_beta_0.015_dropsize_0.01_pattern_1.png", "x", None, True),
    ],
)
def test_names(path: str, frame: str, encoding: str | None, holds_ids: bool) -> None:
    name = name_of(path)
    assert (name.frame, name.encoding, name.holds_ids) == (frame, encoding, holds_ids)
    assert named_encoding(path) == encoding


def chosen(*names: str, **more: object) -> dict[str, str]:
    entries = [Entry(name, 1, 1, False) for name in names]
    return {frame: entry.name for frame, entry in labels_of_frames(entries, "labels", **more).items()}  # type: ignore[arg-type]


ACDC = [f"night/x_gt_{what}.png" for what in ("invGray", "invIds", "labelColor", "labelIds", "labelTrainIds")]


def test_one_file_of_each_frame_holds_its_ids() -> None:
    said: list[str] = []
    assert chosen(*ACDC, say=said.append) == {"night/x": "night/x_gt_labelTrainIds.png"}
    assert said == [
        "labels: 3 files hold no ids by their names and are left out: night/x_gt_invGray.png, night/x_gt_invIds.png, "
        "night/x_gt_labelColor.png",
        "labels: 1 files are left out, as another one of their frames is meant by its name: night/x_gt_labelIds.png",
    ]
    assert chosen(*ACDC, prefer="label_ids") == {"night/x": "night/x_gt_labelIds.png"}
    assert chosen(*ACDC, prefer="mine") == {"night/x": "night/x_gt_labelIds.png"}, "raw ids of some kind"
    assert chosen("a_train_id.png", "a_train_color.png") == {"a": "a_train_id.png"}
    assert chosen("0001_L.png", "0001.png") == {"0001": "0001.png"}
    assert chosen("0001_L.png") == {"0001": "0001_L.png"}
    assert chosen("masks/a.png", "colormaps/a.png") == {"masks/a": "masks/a.png"}
    assert chosen("color/a_color.png") == {"color/a_color": "color/a_color.png"}, "there is nothing else"
    assert chosen("a.png", "a_color.png", "b_color.png", frames={"b_color", "a_color"}) == {
        "a": "a.png",
        "b_color": "b_color.png",
    }
    assert chosen("a.png", "a_gt.png", frames={"a", "a_gt"}) == {"a": "a.png", "a_gt": "a_gt.png"}
    with pytest.raises(UserError, match=r"a\.png and a_gt\.png are the same frame by name"):
        chosen("a.png", "a_gt.png")


# -- two folders -----------------------------------------------------------------------------------------------------


def pairs(root: Path, predictions: list[str], labels: list[str], **more: Any) -> list[tuple[str, str]]:
    for folder, names in (("p", predictions), ("l", labels)):
        for name in names:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(b"")
    found = pair_up(Location.of(root / "p"), Location.of(root / "l"), **more)
    return [(pair.prediction.name, pair.label.name) for pair in found]


def test_the_right_file_of_official_folders_is_scored(tmp_path: Path) -> None:
    assert pairs(tmp_path / "a", ["night/x_rgb_anon.png"], ACDC) == [("night/x_rgb_anon.png", ACDC[-1])]
    assert pairs(tmp_path / "b", ["night/x_rgb_anon.png"], ACDC, label_encoding="label_ids")[0][1] == ACDC[3]
    bdd = ["masks/val/y.png", "colormaps/val/y.png"]
    assert pairs(tmp_path / "c", ["y.png"], bdd) == [("y.png", "masks/val/y.png")]
    assert pairs(tmp_path / "d", ["val/y.png"], bdd) == [("val/y.png", "masks/val/y.png")]
    same = ["u/x_gtFine_labelIds.png", "u/x_gtFine_labelTrainIds.png", "u/x_gtFine_color.png"]
    assert pairs(tmp_path / "e", same, same) == [(same[1], same[1])], "labels as their own predictions"


def test_predictions_without_label_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    assert len(pairs(tmp_path / "a", ["1.png", "2.png", "3.png"], ["1.png", "2.npy"], say=said.append)) == 1
    assert said[0] == "2 predictions have no label and are not scored: 2.png, 3.png"
    assert said[1].startswith("warning: 1 files are called like these and are no labels by their type (2.npy)")
    assert len(pairs(tmp_path / "b", ["1.png"], ["1.png", "1.json"], say=said.append)) == 1 and len(said) == 2
    assert len(pairs(tmp_path / "c", ["1.png", "2.png"], ["1.png", "2_gt.jpg"], say=said.append)) == 1
    assert "(2_gt.jpg)" in said[-1]


def test_labels_are_of_any_type_that_keeps_ids(tmp_path: Path) -> None:
    names = ["1.tif", "2.BMP", "3.png", "s/4.tiff", "s/5.pgm"]
    masks = ["1.png", "2.png", "3.tif", "s/4.png", "s/5.bmp"]
    assert pairs(tmp_path / "a", masks, names) == list(zip(masks, names, strict=True))
    with pytest.raises(UserError, match=r"there is no PNG below .*; 2 others cannot hold ids: 1.jpg, 2.webp"):
        pairs(tmp_path / "b", ["1.png", "2.png"], ["1.jpg", "2.webp"])
    with pytest.raises(UserError, match=r"1.png and 1.tif are the same frame by name"):
        pairs(tmp_path / "c", ["1.png"], ["1.png", "1.tif"])
    folder = tmp_path / "c/l"
    Image.new("RGB", (4, 4)).save(folder / "1.tif")  # the image beside its label
    assert pairs(tmp_path / "c", ["1.png"], []) == [("1.png", "1.png")]
    Image.new("L", (4, 4)).save(folder / "1.tif")
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    assert pairs(tmp_path / "c", ["1.png"], []) == [("1.png", "1.tif")]


BOTH = ["cam.png", "cam_color.png", "e.png", "e_trainIds.png", "s/i.png", "s/i_instance.png", "color/j.png", "j.png"]


def test_frames_whose_names_end_like_labels_are_scored_where_both_sides_have_them(tmp_path: Path) -> None:
    assert sorted(pairs(tmp_path / "a", BOTH, BOTH)) == sorted((name, name) for name in BOTH)
    ids = ["cam_labelIds.png", "cam_color_labelIds.png", "e_gt_trainIds.png"]
    frames = ["cam.png", "cam_color.png", "e_gt.png"]
    assert set(pairs(tmp_path / "b", frames, ids)) == set(zip(frames, ids, strict=True))


def test_colours_beside_ids_are_no_frames_although_both_sides_have_them(tmp_path: Path) -> None:
    """What the files hold tells a colour picture from the mask of a frame called like one."""
    for side in "pl":
        for name in ("cam_color.png", "s/i_instance.png", "color/j.png"):
            (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / side / name)
    said: list[str] = []
    sound = ["cam.png", "s/i.png", "j.png"]
    assert sorted(pairs(tmp_path, sound, sound, say=said.append)) == sorted((name, name) for name in sound)
    assert said[0].startswith("labels: 3 files hold no ids by their names and are left out: cam_color.png, color/j.png")


def test_a_folder_of_colours_alone_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "l/color").mkdir(parents=True)
    for name in ("1_color.png", "2_color.png", "color/3.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "l" / name)
    with pytest.raises(UserError, match=r"labels: all 3 files are pictures .* hold no ids of classes: 1_color.png, 2_"):
        pairs(tmp_path, ["1.png", "2.png"], [])
    Image.new("P", (4, 4)).save(tmp_path / "l/2_color.png")
    assert pairs(tmp_path, ["2_color.png"], []) == [("2_color.png", "2_color.png")], "indices, in spite of the name"


def test_folders_called_like_pictures_hold_frames_where_both_sides_have_them(tmp_path: Path) -> None:
    both = ["color/1.png", "color/2.png", "ir/1.png", "ir/2.png"]
    assert pairs(tmp_path, both, both) == [(name, name) for name in both]


def test_folders_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 labels .*: seq_b/0001.png \(there is seq_a/0001.png\)"):
        pairs(tmp_path / "a", ["seq_a/0001.png"], ["seq_b/0001.png"])
    with pytest.raises(UserError, match=r"1 of 2 labels .*: b/2.png \(there is c/2.png\)"):
        pairs(tmp_path / "b", ["a/1.png", "c/2.png"], ["a/1.png", "b/2.png"])
    with pytest.raises(UserError, match="occurs more than once"):
        pairs(tmp_path / "c", ["1.png"], ["a/1.png", "b/1.png"])
    with pytest.raises(UserError, match=r"2 of 2 labels"):
        pairs(tmp_path / "d", ["a/1.png", "b/1.png", "c/2.png"], ["1.png", "2.png"])


def test_bare_names_count_where_one_side_has_no_folders(tmp_path: Path) -> None:
    assert pairs(tmp_path / "a", ["1.png", "2.png"], ["u/1_gt.png", "v/2.png"]) == [
        ("1.png", "u/1_gt.png"),
        ("2.png", "v/2.png"),
    ]
    assert pairs(tmp_path / "b", ["u/1.png", "v/2.png"], ["1.png", "2.png"]) == [
        ("u/1.png", "1.png"),
        ("v/2.png", "2.png"),
    ]


def test_a_folder_more_above_all_frames_is_no_difference(tmp_path: Path) -> None:
    assert pairs(tmp_path / "a", ["val/u/1.png", "val/v/1.png"], ["u/1.png", "v/1.png"])[1][0] == "val/v/1.png"
    assert pairs(tmp_path / "b", ["u/1.png", "v/1.png"], ["gt/val/u/1.png", "gt/val/v/1.png"])[1][0] == "v/1.png"
    with pytest.raises(UserError, match="2 of 2 labels"):
        pairs(tmp_path / "c", ["val/u/1.png", "train/v/1.png"], ["u/1.png", "w/1.png"])


NAMES = [
    "a b", "a.b.c", "x..", "-rf", "--help", "50%", "50%25", "#1", "?", "a?b", "a#b", "'q'", '"q"', "a:b", "a|b", "<a>",
    "*", "[1]", "{1}", "~", "$HOME", "%41", "line\nbreak", "tab\t", "Straße", "夜", "e\u0301", "a\u202eb", "🚗",
    "UPPER", "upper", "a.png", "a.jpg", "a.PNG", "con", "l" * 200, "夜" * 60, "_L", "_gt", "x_color", "x_L", "x_gt",
    " lead", "trail ", "&amp;", ";",
]  # fmt: skip


def test_every_legal_name_survives_the_way_to_its_mask(tmp_path: Path) -> None:
    """All at once, in folders that are called like that, too; masks are called as `predict` calls them."""
    frames = [f"{folder}{name}" for name in NAMES for folder in ("", f"in {name}/")]
    found = pairs(tmp_path, [file_name(frame, ".png") for frame in frames], [f"{frame}.png" for frame in frames])
    assert sorted(found, key=lambda pair: pair[1]) == sorted(
        ((file_name(frame, ".png"), f"{frame}.png") for frame in frames), key=lambda pair: pair[1]
    )


def test_letters_that_macos_takes_apart_are_the_same_letters(tmp_path: Path) -> None:
    apart, together = (unicodedata.normalize(form, "Zürich/é") for form in ("NFD", "NFC"))
    assert pairs(tmp_path / "a", [f"{together}.png"], [f"{apart}.png"]) == [(f"{together}.png", f"{apart}.png")]
    assert pairs(tmp_path / "b", [f"{apart}.png"], [f"{together}.png"]) == [(f"{apart}.png", f"{together}.png")]


# -- layouts ---------------------------------------------------------------------------------------------------------


def listed(root: Path, layout: str, *files: str, **settings: object) -> list[tuple[str, str | None]]:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not opened here")
    dataset = FolderDataset(layout=layout, root=str(root), **settings)  # type: ignore[arg-type]
    return [(str(f.label_uri).removeprefix(f"{root}/"), f.label_encoding) for f in list_frames(dataset, "d")]


def test_layouts_pick_the_file_that_holds_the_ids(tmp_path: Path) -> None:
    night = ["images/a.png", *(f"labels/a_{what}.png" for what in ("color", "labelIds", "trainIds"))]
    assert listed(tmp_path / "1", "camvid", *night) == [("labels/a_trainIds.png", "train_ids")]
    assert listed(tmp_path / "1", "camvid", label_encoding="label_ids") == [("labels/a_labelIds.png", "label_ids")]
    stills = ["images/b_6.png", "labels/b_6_L.png", "labels/b_6.png", "images/c_7.png", "labels/c_7_L.png"]
    assert listed(tmp_path / "2", "camvid", *stills) == [
        ("labels/b_6.png", "camvid12"),
        ("labels/c_7_L.png", "camvid12"),
    ]
    bdd = ["images/x-1.jpg", "labels/x-1_train_id.png", "labels/x-1_train_color.png"]
    assert listed(tmp_path / "3", "camvid", *bdd) == [("labels/x-1_train_id.png", "train_ids")]
    apart, together = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    assert (
        listed(tmp_path / "4", "camvid", f"images/{together}.jpg", f"labels/{apart}.png")[0][0] == f"labels/{apart}.png"
    )
    gt = "gtFine/val/ulm/ulm_1_gtFine_labelIds.png"
    fine = ["leftImg8bit/val/ulm/ulm_1_leftImg8bit.png", gt, gt.replace("labelIds", "color")]
    assert listed(tmp_path / "5", "cityscapes", *fine, split="val") == [(gt, "label_ids")]
    assert listed(tmp_path / "5", "cityscapes", split="val", label_encoding="train_ids") == [(gt, "train_ids")], (
        "the only ids there are"
    )


def test_layouts_look_into_files_whose_names_leave_it_open(tmp_path: Path) -> None:
    frames = ["images/g_rgb.png", "images/h.jpg", "labels/g.png", "labels/g_label.png", "labels/h.png", "labels/h.tif"]
    with pytest.raises(UserError, match=r"g\.png and g_label\.png are the same frame by name"):
        listed(tmp_path, "camvid", *frames)
    for image in ("g.png", "h.tif"):
        Image.new("RGB", (4, 4)).save(tmp_path / "labels" / image)
    assert listed(tmp_path, "camvid") == [("labels/g_label.png", "camvid12"), ("labels/h.png", "camvid12")]


def test_a_label_that_is_not_there_is_looked_for_under_the_usual_name(tmp_path: Path) -> None:
    assert listed(tmp_path / "1", "camvid", "images/a.png", "labels/b.png") == [("labels/a.png", "camvid12")]
    image = "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png"
    missing = listed(tmp_path / "2", "cityscapes", image, "gtFine/val/ulm/x_gtFine_labelIds.png", split="val")
    assert missing == [("gtFine/val/ulm/ulm_1_gtFine_labelIds.png", "label_ids")]
