"""What a search has done: values -> trial and how it ended, in `trials.json` of its folder. One writer, the driver.

A trial stands there before it begins and again when it has ended, so a search that was killed knows both what is done
and what was under way. Neither Tune's nor Optuna's own state is ever read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from nightseg.pipeline.search.settings import Search
from nightseg.storage import Location, hash_of

RECORDS_NAME: Final = "trials.json"
DONE, STOPPED, FAILED = ENDS = "done", "stopped", "failed"


class Records:
    """The trials of a search; `rows` in the order in which they were proposed.

    A row: its `number`, `trial` (name of its run folder), `label`, `values`, the hash of the `judgement` that it was
    asked by, `end` (null while it is at work), score under the name of the metric, `curve` of [epoch, validation],
    `epochs`, `seconds`, `error`, `std` and `seeds` if it was trained with several, `trainings` that it ran, stages that
    it `reused`, and `is_trained` if it is asked again and had come to its end.
    """

    def __init__(self, folder: Location, search: Search, name_of: Callable[[Mapping[str, Any]], str]) -> None:
        """Trials of another recipe, outside of this space, or that were compared or stopped by another score are kept
        in `others`, but do not count.

        Those that were judged otherwise are asked again: they find what they have committed. So are trials that failed.
        """
        self.place, self.search, self._name_of = folder / RECORDS_NAME, search, name_of
        self.judgement = hash_of(search.judgement)[:12]
        before = _read(self.place)
        known = sorted([*before.get("trials", []), *before.get("others", [])], key=_number)
        same = [row for row in known if search.holds(row["values"]) and row["trial"] == name_of(row["values"])]
        self.rows = [row for row in same if row.get("judgement") == self.judgement]
        self.others = [row for row in known if row not in self.rows]
        self.importance: dict[str, float] = before.get("importance", {})
        self._again = [row for row in same if row["end"] in (None, FAILED) or row not in self.rows]
        self._is_exhausted = False
        self._seconds, self._since = float(before.get("seconds", 0.0)), time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the search has been at work, in all its starts."""
        return self._seconds + time.monotonic() - self._since

    @property
    def is_late(self) -> bool:
        return self.search.hours is not None and self.seconds >= 3600 * self.search.hours

    @property
    def again(self) -> list[dict[str, Any]]:
        """The trials to ask again now. When the time is over, those whose trainings are committed: they cost little."""
        return [row for row in self._again if not self.is_late or _is_trained(row)]

    def next(self, propose: Callable[[Search, int, list[dict[str, Any]]], dict[str, Any] | None]) -> Any:
        """The row of the next trial, one that was known before first; None if there is no more to do. It is noted."""
        again = self.again
        if again:
            before = again[0]
            for rows in (self._again, self.rows, self.others):
                rows[:] = [row for row in rows if row is not before]
            row = self._row(before["number"], before["values"])
            if _is_trained(before):
                row["is_trained"] = True
        else:
            if self.is_late or len(self.rows) >= self.search.trials:
                return None
            number = 1 + max((int(row["number"]) for row in [*self.rows, *self.others]), default=0)
            values = propose(self.search, number, self.rows)
            if values is None:
                self._is_exhausted = True
                return None
            row = self._row(number, values)
        self.rows.append(row)
        self.rows.sort(key=_number)
        self.write()
        return row

    def _row(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        row = {"number": number, "trial": self._name_of(values), "label": self.search.label(values), "values": values}
        return row | {"judgement": self.judgement, "end": None, "curve": [], "error": None}

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to do, as far as that is known without asking for values."""
        enough = len(self.rows) >= min(self.search.trials, self.search.size)
        return not self.again and (self.is_late or enough)

    @property
    def shortfall(self) -> str | None:
        """Why there are fewer trials than were asked for, once there is no more to do."""
        found, asked = len(self.rows), self.search.trials
        are_at_work = any(row["end"] is None and row not in self._again for row in self.rows)
        if found >= asked or are_at_work:
            return None
        if self._is_exhausted or found >= self.search.size:
            why = f"only {found} different values"
        elif self.is_late:
            why = "the time was over"
        else:
            return None
        return f"{why}: ended after {found} of {asked} trials"

    def end(self, row: dict[str, Any], **facts: Any) -> None:
        row |= facts
        self.write()

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The trials that have ended, best first: those that came to their end, those that were stopped, and in the
        order of their numbers those that failed."""
        sign, metric = -1 if self.search.mode == "max" else 1, self.search.metric

        def place(row: Mapping[str, Any]) -> tuple[int, float]:
            return ENDS.index(row["end"]), 0.0 if row["end"] == FAILED else sign * row[metric]

        return sorted((row for row in self.rows if row["end"] is not None), key=place)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best that came to its end: a trial that was stopped early has no model to show."""
        return next((row for row in self.ranked if row["end"] == DONE), None)

    def content(self) -> dict[str, Any]:
        return {
            "search": self.search.model_dump(mode="json"),
            "seconds": round(self.seconds, 3),
            "shortfall": self.shortfall,
            "best": self.best,
            "importance": self.importance,
            "trials": self.rows,
            "others": self.others,
        }

    def write(self) -> None:
        self.place.write_json(self.content())


def _number(row: Mapping[str, Any]) -> int:
    return int(row["number"])


def _is_trained(row: Mapping[str, Any]) -> bool:
    return bool(row["end"] == DONE or row.get("is_trained"))


def _read(place: Location) -> dict[str, Any]:
    """What is there; nothing where there is no file, or one that is damaged: the run folders of the trials still are,
    and the same values are proposed again."""
    try:
        found = place.read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("trials"), list) else {}
