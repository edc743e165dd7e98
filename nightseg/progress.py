"""Progress of long work: rich's bars on a terminal, otherwise a line every few seconds that a log can keep.

The lines are ours: rich redraws what it shows, and its rate counts what an earlier run had finished.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_RATE = 60.0  # the rate and the time left follow the last minute
SECONDS_OF_SKIPPING = 1.0  # what comes this early was finished by an earlier run, and is left out of the rate


class Task(Protocol):
    """One piece of work that is under way. Safe to advance from any thread."""

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        """`count` more units are done; `metrics` (loss, miou, frames/s) stand beside the bar until replaced."""


class Progress(Protocol):
    """Where work reports how far it is."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Opens a task of `total` units (None = unknown), named in the plural: frames, steps."""

    def say(self, message: str) -> None:
        """One line to the reader, above any live display."""


def progress_for(stream: TextIO | None = None, quiet: bool = False) -> Progress:
    """Live bars if `stream` (default: standard error) is a terminal, else lines; nothing when `quiet`."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return SilentProgress()
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveProgress(console)
    return LineProgress(stream)


def printable(text: str) -> str:
    """`text` safe for a terminal, on one line: no control characters or direction overrides, line breaks as spaces."""
    shown = (character if character.isprintable() else " " if character.isspace() else "" for character in text)
    return "".join(shown)


class SilentProgress:
    """Says nothing; for tests, and where nobody reads."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        yield self

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class Named:
    """Progress of one of several pieces of work at a time: what it says begins with `name`, unless it has `word`."""

    def __init__(self, progress: Progress, name: str, word: str) -> None:
        self._progress, self._name = progress, name
        self._word = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        return self._progress.task(self._told(title), total, unit)

    def say(self, message: str) -> None:
        self._progress.say(self._told(message))

    def _told(self, text: str) -> str:
        return text if self._word.search(text) else f"{self._name}: {text}"


class LineProgress:
    """A line at the start and the end of each task and about every `seconds` between. `clock` is monotonic seconds."""

    def __init__(
        self, stream: TextIO, seconds: float = SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self.seconds = seconds
        self.clock = clock
        self._lock = threading.Lock()

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        task = _LineTask(self, title, total, unit)
        self.say(task.line())
        try:
            yield task
        except BaseException:
            self.say(task.close("stopped"))
            raise
        self.say(task.close("done"))

    def say(self, message: str) -> None:
        # one write a line, under a lock: lines of several threads never mix
        with self._lock:
            self._stream.write(printable(message) + "\n")
            self._stream.flush()


class _LineTask:
    def __init__(self, log: LineProgress, title: str, total: int | None, unit: str) -> None:
        self._log, self._title, self._total, self._unit = log, title, total, unit
        self._lock = threading.Lock()
        self._done = 0
        self._metrics: dict[str, float | str] = {}
        self._started = self._last_line = log.clock()
        self._first = (self._started, 0)
        self._marks = deque([self._first])
        self._is_open = True

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        with self._lock:
            self._done += count
            self._metrics.update(metrics)
            now = self._log.clock()
            if now - self._started < SECONDS_OF_SKIPPING:
                self._first = (now, self._done)
                self._marks[0] = self._first
            elif now - self._marks[-1][0] >= 1.0:
                self._marks.append((now, self._done))
                while len(self._marks) > 2 and now - self._marks[0][0] > SECONDS_OF_RATE:
                    self._marks.popleft()
            is_due = self._is_open and now - self._last_line >= self._log.seconds
            if is_due:
                self._last_line = now
        if is_due:
            self._log.say(self.line())

    def line(self) -> str:
        """Like `[translate] 128/400 frames  32%  15.2 frames/s  18 s left  loss 0.31`."""
        with self._lock:
            rate = self._rate_since(self._marks[0])
            parts = [*self._amount(), *self._speed(rate)]
            if rate > 0 and self._total is not None and self._total > self._done:
                parts.append(f"{duration((self._total - self._done) / rate)} left")
            return "  ".join([*parts, *self._extras()])

    def close(self, ending: str) -> str:
        """The last line: totals, the mean rate, and how long it took. Later calls of `advance` print nothing."""
        with self._lock:
            self._is_open = False
            ending = f"{ending} in {duration(self._log.clock() - self._started)}"
            return "  ".join([*self._amount(), *self._speed(self._rate_since(self._first)), ending, *self._extras()])

    def _rate_since(self, mark: tuple[float, int]) -> float:
        seconds = self._log.clock() - mark[0]
        return (self._done - mark[1]) / seconds if seconds > 0 else 0.0

    def _amount(self) -> list[str]:
        if self._total is None:
            return [f"[{self._title}] {self._done} {self._unit}"]
        share = [f"{self._done / self._total:.0%}"] if self._total else []
        return [f"[{self._title}] {self._done}/{self._total} {self._unit}", *share]

    def _speed(self, rate: float) -> list[str]:
        key = f"{self._unit}/s"
        return [f"{_number(rate)} {key}"] if rate > 0 and key not in self._metrics else []

    def _extras(self) -> list[str]:
        return [format_metrics(self._metrics)] if self._metrics else []


class LiveProgress:
    """Bars of all open tasks at the bottom of a terminal, drawn by rich."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: rich.progress.Progress | None = None
        self._num_open = 0

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        bars = self._enter()
        number = bars.add_task(printable(title), total=total, unit=printable(unit), metrics="")
        try:
            yield _LiveTask(bars, number)
        finally:
            bars.stop_task(number)
            self._leave()

    def say(self, message: str) -> None:
        self._console.print(printable(message), markup=False, highlight=False)

    def _enter(self) -> rich.progress.Progress:
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            self._num_open += 1
            return self._bars

    def _leave(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def _bars(console: rich.console.Console) -> rich.progress.Progress:
    # imported here because only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: rich.progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{_number(speed)} {task.fields['unit']}/s" if speed else "")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[metrics]}", markup=False),
        console=console,
        speed_estimate_period=SECONDS_OF_RATE,
    )


class _LiveTask:
    def __init__(self, bars: rich.progress.Progress, number: rich.progress.TaskID) -> None:
        self._bars, self._number = bars, number
        self._lock = threading.Lock()
        self._metrics: dict[str, float | str] = {}

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        with self._lock:
            self._metrics.update(metrics)
            text = format_metrics(self._metrics)
        self._bars.update(self._number, advance=count, metrics=printable(text))


def format_metrics(metrics: Mapping[str, float | str]) -> str:
    """`loss 0.31  miou 0.52`; a rate by its name reads `15.2 frames/s`. Others with a slash are for programs."""
    shown = {name: value for name, value in metrics.items() if "/" not in name or name.endswith("/s")}
    texts = {name: _number(value) if isinstance(value, float | int) else value for name, value in shown.items()}
    return "  ".join(f"{text} {name}" if name.endswith("/s") else f"{name} {text}" for name, text in texts.items())


def duration(seconds: float) -> str:
    """`18 s`, `4 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
