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
DONE, STOPPED, FAILED = "done", "stopped", "failed"


class Records:
    """The trials of a search; `rows` in the order in which they were proposed.

    A row: its `number`, `trial` (name of its run folder), `label`, `values`, `end` (null while it is at work), score
    under the name of the metric, `curve` of [epoch, score], `epochs`, `seconds`, `error`, `std` and `seeds` if it was
    trained with several, `trainings` that it ran and stages that it `reused`.
    """

    def __init__(self, folder: Location, search: Search, name_of: Callable[[Mapping[str, Any]], str]) -> None:
        """Trials of another recipe or outside of this space are kept, but do not count.

        Trials that failed are asked again, and all are if they are compared or stopped by another score now: they find
        what they have committed.
        """
        self.place, self.search, self._name_of = folder / RECORDS_NAME, search, name_of
        before = _read(self.place)
        known = [*before.get("trials", []), *before.get("others", [])]
        self.rows = [row for row in known if search.holds(row["values"]) and row["trial"] == name_of(row["values"])]
        self.rows.sort(key=lambda row: int(row["number"]))
        self.others = [row for row in known if row not in self.rows]
        self.importance: dict[str, float] = before.get("importance", {})
        is_judged_anew = before.get("judgement") != hash_of(search.judgement)
        self._again = [row for row in self.rows if row["end"] in (None, FAILED) or is_judged_anew]
        for row in self._again:
            row["end"] = None
        self._seconds, self._since = float(before.get("seconds", 0.0)), time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the search has been at work, in all its starts."""
        return self._seconds + time.monotonic() - self._since

    @property
    def is_late(self) -> bool:
        return self.search.hours is not None and self.seconds >= 3600 * self.search.hours

    def next(self, propose: Callable[[Search, int, list[dict[str, Any]]], dict[str, Any] | None]) -> Any:
        """The row of the next trial, one that was under way first; None if there is no more to do. It is noted."""
        if self.is_late:
            return None
        if self._again:
            row = self._again.pop(0)
        else:
            if len(self.rows) >= self.search.trials:
                return None
            number = 1 + max((int(row["number"]) for row in [*self.rows, *self.others]), default=0)
            values = propose(self.search, number, self.rows)
            if values is None:
                return None
            row = {"number": number, "trial": self._name_of(values), "label": self.search.label(values)}
            row |= {"values": values, "end": None, "curve": [], "error": None}
            self.rows.append(row)
        self.write()
        return row

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to do, as far as that is known without asking for values."""
        enough = len(self.rows) >= min(self.search.trials, self.search.size)
        return self.is_late or (enough and not self._again)

    def end(self, row: dict[str, Any], **facts: Any) -> None:
        row |= facts
        self.write()

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The trials that have ended, best first; those that came to their end before those that were stopped."""
        sign = -1 if self.search.mode == "max" else 1
        ended = [row for row in self.rows if row["end"] is not None]
        return sorted(ended, key=lambda row: (row["end"] != DONE, sign * (row.get(self.search.metric) or 0.0)))

    @property
    def best(self) -> dict[str, Any] | None:
        """The best that came to its end: a trial that was stopped early has no model to show."""
        return next((row for row in self.ranked if row["end"] == DONE), None)

    def content(self) -> dict[str, Any]:
        return {
            "search": self.search.model_dump(mode="json"),
            "judgement": hash_of(self.search.judgement),
            "seconds": round(self.seconds, 3),
            "best": self.best,
            "importance": self.importance,
            "trials": self.rows,
            "others": self.others,
        }

    def write(self) -> None:
        self.place.write_json(self.content())


def _read(place: Location) -> dict[str, Any]:
    """What is there; nothing where there is no file, or one that is damaged: the run folders of the trials still are,
    and the same values are proposed again."""
    try:
        found = place.read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("trials"), list) else {}
