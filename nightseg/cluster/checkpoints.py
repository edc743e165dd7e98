"""Checkpoints of a training: written whole or not at all, checked when read, the last two kept.

Ray Train can keep checkpoints too, but its list of them (`checkpoint_manager_snapshot.json`, Ray 2.60) is overwritten
in place: a kill between truncating and writing leaves a run that never starts again, and so does a damaged checkpoint
or another version of Ray. Files that carry their own hash need no list.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nightseg.errors import UserError
from nightseg.storage import Location, sha256_of

NUM_KEPT = 2
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. `report` counts from 1; `history` has the metrics of every report up to it."""

    report: int
    state: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder, local or remote. Picklable."""

    folder: Location

    def save(self, report: int, state: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Writes a checkpoint, then forgets all but the last two.

        `state`: tensors, numbers, strings, None and dicts, lists, tuples of them: what `weights_only` can read back.
        Raises TypeError at the first checkpoint for anything else, rather than when a resume needs it.
        """
        stream = io.BytesIO()
        torch.save({"report": report, "state": dict(state), "history": history}, stream)
        data = stream.getbuffer()
        if not self._names():
            self._check_readable(data)
        place = self.folder / _name(report)
        (place / "state.pt").write_bytes(data)
        (place / "state.sha256").write_bytes(sha256_of(data).encode())  # last: it makes the checkpoint count
        for old in self._names()[:-NUM_KEPT]:
            (self.folder / old).delete()

    def newest(self, warn: Callable[[str], None] = _LOG.warning) -> Snapshot | None:
        """The newest whole checkpoint, tensors on the CPU; None without any. Each damaged one is told to `warn`.

        Raises UserError when there are checkpoints but none is whole: starting anew in silence would hide a loss.
        """
        damaged = []
        for name in reversed(self._names()):
            snapshot = self._read(name, warn)
            if snapshot is not None:
                return snapshot
            damaged.append(name)
        if damaged:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({', '.join(damaged)}); delete this folder to train anew"
            )
        return None

    def _read(self, name: str, warn: Callable[[str], None]) -> Snapshot | None:
        place = self.folder / name
        try:
            data = (place / "state.pt").read_bytes()
            if (place / "state.sha256").read_bytes().decode("ascii", "replace").strip() != sha256_of(data):
                raise ValueError("its content does not match its hash")
            body = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return Snapshot(int(body["report"]), body["state"], body["history"])
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            warn(f"checkpoint {place} is damaged and left out: {error}")
            return None

    def _names(self) -> list[str]:
        """Folders of finished checkpoints, oldest first. One whose writer was killed has no hash and does not count."""
        return sorted(self._finished())

    def _finished(self) -> Iterator[str]:
        try:
            entries = self.folder.list(recursive=True)
        except FileNotFoundError:
            return
        for entry in entries:
            name, _, file = entry.name.partition("/")
            if file == "state.sha256" and name.startswith("report-"):
                yield name

    def _check_readable(self, data: memoryview) -> None:
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            first_line = str(error).partition("\n")[0]
            raise TypeError(f"a training state holds what a checkpoint may not hold: {first_line}") from error


def _name(report: int) -> str:
    return f"report-{report:08d}"
