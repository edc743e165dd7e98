"""Progress lines say how far, how fast and how long, and stay readable whatever is in a name."""

import contextlib
import io
import os
import pty
import re
import threading
from pathlib import Path

import pytest

from nightseg.progress import (
    LineProgress,
    LiveProgress,
    Named,
    SilentProgress,
    duration,
    format_metrics,
    printable,
    progress_for,
)


class Clock:
    """Monotonic seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[str]:
    assert stream.getvalue().endswith("\n")
    return stream.getvalue().splitlines()


def test_work_beside_other_work_says_its_name_unless_it_does_already(stream: io.StringIO, clock: Clock) -> None:
    progress = Named(LineProgress(stream, clock=clock), "select/a.b", "a.b")
    with progress.task("choose by random", None, "iterations"), progress.task("train a.b", None, "steps"):
        progress.say("model a.b: a word")
        progress.say("model a.b2: a word")
    assert lines(stream)[:4] == [
        "[select/a.b: choose by random] 0 iterations",
        "[train a.b] 0 steps",
        "model a.b: a word",
        "select/a.b: model a.b2: a word",
    ]


def test_a_task_starts_tells_now_and_then_and_ends(stream: io.StringIO, clock: Clock) -> None:
    with LineProgress(stream, clock=clock).task("translate", 400, "frames") as task:
        for _ in range(100):
            clock.now += 0.25
            task.advance(4, loss=0.3141)
    # 16 frames/s; the first second is not counted: what comes that early may have been finished before
    assert lines(stream) == [
        "[translate] 0/400 frames  0%",
        "[translate] 80/400 frames  20%  16 frames/s  20 s left  loss 0.314",
        "[translate] 160/400 frames  40%  16 frames/s  15 s left  loss 0.314",
        "[translate] 240/400 frames  60%  16 frames/s  10 s left  loss 0.314",
        "[translate] 320/400 frames  80%  16 frames/s  5 s left  loss 0.314",
        "[translate] 400/400 frames  100%  16 frames/s  loss 0.314",
        "[translate] 400/400 frames  100%  16 frames/s  done in 25 s  loss 0.314",
    ]


def test_shards_of_an_earlier_run_do_not_flatter_the_rate(stream: io.StringIO, clock: Clock) -> None:
    with LineProgress(stream, clock=clock).task("score", 1000, "frames") as task:
        task.advance(900)
        clock.now += 10.0
        task.advance(10)
    assert lines(stream)[1] == "[score] 910/1000 frames  91%  1 frames/s  1 min 30 s left"
    assert lines(stream)[2] == "[score] 910/1000 frames  91%  1 frames/s  done in 10 s"


def test_the_rate_follows_the_last_minute(stream: io.StringIO, clock: Clock) -> None:
    with LineProgress(stream, clock=clock).task("train", 10_000, "steps") as task:
        for second in range(300):
            clock.now += 1.0
            task.advance(10 if second < 150 else 2)
    assert "  2 steps/s  " in lines(stream)[-2]
    assert "  6 steps/s  done in 5 min 0 s" in lines(stream)[-1]


def test_a_total_may_be_unknown_or_nothing(stream: io.StringIO, clock: Clock) -> None:
    progress = LineProgress(stream, clock=clock)
    with progress.task("hash", None, "files") as task:
        clock.now += 8.0
        task.advance(4)
    with progress.task("empty", 0, "frames"):
        pass
    assert lines(stream) == [
        "[hash] 0 files",
        "[hash] 4 files  0.5 files/s",
        "[hash] 4 files  0.5 files/s  done in 8 s",
        "[empty] 0/0 frames",
        "[empty] 0/0 frames  done in 0 s",
    ]


def test_a_task_that_fails_says_where_it_stopped(stream: io.StringIO, clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), LineProgress(stream, clock=clock).task("train", 10, "steps") as task:
        clock.now += 3.0
        task.advance(2)
        raise KeyboardInterrupt
    assert lines(stream)[-1] == "[train] 2/10 steps  20%  0.667 steps/s  stopped in 3 s"


def test_nothing_is_said_after_the_end(stream: io.StringIO, clock: Clock) -> None:
    with LineProgress(stream, clock=clock).task("train", 10, "steps") as task:
        pass
    before = stream.getvalue()
    clock.now += 100.0
    task.advance(1)
    assert stream.getvalue() == before


def test_a_rate_that_is_told_replaces_the_measured_one(stream: io.StringIO, clock: Clock) -> None:
    with LineProgress(stream, clock=clock).task("train", 10, "frames") as task:
        clock.now += 10.0
        metrics: dict[str, float | str] = {"frames/s": 123.4, "miou": 0.5123, "device": "cpu"}
        task.advance(5, **metrics)
    assert lines(stream)[1] == "[train] 5/10 frames  50%  10 s left  123 frames/s  miou 0.512  device cpu"


def test_names_cannot_steer_the_terminal(stream: io.StringIO, clock: Clock) -> None:
    progress = LineProgress(stream, clock=clock)
    progress.say("quarantined a\x1b[2Jb\r\nc\u202egnp.exe\x07 größe 日本 é.png")
    with progress.task("tr\x1b[31m", 1, "frames"):
        pass
    assert lines(stream)[0] == "quarantined a[2Jb  cgnp.exe größe 日本 é.png"
    assert lines(stream)[1] == "[tr[31m] 0/1 frames  0%"
    assert printable("a\tb\udcff") == "a b"


def test_threads_lose_no_count_and_mix_no_lines(stream: io.StringIO) -> None:
    ticks = iter(range(1_000_000))
    progress = LineProgress(stream, seconds=50, clock=lambda: float(next(ticks)))
    with progress.task("train", 8000, "steps") as task:

        def poll() -> None:
            for _ in range(1000):
                task.advance(1, loss=0.5)
                progress.say("word " * 20)

        threads = [threading.Thread(target=poll) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told = lines(stream)
    assert told[-1].startswith("[train] 8000/8000 steps  100%")
    assert all(line == "word " * 20 or re.match(r"\[train] \d+/8000 steps", line) for line in told)


def test_numbers_are_short() -> None:
    metrics: dict[str, float | str] = {
        "loss": 1234.5678,
        "step": 12,
        "rate": 1e-4,
        "big": 3e7,
        "frames/s": 9.876,
        "who": "me",
    }
    assert format_metrics(metrics) == "loss 1235  step 12  rate 0.0001  big 3e+07  9.88 frames/s  who me"
    assert format_metrics({"loss": float("nan")}) == "loss nan"
    assert [duration(seconds) for seconds in (0.2, 59.4, 59.9, 245, 3599.6, 12_000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "4 min 5 s",
        "1 h 0 min",
        "3 h 20 min",
    ]


# -- which one -------------------------------------------------------------------------------------------------------


def test_a_file_gets_lines_and_quiet_gets_nothing(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream:
        assert isinstance(progress_for(stream), LineProgress)
        quiet = progress_for(stream, quiet=True)
        assert isinstance(quiet, SilentProgress)
        with quiet.task("a", 1, "frames") as task:
            task.advance()
        quiet.say("hello")
    assert (tmp_path / "log").read_text() == ""


class Terminal:
    """A pseudo-terminal: `stream` to write to; a thread keeps what arrived, because its buffer is small."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w")
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the way a terminal tells that its writer is gone
            while part := os.read(self._reader, 4096):
                self._parts.append(part)

    def close(self) -> str:
        self.stream.close()
        self._thread.join()
        return b"".join(self._parts).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_a_terminal_gets_bars(terminal: Terminal) -> None:
    progress = progress_for(terminal.stream)
    assert isinstance(progress, LiveProgress)
    with progress.task("translate [red]", 4, "frames") as task:
        with progress.task("inner\x1b[2J", None, "steps") as inner:
            inner.advance(1)
        task.advance(4, loss=0.25)
        progress.say("hello [bold]there\x1b[31m")
    with progress.task("again", 1, "frames") as task:
        task.advance()
    shown = terminal.close()
    for text in ("translate [red]", "4/4", "frames", "loss 0.25", "hello [bold]there[31m", "again", "1/1"):
        assert text in shown
    assert "\x1b[2J" not in shown


def test_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_for(terminal.stream), LineProgress)
    assert terminal.close() == ""
