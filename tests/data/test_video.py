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
    assert upright(image_HWC, (1, 0, 0, 1)).tolist() == [[a, b], [c, d]]
    assert upright(image_HWC, (0, -1, 1, 0)).tolist() == [[b, d], [a, c]]  # counterclockwise: right becomes up
    assert upright(image_HWC, (0, 1, -1, 0)).tolist() == [[c, a], [d, b]]
    assert upright(image_HWC, (-1, 0, 0, -1)).tolist() == [[d, c], [b, a]]
    assert upright(image_HWC, (-1, 0, 0, 1)).tolist() == [[b, a], [d, c]]  # mirrored, as selfies are
    assert upright(image_HWC, (1, 0, 0, -1)).tolist() == [[c, d], [a, b]]
    assert upright(image_HWC, (0, 1, 1, 0)).tolist() == [[a, c], [b, d]]
    assert upright(image_HWC, (0, -1, -1, 0)).tolist() == [[d, b], [c, a]]
    assert upright(image_HWC, (2, 0, 0, 2)).tolist() == [[a, b], [c, d]]  # sizes are the film's own


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


# -- films as cameras, phones and editors write them -------------------------------------------------------------------


class Film:
    """A film of grey frames 0, 10, 20, ..., written packet by packet."""

    def __init__(self, file: Path, codec: str = "mpeg4", pixels: str = "yuv420p", options: Any = None, **muxer: str):
        self.av = pytest.importorskip("av")
        self.container = self.av.open(str(file), "w", options=muxer)
        self.others: list[Any] = []
        self.codec, self.pixels, self.options = codec, pixels, options

    def film(self) -> Any:
        stream = self.container.add_stream(self.codec, rate=10, options=self.options)
        stream.width, stream.height, stream.pix_fmt = 48, 32, self.pixels
        return stream

    def packets(self, stream: Any, images: Any) -> list[Any]:
        made = [self.av.VideoFrame.from_ndarray(image, format="rgb24") for image in images]
        return [packet for picture in [*made, None] for packet in stream.encode(picture)]

    def write(self, packets: list[Any]) -> None:
        for packet in packets:
            self.container.mux(packet)
        self.container.close()


def greys(num_frames: int = 20) -> list[np.ndarray]:
    return [grey(10 * number) for number in range(num_frames)]


def noises(num_frames: int = 20) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8) for i in range(num_frames)]


def values(file: Path) -> list[int]:
    """Frames as tens of grey."""
    with open_video(Location.of(file)) as clip:
        return [round(float(image.mean()) / 10) for image in clip.frames]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("suffix", "codec", "is_marked"),
    [
        *(("mp4", "png", True), ("mp4", "png", False), ("mov", "mjpeg", False), ("mp4", "mjpeg", True)),
        *(("mkv", "mjpeg", False), ("mkv", "mjpeg", True)),
    ],
)
def test_a_cover_is_not_the_film(tmp_path: Path, suffix: str, codec: str, is_marked: bool, is_first: bool) -> None:
    file = tmp_path / f"a.{suffix}"
    writer = Film(file)
    film = None if is_first else writer.film()
    cover = writer.container.add_stream(codec, rate=1)
    cover.width, cover.height, cover.pix_fmt = 96, 96, "rgb24" if codec == "png" else "yuvj420p"
    if is_marked:
        cover.disposition = writer.av.stream.Disposition.attached_pic
    film = film or writer.film()
    writer.write(writer.packets(film, greys()) + writer.packets(cover, [grey(250, 96, 96)]))
    assert values(file) == list(range(20))


def test_of_two_films_one_is_read_and_it_is_said_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Film(tmp_path / "a.mp4")
    first, second = writer.film(), writer.film()
    writer.write(writer.packets(first, greys(5)) + writer.packets(second, greys(5)))
    assert values(tmp_path / "a.mp4") == list(range(5))
    assert "a.mp4 holds 2 videos: number 1 is read" in caplog.text


@pytest.mark.parametrize("hidden", [1, 3, 7])
def test_frames_that_an_edit_list_hides_are_not_missing(tmp_path: Path, hidden: int) -> None:
    """Times below zero become an edit list that starts later; every fifth frame is a key frame."""
    writer = Film(tmp_path / "a.mp4", options={"g": "5"}, avoid_negative_ts="disabled")
    packets = writer.packets(writer.film(), greys())
    for packet in packets:
        packet.pts = packet.dts = packet.pts - hidden  # in tenths of a second
    writer.write(packets)
    assert values(tmp_path / "a.mp4") == list(range(hidden, 20))
    with open_video(Location.of(tmp_path / "a.mp4")) as clip:
        assert clip.length == 20 - hidden


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
def test_a_film_that_was_turned_is_shown_upright(tmp_path: Path, degrees: int, codec: str) -> None:
    corner = grey(0)
    corner[:16, :24] = 240  # top left
    writer = Film(tmp_path / "a.mp4", codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    stream = writer.film()
    stream.set_display_rotation(degrees)
    writer.write(writer.packets(stream, [corner] * 3))
    with open_video(Location.of(tmp_path / "a.mp4")) as clip:
        image = next(clip.frames)
    np.testing.assert_allclose(image, np.rot90(corner, degrees // 90), atol=16)  # lossy


def test_a_film_that_was_mirrored_is_shown_upright(tmp_path: Path) -> None:
    left = grey(0)
    left[:, :24] = 240
    writer = Film(tmp_path / "a.mp4")
    stream = writer.film()
    stream.set_display_matrix([-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30])
    writer.write(writer.packets(stream, [left] * 3))
    with open_video(Location.of(tmp_path / "a.mp4")) as clip:
        np.testing.assert_allclose(next(clip.frames), left[:, ::-1], atol=16)


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        *(("ffv1", "yuv420p10le"), ("ffv1", "gray"), ("ffv1", "gray10le"), ("ffv1", "yuva420p"), ("ffv1", "yuv444p")),
        *(("mjpeg", "yuvj420p"), ("libx264", "yuvj420p"), ("libx264", "yuv422p")),
    ],
)
def test_pixels_of_any_format_become_rgb(tmp_path: Path, codec: str, pixels: str) -> None:
    writer = Film(tmp_path / "a.mkv", codec, pixels)
    writer.write(writer.packets(writer.film(), [grey(value) for value in (0, 120, 250)]))
    with open_video(Location.of(tmp_path / "a.mkv")) as clip:
        # Full range stays 0 and 250: 16 and 230 would be limited range taken for full.
        np.testing.assert_allclose([image.mean() for image in clip.frames], [0, 120, 250], atol=3)


def test_times_of_frames_do_not_matter(tmp_path: Path) -> None:
    writer = Film(tmp_path / "a.mkv")
    packets = writer.packets(writer.film(), greys(6))
    for packet, tenths in zip(packets, (-7, 0, 1, 40, 41, 90), strict=True):
        packet.pts = packet.dts = tenths
    writer.write(packets)
    assert values(tmp_path / "a.mkv") == list(range(6))


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_frames_whose_reference_was_cut_off_are_not_shown(tmp_path: Path, suffix: str) -> None:
    """A copy from the second key frame on: the B-frames shown before it need the first, open group of pictures."""
    options = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"}
    writer = Film(tmp_path / f"a.{suffix}", "libx264", options=options)
    packets = writer.packets(writer.film(), greys(24))
    second = [index for index, packet in enumerate(packets) if packet.is_keyframe][1]
    leading = sum(packet.pts < packets[second].pts for packet in packets[second:])
    shown = [packet.pts for packet in packets[second:] if packet.pts >= packets[second].pts]
    assert leading > 0
    writer.write(packets[second:])
    found = values(tmp_path / f"a.{suffix}")
    assert found[-len(shown) :] == sorted(shown) and len(found) <= len(shown) + leading


def test_a_film_beside_sound_and_data_is_read(tmp_path: Path) -> None:
    writer = Film(tmp_path / "a.mkv")
    sound = writer.container.add_stream("pcm_s16le", rate=8000, layout="mono")
    film = writer.film()
    silence = writer.av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
    silence.sample_rate = 8000
    writer.write([*sound.encode(silence), *sound.encode(None), *writer.packets(film, greys(4))])
    assert values(tmp_path / "a.mkv") == [0, 1, 2, 3]


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    writer = Film(tmp_path / "a.mkv")
    sound = writer.container.add_stream("pcm_s16le", rate=8000, layout="mono")
    silence = writer.av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
    silence.sample_rate = 8000
    writer.write([*sound.encode(silence), *sound.encode(None)])
    with pytest.raises(BadFrame, match="holds no video"):
        values(tmp_path / "a.mkv")


@pytest.mark.parametrize(
    ("suffix", "codec", "muxer"),
    [
        ("mp4", "mpeg4", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("mkv", "libx264", {}),
        ("webm", "libvpx", {}),
        ("avi", "mpeg4", {}),
        ("mov", "mjpeg", {"movflags": "faststart"}),
    ],
)
@pytest.mark.parametrize("kept", [0.66, 0.97])
def test_a_film_that_was_cut_short_is_said_to_be(
    tmp_path: Path, suffix: str, codec: str, muxer: dict[str, str], kept: float
) -> None:
    file = tmp_path / f"a.{suffix}"
    writer = Film(file, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p", **muxer)
    writer.write(writer.packets(writer.film(), noises()))
    assert len(values(file)) == 20
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(BadFrame, match="truncated"):
        values(file)


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "mpeg4"), ("mov", "mjpeg"), ("ts", "mpeg4"), ("mp4", "mpeg4")])
def test_a_hole_in_a_film_is_not_painted_over(tmp_path: Path, suffix: str, codec: str) -> None:
    file = tmp_path / f"a.{suffix}"
    writer = Film(file, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    writer.write(writer.packets(writer.film(), noises()))
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    file.write_bytes(data)
    with pytest.raises(BadFrame, match="damaged after"):
        values(file)


def test_an_avi_without_index_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.avi"
    writer = Film(file)
    writer.write(writer.packets(writer.film(), greys()))
    data = file.read_bytes()
    file.write_bytes(data[: data.rindex(b"idx1")])
    assert values(file) == list(range(20))


def test_a_film_without_frames_is_said(tmp_path: Path) -> None:
    writer = Film(tmp_path / "a.mkv")
    writer.film()
    writer.container.start_encoding()
    writer.container.close()
    with pytest.raises(BadFrame, match=r"no frame in it|no intact video"):
        values(tmp_path / "a.mkv")
