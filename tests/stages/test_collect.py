"""collect on the files users really have: right frames used, bad ones quarantined with the reason, nothing lost."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nightseg.cluster.settings import MapCompute
from nightseg.data.images import encode_jpeg, encode_png, read_image, read_label
from nightseg.data.settings import FolderDataset, ScenesDataset
from nightseg.data.table import FRAME_SCHEMA, check_frames, resolve
from nightseg.progress import SilentProgress
from nightseg.stages import collect as stage
from nightseg.storage import Attempt, Commit, Location, Stage, UserError, Workspace, sha256_of

HEIGHT, WIDTH = 24, 32


def noise(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def label(value: int = 3, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((height, width), value, dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def upside_down_photograph() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: WIDTH x HEIGHT only once turned
    return saved(Image.fromarray(noise(3, WIDTH, HEIGHT)), "JPEG", exif=exif)


# name of the image -> (image, label), and the reason why it is bad
GOOD: dict[str, tuple[bytes, bytes]] = {
    "0001_grey.png": (encode_png(noise(0)[..., 0]), encode_png(label(0))),
    "0001_alpha.png": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (1, 2, 3, 4)), "PNG"), encode_png(label(10))),
    "0002_photograph.jpg": (upside_down_photograph(), encode_png(label(5))),
    "Straße bei Nacht 夜.JPEG": (encode_jpeg(noise(1)), encode_png(label(11))),
    "0003_palette label.png": (encode_png(noise(2)), encode_png(label(7), [(9, 9, 9)] * 11)),
}
BAD: dict[str, tuple[bytes | None, bytes | None, str]] = {
    "cut.jpg": (encode_jpeg(noise(4))[:-200], encode_png(label()), "truncated"),
    "empty.png": (b"", encode_png(label()), "zero_bytes"),
    "text.png": (b"Sorry, the download failed.\n", encode_png(label()), "not_an_image"),
    "sixteen.png": (saved(Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)), "PNG"), b"", "wrong_mode"),
    "bomb.png": (huge_png(), encode_png(label()), "decompression_bomb"),
    "other size.png": (encode_png(noise(5)), encode_png(label(3, HEIGHT, WIDTH + 1)), "label_size"),
    "unknown id.png": (encode_png(noise(6)), encode_png(label(200)), "label_value"),
    "rgb label.png": (encode_png(noise(7)), encode_png(noise(7)), "wrong_mode"),
    "no label.png": (encode_png(noise(8)), None, "label_missing"),
    "empty label.png": (encode_png(noise(9)), b"", "zero_bytes"),
    "turned label.jpg": (upside_down_photograph(), encode_png(label(3, WIDTH, HEIGHT)), "label_size"),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    everything: dict[str, tuple[bytes | None, bytes | None]] = {
        **GOOD,
        **{name: pair[:2] for name, pair in BAD.items()},
    }
    for name, (image, mask) in everything.items():
        for folder, data, file in (("images", image, name), ("labels", mask, Path(name).stem + ".png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            if data is not None:
                (root / folder / file).write_bytes(data)
    return root


def node(tmp_path: Path, run: str = "run") -> Stage:
    return Workspace(tmp_path / run).stage("collect", "d", version=stage.VERSION, recipe={}, inputs={}, seed=0)


def collected(
    attempt: Attempt,
    dataset: FolderDataset | ScenesDataset,
    bad: float = 1.0,
    classes: str = "camvid11",
    actors: int = 0,
) -> Commit:
    return stage.collect(
        dataset,
        name="d",
        taxonomy=classes,
        attempt=attempt,
        progress=SilentProgress(),
        compute=MapCompute(actors=actors, shard_rows=4, cpus_per_actor=0.5),
        max_bad_fraction=bad,
    )


def folder(root: Path, **settings: Any) -> FolderDataset:
    return FolderDataset(**{"layout": "camvid", "root": str(root), "domain": "day"} | settings)


# -- folders ---------------------------------------------------------------------------------------------------------


def check_corpus(commit: Commit, corpus: Path) -> None:
    frames, quarantine = commit.table("frames"), commit.table("quarantine")
    assert frames.schema == FRAME_SCHEMA
    assert {row["frame_id"] for row in frames.to_pylist()} == {f"d/{Path(name).stem}" for name in GOOD}
    reasons = {Path(row["uri"]).name: row["reason"] for row in quarantine.to_pylist()}
    assert reasons == {name: reason for name, (_, _, reason) in BAD.items()}
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (len(GOOD) + len(BAD), len(GOOD), len(BAD))
    check_frames(frames)
    for row in frames.to_pylist():
        image, mask = GOOD[Path(row["uri"]).name]
        assert (row["height"], row["width"]) == (HEIGHT, WIDTH), "of the upright image"
        assert (row["sha256"], row["bytes"], row["label_sha256"]) == (sha256_of(image), len(image), sha256_of(mask))
        assert (row["dataset"], row["domain"], row["label_encoding"]) == ("d", "day", "camvid12")
        assert read_image(Location.of(row["uri"])).shape[:2] == read_label(Location.of(row["label_uri"])).shape
    labels = commit.summary["labels"]
    assert (labels["encoding"], labels["why"], labels["files"], labels["valid"]) == ("camvid12", "by their ids", 5, 0.8)
    assert labels["absent"] == ["building", "pole", "road", "pavement", "sign", "car", "pedestrian"]
    assert {key: value for key, value in commit.summary.items() if key != "labels"} == {
        "frames": 5,
        "labelled": 5,
        "domains": {"day": 5},
        "reasons": {
            "decompression_bomb": 1,
            "label_missing": 1,
            "label_size": 2,
            "label_value": 1,
            "not_an_image": 1,
            "truncated": 1,
            "wrong_mode": 2,
            "zero_bytes": 2,
        },
        "duplicates": 0,
    }
    details = {Path(row["uri"]).name: row["detail"] for row in quarantine.to_pylist()}
    place = f"{corpus}/labels"
    assert details["unknown id.png"].startswith(f"label {place}/unknown id.png: ids 200 ({HEIGHT * WIDTH} pixels)")
    assert details["no label.png"] == f"label {place}/no label.png is not there"
    assert "33 x 24 pixels, but the upright image is 32 x 24" in details["other size.png"]
    assert "mode RGB" in details["rgb label.png"] and details["rgb label.png"].startswith("label ")
    assert details["bomb.png"].startswith("60000 x 60000 pixels, at most")


def test_the_corpus(tmp_path: Path, corpus: Path) -> None:
    commit = collected(node(tmp_path).open(), folder(corpus))
    check_corpus(commit, corpus)
    assert node(tmp_path).commit() == commit


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_corpus_on_ray(tmp_path: Path, corpus: Path) -> None:
    check_corpus(collected(node(tmp_path).open(), folder(corpus), actors=1), corpus)


def test_two_runs_agree_to_the_byte(tmp_path: Path, corpus: Path) -> None:
    contents = {collected(node(tmp_path, run).open(), folder(corpus)).content for run in ("one", "two")}
    assert len(contents) == 1


def test_too_many_bad_frames_fail_and_say_which(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match=r"11 of 16 frames \(68.8%\) are bad(.|\n)*bomb.png: decompression_bomb"):
        collected(node(tmp_path).open(), folder(corpus), bad=0.01)
    assert node(tmp_path).commit() is None


def test_unlabelled_frames_ignore_the_labels(tmp_path: Path, corpus: Path) -> None:
    commit = collected(node(tmp_path).open(), folder(corpus, labelled=False, domain="unknown"))
    assert commit.summary["labelled"] == 0 and commit.summary["domains"] == {"unknown": 11}
    assert commit.summary["reasons"].keys() == {
        "decompression_bomb",
        "not_an_image",
        "truncated",
        "wrong_mode",
        "zero_bytes",
    }
    assert commit.table("frames")["label_encoding"].null_count == 11


def test_frames_with_the_same_bytes_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (root / f"{name}.png").write_bytes(encode_png(noise(seed)))
    (root / "back\\slash.png").write_bytes(encode_png(noise(2)))
    commit = collected(node(tmp_path).open(), folder(root, layout="images"))
    assert commit.summary["duplicates"] == 1
    assert "1 of 3 frames repeat others byte for byte, such as d/a and d/b; all of them" in (commit.summary["notes"][0])
    (refused,) = commit.table("quarantine").to_pylist()
    assert (refused["frame_id"], refused["reason"]) == ("d/back\\slash", "unreadable")
    assert "backslash" in refused["detail"]


def test_a_file_that_vanishes_after_the_listing_is_missing(tmp_path: Path, corpus: Path) -> None:
    work = stage._folder(folder(corpus), "d", "camvid11")
    (corpus / "images" / "0001_grey.png").unlink()
    tables = work.worker(**work.arguments)(work.rows, Location.of(tmp_path))
    reasons = {row["frame_id"]: row["reason"] for row in tables["quarantine"].to_pylist()}
    assert reasons["d/0001_grey"] == "missing"
    assert tables["frames"].num_rows + tables["quarantine"].num_rows == work.rows.num_rows


def test_an_encoding_the_taxonomy_lacks_is_an_error_at_once(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match="cityscapes19 has no label encoding 'camvid12'"):
        collected(node(tmp_path).open(), folder(corpus), classes="cityscapes19")


def photograph(orientation: int, kind: str = "JPEG", side: int = HEIGHT) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(noise(3, side, HEIGHT)), kind, exif=exif)


def drawn(height: int = HEIGHT, width: int = HEIGHT) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 11, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_labels_of_turned_photographs(tmp_path: Path, orientation: int, kind: str) -> None:
    """A label is drawn on what a viewer shows, or on the stored pixels: where the sizes do not tell, nobody knows."""
    root, suffix = tmp_path / "data", kind.lower()
    other_size = WIDTH if orientation >= 5 else HEIGHT
    turned = (HEIGHT, WIDTH) if orientation >= 5 else (HEIGHT, HEIGHT)
    exif = Image.open(io.BytesIO(photograph(orientation))).getexif()
    even = np.full((HEIGHT, HEIGHT), 3, np.uint8)
    cases = {
        "square": (photograph(orientation, kind), encode_png(drawn())),
        "both": (photograph(orientation, kind), saved(Image.fromarray(drawn()), "PNG", exif=exif)),
        "plain": (photograph(1, kind), encode_png(drawn())),
        "even": (photograph(orientation, kind), encode_png(even)),
        "long": (photograph(orientation, kind, other_size), encode_png(drawn(*turned))),
    }
    for name, (image, mask) in cases.items():
        for place, data in ((f"images/{name}.{suffix}", image), (f"labels/{name}.png", mask)):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes(data)
    commit = collected(node(tmp_path).open(), folder(root, label_encoding="camvid12"))
    reasons = {row["frame_id"].removeprefix("d/"): row["reason"] for row in commit.table("quarantine").to_pylist()}
    unclear = {"square"} | ({"long"} if orientation <= 4 else set())
    assert reasons == dict.fromkeys(unclear, "label_orientation")


def labelled(root: Path, labels: dict[str, np.ndarray], city: str = "leftImg8bit/val/ulm") -> None:
    """The Cityscapes layout with labels of these names."""
    for name, array in labels.items():
        image = root / city / f"{name.partition('_')[0]}_leftImg8bit.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(encode_png(noise(1, *array.shape)))
        mask = root / "gtFine/val/ulm" / name
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(encode_png(array))


def cityscapes(tmp_path: Path, labels: dict[str, np.ndarray], **settings: Any) -> Commit:
    labelled(tmp_path / "data", labels)
    dataset = FolderDataset(layout="cityscapes", root=str(tmp_path / "data"), split="val", **settings)
    run = str(settings.get("label_encoding", "run"))
    return collected(node(tmp_path, run).open(), dataset, bad=0.01, classes="cityscapes19")


def test_label_ids_that_are_train_ids_are_noticed_over_the_set(tmp_path: Path) -> None:
    train_ids = np.kron(np.array([[0, 1, 2], [8, 10, 13]], np.uint8), np.ones((8, 8), np.uint8))
    labels = {f"{index}_gtFine_labelIds.png": train_ids for index in range(3)}
    with pytest.raises(
        UserError, match=r"dataset d: 3 labels are called like 0_gtFine_labelIds.png, but .*67 % of"
    ) as no:
        cityscapes(tmp_path, labels)
    assert no.value.cure.endswith("label_encoding: train_ids or label_ids")
    commit = cityscapes(tmp_path, labels, label_encoding="train_ids")
    assert commit.summary["labels"]["encoding"] == "train_ids" and commit.summary["labels"]["valid"] == 1.0


def test_labels_without_one_pixel_of_a_class_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 labels has a pixel with a class"):
        cityscapes(tmp_path, {f"{index}_gtFine_labelIds.png": label(0) for index in range(2)})
    assert node(tmp_path).commit() is None


def test_another_encoding_that_knows_all_ids_is_named(tmp_path: Path) -> None:
    root = tmp_path / "with 255"
    for index, void in enumerate((3, 255, 3)):
        mask = label(5)
        mask[0] = void
        for place, data in (
            (f"images/{index}.png", encode_png(noise(index))),
            (f"labels/{index}.png", encode_png(mask)),
        ):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes(data)
    with pytest.raises(UserError, match=r"layout camvid takes .* for camvid12; by their ids it is train_ids"):
        collected(node(tmp_path).open(), folder(root), bad=0.01)


# -- scenes ----------------------------------------------------------------------------------------------------------


def scenes(**settings: Any) -> ScenesDataset:
    mix = {"day": 0.5, "night": 0.25, "twilight": 0.25}
    return ScenesDataset(**{"layout": "scenes", "count": 8, "size": (48, 64), "mix": mix} | settings)


def check_scenes(commit: Commit) -> None:
    frames = commit.table("frames")
    assert frames.column_names == [*FRAME_SCHEMA.names, "true_domain"]
    assert frames["frame_id"].to_pylist() == [f"d/{index:06d}" for index in range(8)]
    assert frames["domain"].to_pylist() == frames["true_domain"].to_pylist()
    assert commit.summary["domains"] == {"day": 4, "night": 2, "twilight": 2}
    assert frames["uri"][3].as_py() == "images/000003.png", "relative: the run folder may move"
    for row in resolve(frames, commit.folder).to_pylist():
        data, mask = Location.of(row["uri"]).read_bytes(), Location.of(row["label_uri"]).read_bytes()
        assert (sha256_of(data), sha256_of(mask), len(data)) == (row["sha256"], row["label_sha256"], row["bytes"])
        assert read_image(Location.of(row["uri"])).shape == (48, 64, 3)
        ids = set(read_label(Location.of(row["label_uri"])).ravel().tolist())
        assert ids <= {*range(11), 255} and len(ids) > 2
        assert row["label_encoding"] == "train_ids"


def test_scenes(tmp_path: Path) -> None:
    commit = collected(node(tmp_path).open(), scenes())
    check_scenes(commit)
    again = collected(node(tmp_path, "again").open(), scenes())
    assert again.content == commit.content
    later = collected(node(tmp_path, "later").open(), scenes(first=4, count=4)).table("frames")
    assert later["sha256"].to_pylist() == commit.table("frames")["sha256"].to_pylist()[4:]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_scenes_on_ray(tmp_path: Path) -> None:
    check_scenes(collected(node(tmp_path).open(), scenes(), actors=1))


def test_a_pool_of_scenes_hides_its_domains(tmp_path: Path) -> None:
    commit = collected(node(tmp_path).open(), scenes(labelled=False), classes="cityscapes19")
    frames = commit.table("frames")
    assert set(frames["domain"].to_pylist()) == {"unknown"}
    assert sorted(frames["true_domain"].to_pylist()) == ["day"] * 4 + ["night"] * 2 + ["twilight"] * 2
    assert frames["label_uri"].null_count == 8 and not (commit.folder / "labels").exists()


def test_labelled_scenes_need_their_taxonomy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scenes are labelled with the classes of camvid11"):
        collected(node(tmp_path).open(), scenes(), classes="cityscapes19")
