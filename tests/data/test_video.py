"""Videos: frames come back in order and upright, damage is named, lists of other files are not played."""

from __future__ import annotations

import builtins
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.data.images import BadFrame
from nightseg.data.video import new_video, open_video, upright
from nightseg.storage import Location, UserError


def grey(value: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def film(file: Location, num_frames: int = 20, height: int = 32, width: int = 48) -> Location:
    with new_video(file, Fraction(10)) as add:
        for number in range(num_frames):
            add(grey(10 * number, height, width))
    return file


def test_a_film_held_on_its_side_is_turned_upright() -> None:
    image_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    a, b, c, d = image_HWC.reshape(4, 3).tolist()
    assert upright(image_HWC, 0).tolist() == [[a, b], [c, d]]
    assert upright(image_HWC, 90).tolist() == [[b, d], [a, c]]  # counterclockwise
    assert upright(image_HWC, -90).tolist() == [[c, a], [d, b]]
    assert upright(image_HWC, 180).tolist() == [[d, c], [b, a]]


def test_without_pyav_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any, **named: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with (
        pytest.raises(UserError, match="Cure: pip install av"),
        open_video(Location.of(tmp_path / "a.mp4")),
    ):
        pass


class TestPyAV:
    @pytest.fixture(autouse=True)
    def pyav(self) -> None:
        pytest.importorskip("av")

    def test_frames_come_back_in_order(self, tmp_path: Path) -> None:
        with open_video(film(Location.of(tmp_path / "a.mp4"))) as clip:
            assert clip.length == 20 and clip.rate == 10
            images = list(clip.frames)
        assert [image.shape for image in images] == [(32, 48, 3)] * 20
        assert all(image.dtype == np.uint8 for image in images)
        np.testing.assert_allclose([image.mean() for image in images], np.arange(20) * 10, atol=3)

    def test_odd_sides_are_padded(self, tmp_path: Path) -> None:
        with open_video(film(Location.of(tmp_path / "a.mp4"), 2, 31, 47)) as clip:
            assert next(clip.frames).shape == (32, 48, 3)

    def test_a_video_can_lie_in_another_store(self) -> None:
        with open_video(film(Location.of("memory://video-test/a.mp4"), 3)) as clip:
            assert len(list(clip.frames)) == 3

    def test_nothing_is_left_of_a_video_that_was_not_finished(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), new_video(Location.of(tmp_path / "a.mp4"), Fraction(10)) as add:
            add(grey(0))
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_damage_is_said_after_the_frames_before_it(self, tmp_path: Path) -> None:
        import av

        file = tmp_path / "a.avi"
        with av.open(str(file), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(20):
                noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            container.mux(stream.encode())
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        num_frames = 0
        with (
            pytest.raises(BadFrame, match=r"truncated: .* after \d+ (of 20 )?frames"),
            open_video(Location.of(file)) as clip,
        ):
            for _ in clip.frames:
                num_frames += 1
        assert 0 < num_frames < 20

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "unreadable"),
            (b"hello", "unreadable"),
            (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "unreadable"),  # a list of other files
            (b"ffconcat version 1.0\nfile 'other.mp4'\n", "unreadable"),
            (None, "missing"),
        ],
    )
    def test_what_is_no_video_is_said(self, tmp_path: Path, data: bytes | None, reason: str) -> None:
        film(Location.of(tmp_path / "other.mp4"), 1)
        if data is not None:
            (tmp_path / "a.mp4").write_bytes(data)
        with pytest.raises(BadFrame, match=reason), open_video(Location.of(tmp_path / "a.mp4")):
            pass

    def test_frames_too_large_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = film(Location.of(tmp_path / "a.mp4"), 1)
        monkeypatch.setattr("nightseg.data.video.MAX_PIXELS", 32 * 48 - 1)
        with pytest.raises(BadFrame, match="decompression_bomb: frames of 1536 pixels"), open_video(file):
            pass
