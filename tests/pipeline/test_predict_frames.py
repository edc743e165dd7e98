"""`predict` without a run: every kind of source, everything that can be wrong with one, and going on after a stop."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.data.class_list import taxonomy
from nightseg.data.images import decode_image, decode_label, encode_jpeg, encode_png
from nightseg.data.video import new_video, open_video
from nightseg.networks.model_folder import save_model
from nightseg.pipeline.single import evaluate_folders, predict_frames
from nightseg.progress import SilentProgress
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.network import build_semantic_fpn
from nightseg.segmenter.predict import Segmented, Segmenter
from nightseg.segmenter.settings import Inference, Network
from nightseg.stages import predict as stage
from nightseg.storage import Location, UserError

CLASSES = taxonomy("camvid11")


def image(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    """`reads_the_pixels` calls it class `value`, with confidence 0.5."""
    return np.dstack([np.full((height, width), v) for v in (value, 128, 0)]).astype(np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Location:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    sizes = {"num_classes": 11, "pyramid_channels": 8, "head_channels": 8}
    card = sizes | {
        "kind": "semantic_fpn",
        "encoder": "resnet18",
        "taxonomy": {
            "name": CLASSES.name,
            "classes": list(CLASSES.classes),
            "palette": [list(colour) for colour in CLASSES.palette],
        },
        "input_size": None,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    folder = Location.of(tmp_path_factory.mktemp("model"))
    save_model(
        folder,
        build_semantic_fpn(Network(encoder="resnet18", pyramid_channels=8, head_channels=8), 11).state_dict(),
        card,
    )
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every segmenter answers what the frame says: class = red, confidence = green / 256. The classes it was shown."""
    shown: list[int] = []

    def batch(self: Segmenter, images: list[np.ndarray]) -> list[Segmented]:
        shown.extend(int(image[0, 0, 0]) for image in images)
        return [Segmented(image[..., 0].copy(), image[..., 1].astype(np.float32) / 256) for image in images]

    monkeypatch.setattr(Segmenter, "batch", batch)
    yield shown


def predict(
    model: Location, source: object, out: Path, actors: int = 0, batch: int = 2, **changes: Any
) -> dict[str, Any]:
    settings = {"save": ("mask",), "inference": Inference(), "device": "cpu", "progress": SilentProgress()} | changes
    compute = MapCompute(actors=actors, batch=batch, shard_rows=2)
    return predict_frames(model, str(source), Location.of(out), compute=compute, **settings)


def labels_of(file: Path) -> np.ndarray:
    return decode_label(file.read_bytes())


@pytest.mark.usefixtures("seen")
class TestImages:
    def test_masks_lie_where_the_images_lay(self, model: Location, tmp_path: Path) -> None:
        images = Location.of(tmp_path / "images")
        (images / "b c/é ö.png").write_bytes(encode_png(image(5, 7, 9)))
        (images / "a.JPG").write_bytes(encode_jpeg(image(3)))
        (images / "same.png").write_bytes(encode_png(image(1)))
        (images / "same.bmp").write_bytes(encode_png(image(2)))
        (images / "notes.txt").write_bytes(b"not looked at")
        found = predict(model, images, tmp_path / "out", save=("overlay", "mask"))
        files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
        assert files == [
            *("a.png", "b c/é ö.png", "overlay/a.jpg", "overlay/b c/é ö.jpg", "overlay/same.bmp.jpg"),
            *("overlay/same.png.jpg", "prediction.json", "quarantine.json", "same.bmp.png", "same.png.png"),
        ]
        assert labels_of(tmp_path / "out/b c/é ö.png").tolist() == np.full((7, 9), 5).tolist()
        assert (found["images"], found["written"], found["quarantined"]) == (4, 4, 0)
        assert found["save"] == ["mask", "overlay"] and found["taxonomy"] == "camvid11"
        assert Location.of(tmp_path / "out/quarantine.json").read_json() == []
        told = Location.of(tmp_path / "out/prediction.json").read_json()
        assert told | found == told and told["inference"]["scales"] == [1.0]
        assert told.keys() - found.keys() == {"inference", "sha256"} and told["sha256"].keys() == {"model", "source"}
        assert found.keys() == {
            *("model", "source", "images", "written", "quarantined", "out", "save", "taxonomy", "seconds")
        }

    def test_frames_of_odd_names_are_scored_against_their_labels(self, model: Location, tmp_path: Path) -> None:
        """Frame, mask, score: every class is right, so every mask found its own label."""
        names = [
            "50%",
            "50%25",
            "a b",
            "-rf",
            "#1?",
            "a:b",
            "x_gt",
            "line\nbreak",
            "Zu\u0308rich/e\u0301",
            "l" * 200,
            "A",
            "a",
        ]
        for value, name in enumerate(names):
            place = tmp_path / f"images/{name}.PNG"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encode_png(image(value % 11)))
            label = tmp_path / f"labels/{unicodedata.normalize('NFC', name) if '/' in name else name}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_bytes(encode_png(np.full((4, 6), value % 11, np.uint8)))
        assert predict(model, tmp_path / "images", tmp_path / "out")["written"] == len(names)
        found = evaluate_folders(
            Location.of(tmp_path / "out"), Location.of(tmp_path / "labels"), "camvid11",
            evaluation=Evaluation(), compute=MapCompute(actors=0), progress=SilentProgress(),
        )  # fmt: skip
        assert (found["miou"], found["frames"]) == (1.0, len(names))

    @pytest.mark.parametrize("save", [("mask",), ("mask", "color", "overlay")])
    def test_frames_called_like_pictures_are_scored(self, model: Location, tmp_path: Path, save: tuple[str]) -> None:
        """Folders named as those of pictures, names that end like colours or label ids, and their plain namesakes."""
        names = ["x", "confidence/x", "y", "y_color", "z", "z_trainIds", "w_instance", "w", "color/only", "overlay/y"]
        for value, name in enumerate(names):
            for folder, array in (("images", image(value)), ("labels", np.full((4, 6), value, np.uint8))):
                (Location.of(tmp_path / folder) / f"{name}.png").write_bytes(encode_png(array))
        assert predict(model, tmp_path / "images", tmp_path / "out", save=save)["written"] == len(names)
        found = evaluate_folders(
            Location.of(tmp_path / "out"), Location.of(tmp_path / "labels"), "camvid11",
            evaluation=Evaluation(), compute=MapCompute(actors=0), progress=SilentProgress(),
        )  # fmt: skip
        assert (found["miou"], found["frames"]) == (1.0, len(names))

    def test_masks_do_not_become_frames(self, model: Location, tmp_path: Path) -> None:
        """Wherever the output lies; where they would mix it is refused."""
        images = Location.of(tmp_path / "images")
        (images / "a.png").write_bytes(encode_png(image(5)))
        (images / "b/c.jpg").write_bytes(encode_jpeg(image(3)))
        (tmp_path / "link").symlink_to(tmp_path / "images")
        for out in (tmp_path / "images/masks", tmp_path / "images/b/more"):
            for _ in range(2):  # again: the masks of the first time lie there now
                assert predict(model, images, out, save=("mask", "color", "overlay"))["images"] == 2
        for source, out in (
            ("images", "images"),
            ("images", "."),
            ("images/b/*.jpg", "link"),
            ("images/a.png", "link"),
        ):
            with pytest.raises(UserError, match=r"of the frames lie in the output folder.*another folder"):
                predict(model, tmp_path / source, tmp_path / out)
        assert sorted(os.listdir(images.uri)) == ["a.png", "b", "masks"]
        masks = predict(model, images / "masks", tmp_path / "out")  # named on purpose
        assert masks["images"] == 2

    def test_bad_images_do_not_stop_the_rest(self, model: Location, tmp_path: Path) -> None:
        images = Location.of(tmp_path / "images")
        jpeg = encode_jpeg(image(3, 64, 64))
        (images / "0 cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
        (images / "1 good.png").write_bytes(encode_png(image(4)))
        (images / "2 empty.png").write_bytes(b"")
        (images / "3 text.png").write_bytes(b"hello")
        (images / "4 good.png").write_bytes(encode_png(image(6)))
        with open(os.fsencode(images.uri) + b"/5 latin \xe9.png", "wb") as stream:
            stream.write(encode_png(image(1)))
        found = predict(model, images, tmp_path / "out")
        assert (found["images"], found["written"], found["quarantined"]) == (6, 2, 4)
        listed = Location.of(tmp_path / "out/quarantine.json").read_json()
        assert sorted((row["frame_id"], row["reason"]) for row in listed) == [
            ("0 cut", "truncated"), ("2 empty", "zero_bytes"), ("3 text", "not_an_image"),
            (r"5 latin \udce9", "unreadable"),
        ]  # fmt: skip
        assert (labels_of(tmp_path / "out/4 good.png") == 6).all()

    def test_one_image_a_pattern_and_a_table(self, model: Location, tmp_path: Path) -> None:
        data = Location.of(tmp_path / "data")
        (data / "a.b.png").write_bytes(encode_png(image(2)))
        (data / "x/c.png").write_bytes(encode_png(image(7)))
        assert predict(model, data / "a.b.png", tmp_path / "one")["written"] == 1
        assert (labels_of(tmp_path / "one/a.b.png") == 2).all()
        assert predict(model, f"{data}/**/c.*", tmp_path / "some")["written"] == 1
        assert (labels_of(tmp_path / "some/x/c.png") == 7).all()
        rows = {"frame_id": ["n/1", "n/2"], "uri": ["a.b.png", "x/c.png"], "sha256": [None, "0" * 64]}
        (data / "frames.parquet").write_table(pa.table(rows))
        found = predict(model, data / "frames.parquet", tmp_path / "table")
        assert (found["written"], found["quarantined"]) == (1, 1)
        assert (labels_of(tmp_path / "table/n/1.png") == 2).all()
        (bad,) = Location.of(tmp_path / "table/quarantine.json").read_json()
        assert bad["frame_id"] == "n/2" and "has changed" in bad["detail"]

    def test_errors_are_said_before_the_work(self, model: Location, tmp_path: Path) -> None:
        images, out = Location.of(tmp_path / "images"), tmp_path / "out"
        (images / "x.png").write_bytes(encode_png(image(1)))
        (images / "color/x.png").write_bytes(encode_png(image(1)))
        with pytest.raises(UserError, match="no such file or folder"):
            predict(model, tmp_path / "nowhere", out)
        with pytest.raises(UserError, match=r"would both write color/x\.png"):
            predict(model, images, out, save=("mask", "color"))
        with pytest.raises(UserError, match="unknown picture 'maks'"):
            predict(model, images, out, save=("maks",))
        with pytest.raises(UserError, match="an overlay video needs a video"):
            predict(model, images, out, overlay_video=True)
        with pytest.raises(UserError, match=r"device 'gpu': unknown\. Cure: choose cpu, cuda"):
            predict(model, images, out, device="gpu")
        with pytest.raises(UserError, match=r"device 'cuda:99': PyTorch sees \d+ CUDA GPUs here"):
            predict(model, images, out, device="cuda:99")
        with pytest.raises(UserError, match="neither a model folder"):
            predict(Location.of(tmp_path / "no"), images, out)
        assert not out.exists()

    def test_nothing_usable_is_an_error_that_names_the_first(self, model: Location, tmp_path: Path) -> None:
        images = Location.of(tmp_path / "images")
        (images / "x.png").write_bytes(b"")
        with pytest.raises(UserError, match=r"none of the 1 frames.*x\.png, is zero_bytes"):
            predict(model, images, tmp_path / "out")
        (images / "x.png").write_bytes(encode_png(image(1)))
        assert predict(model, images, tmp_path / "out")["written"] == 1  # mended, and done anew

    def test_a_full_disk_stops_the_work(self, model: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pictures are written by threads; what happens there must not get lost."""
        (Location.of(tmp_path / "images") / "x.png").write_bytes(encode_png(image(1)))

        def full(*_: Any) -> bytes:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(stage, "picture", full)
        with pytest.raises(OSError, match="No space left"):
            predict(model, tmp_path / "images", tmp_path / "out")


class TestGoingOn:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Location:
        folder = Location.of(tmp_path / "images")
        for number in range(6):
            (folder / f"{number}.png").write_bytes(encode_png(image(number)) if number != 1 else b"")
        return folder

    def stop(self, monkeypatch: pytest.MonkeyPatch, at: int) -> Any:
        """The next command is interrupted when it is shown the frame of this class."""
        context = monkeypatch.context()
        patch = context.__enter__()
        real = Segmenter.batch

        def batch(segmenter: Segmenter, images: list[np.ndarray]) -> list[Segmented]:
            if any(image[0, 0, 0] == at for image in images):
                raise KeyboardInterrupt
            return real(segmenter, images)

        patch.setattr(Segmenter, "batch", batch)
        return context

    def test_an_interrupted_command_goes_on_and_a_finished_one_begins_anew(
        self, model: Location, images: Location, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        stopped = self.stop(monkeypatch, at=4)
        with pytest.raises(KeyboardInterrupt):
            predict(model, images, out)
        stopped.__exit__(None, None, None)
        assert seen == [0, 2, 3]
        found = predict(model, images, out)
        assert seen == [0, 2, 3, 4, 5]
        assert (found["written"], found["quarantined"]) == (5, 1)
        assert [int(labels_of(out / f"{number}.png")[0, 0]) for number in (0, 2, 3, 4, 5)] == [0, 2, 3, 4, 5]
        assert not (out / ".work").exists()
        predict(model, images, out)
        assert seen == [0, 2, 3, 4, 5, 0, 2, 3, 4, 5]

    @pytest.mark.parametrize("what", ["settings", "files", "model"])
    def test_what_was_made_from_something_else_is_not_taken(
        self,
        model: Location,
        images: Location,
        tmp_path: Path,
        seen: list[int],
        monkeypatch: pytest.MonkeyPatch,
        what: str,
    ) -> None:
        out, changes, other = tmp_path / "out", {}, model
        stopped = self.stop(monkeypatch, at=4)
        with pytest.raises(KeyboardInterrupt):
            predict(model, images, out)
        stopped.__exit__(None, None, None)
        match what:
            case "settings":
                changes = {"inference": Inference(flip=True)}
            case "files":
                (images / "0.png").write_bytes(encode_png(image(9)))
            case "model":
                other = Location.of(tmp_path / "other")
                for name in ("model.json", "model.safetensors"):
                    (other / name).write_bytes((model / name).read_bytes())
                card = {key: value for key, value in (other / "model.json").read_json().items() if key != "sha256"}
                (other / "model.json").write_json(card | {"mean": [0.4, 0.4, 0.4]})
        seen.clear()
        predict(other, images, out, **changes)
        assert seen == [9 if what == "files" else 0, 2, 3, 4, 5]


def test_model_source_and_pictures_are_looked_for_before_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        predict(Location.of(tmp_path / "m"), tmp_path / "x", tmp_path / "o", save=["maks"])
    assert [problem.what.partition(":")[0] for problem in refused.value.problems] == [
        "save", str(tmp_path / "m"), str(tmp_path / "x"),
    ]  # fmt: skip
    assert not (tmp_path / "o").exists()


def film(file: Location, num_frames: int) -> Location:
    """Frame n has the brightness 40 n, nearly: a compressed video is not exact."""
    with new_video(file, Fraction(10)) as add:
        for number in range(num_frames):
            add(np.full((32, 48, 3), 40 * number, np.uint8))
    return file


class TestVideos:
    @pytest.fixture(autouse=True)
    def pyav(self) -> None:
        pytest.importorskip("av")

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Class = brightness / 40, rounded."""
        shown: list[int] = []

        def batch(self: Segmenter, images: list[np.ndarray]) -> list[Segmented]:
            kinds = [round(float(image.mean()) / 40) for image in images]
            shown.extend(kinds)
            return [
                Segmented(np.full(image.shape[:2], kind, np.uint8), np.ones(image.shape[:2], np.float32))
                for image, kind in zip(images, kinds, strict=True)
            ]

        monkeypatch.setattr(Segmenter, "batch", batch)
        return shown

    def test_frames_are_named_by_number_and_the_overlay_is_a_video(
        self, model: Location, tmp_path: Path, seen: list[int]
    ) -> None:
        file = film(Location.of(tmp_path / "drive.mp4"), 5)
        out = tmp_path / "out"
        found = predict(model, file, out, save=("mask", "overlay"), overlay_video=True)
        assert (found["written"], found["quarantined"]) == (5, 0) and seen == [0, 1, 2, 3, 4]
        for number in range(5):
            labels = labels_of(out / f"drive/{number:06d}.png")
            assert labels.shape == (32, 48) and (labels == number).all()
        with open_video(Location.of(out / "drive.overlay.mp4")) as clip:
            films = list(clip.frames)
            assert clip.rate == 10
        for number, picture in enumerate(films):
            still = decode_image((out / f"overlay/drive/{number:06d}.jpg").read_bytes())
            assert np.abs(picture.mean(axis=(0, 1)) - still.mean(axis=(0, 1))).max() < 4
        assert len(films) == 5

    def test_images_and_videos_of_a_pattern(self, model: Location, tmp_path: Path, seen: list[int]) -> None:
        film(Location.of(tmp_path / "d/a.mp4"), 2)
        (Location.of(tmp_path / "d") / "b.png").write_bytes(encode_png(np.full((4, 4, 3), 80, np.uint8)))
        (tmp_path / "d/c.mp4").write_bytes(b"no video")
        found = predict(model, f"{tmp_path}/d/*", tmp_path / "out")
        assert (found["written"], found["quarantined"]) == (3, 1)
        assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["000000.png", "000001.png", "b.png"]
        (bad,) = Location.of(tmp_path / "out/quarantine.json").read_json()
        assert (bad["frame_id"], bad["reason"]) == ("c/000000", "unreadable")

    def test_an_interrupted_video_is_decoded_again_but_not_segmented_again(
        self, model: Location, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = film(Location.of(tmp_path / "drive.mp4"), 6)
        real = Segmenter.batch

        def batch(segmenter: Segmenter, images: list[np.ndarray]) -> list[Segmented]:
            if images[0].mean() > 150:
                raise KeyboardInterrupt
            return real(segmenter, images)

        with monkeypatch.context() as patch:
            patch.setattr(Segmenter, "batch", batch)
            with pytest.raises(KeyboardInterrupt):
                predict(model, file, tmp_path / "out")
        assert seen == [0, 1, 2, 3]
        assert predict(model, file, tmp_path / "out")["written"] == 6
        assert seen == [0, 1, 2, 3, 4, 5]
        assert len(list((tmp_path / "out/drive").iterdir())) == 6

    def test_frames_before_the_damage_stay(
        self, model: Location, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nightseg.data import video
        from nightseg.data.images import BadFrame

        file = film(Location.of(tmp_path / "drive.mp4"), 6)
        real = video._decoded

        def damaged(*arguments: Any) -> Iterator[np.ndarray]:
            for number, frame in enumerate(real(*arguments)):
                if number == 3:
                    raise BadFrame("truncated", "damaged after 3 frames")
                yield frame

        monkeypatch.setattr(video, "_decoded", damaged)
        found = predict(model, file, tmp_path / "out", overlay_video=True)
        assert (found["images"], found["written"], found["quarantined"]) == (4, 3, 1)
        (bad,) = Location.of(tmp_path / "out/quarantine.json").read_json()
        assert (bad["frame_id"], bad["detail"]) == ("drive/000003", "damaged after 3 frames")
        monkeypatch.undo()
        with open_video(Location.of(tmp_path / "out/drive.overlay.mp4")) as clip:
            assert len(list(clip.frames)) == 3

    def test_a_video_is_not_spread(self, model: Location, tmp_path: Path) -> None:
        film(Location.of(tmp_path / "drive.mp4"), 1)
        with pytest.raises(UserError, match="Cure: no actors"):
            predict(model, tmp_path / "drive.mp4", tmp_path / "out", actors=2)


@pytest.mark.ray
def test_actors_write_the_same_bytes_as_this_process(
    ray_cluster: None, model: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Location.of(tmp_path / "images")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (33, 40, 3), dtype=np.uint8)
        (images / f"{number}.png").write_bytes(encode_png(noise) if number != 2 else b"")
    settings: dict[str, Any] = {"save": ("mask", "confidence"), "inference": Inference(window=(32, 32), flip=True)}
    here = predict(model, images, tmp_path / "here", **settings)
    there = predict(model, images, tmp_path / "there", actors=2, **settings)
    assert (here["written"], here["quarantined"]) == (there["written"], there["quarantined"]) == (4, 1)
    for file in sorted((tmp_path / "here").rglob("*.png")):
        assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
