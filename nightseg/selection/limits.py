"""What a choice of frames must respect beside its scores: neighbours in a drive, and near duplicates, teach the same.

N frames of the pool, d feature dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.errors import UserError
from nightseg.selection.rows import StoredRows, as_rows, parts_of
from nightseg.selection.settings import Selection

Indices = npt.NDArray[np.int64]

_NONE: Indices = np.empty(0, dtype=np.int64)
_COSINE_ERROR = 2e-6  # of float32: a copy of a frame is a repetition at 1.0, too


class Limits(NamedTuple):
    """At most `quota` frames of a group, and at least `gap` places between any two of them; None = no such limit.

    `groups` (N,) and `places` (N,) are integers: the drive a frame belongs to, and its position in it.
    """

    groups: Indices = _NONE
    places: Indices = _NONE  # for `gap` only
    quota: int | None = None
    gap: int | None = None

    @property
    def are_none(self) -> bool:
        return self.quota is None and self.gap is None

    @classmethod
    def of(cls, selection: Selection, frame_ids: Sequence[str], pool_frames: pa.Table) -> Limits:
        """Sequences of these frames as numbers and places in them; a frame without a sequence is one of its own.

        `pool_frames` is the frame table of the whole pool: places count all of them, duplicates too. Raises UserError
        if there are limits and no frame has a sequence.
        """
        if selection.quota is None and selection.gap is None:
            return cls()
        columns = (pool_frames[name].to_pylist() for name in (frame.FRAME_ID, frame.SEQUENCE))
        sequence_of = dict(zip(*columns, strict=True))
        if not any(sequence_of.values()):
            raise UserError(
                "`quota` and `gap`: they are about frames of one sequence, but no frame of the pool has one",
                cure=f"leave them out, or fill the column `{frame.SEQUENCE}` of the frame table",
            )
        members: dict[str, list[str]] = {}
        for name in sorted(sequence_of, key=_natural):
            members.setdefault(sequence_of[name] or f"\0{name}", []).append(name)
        where = {
            name: (group, place) for group, names in enumerate(members.values()) for place, name in enumerate(names)
        }
        groups, places = zip(*(where[name] for name in frame_ids), strict=True)
        return cls(np.array(groups), np.array(places), selection.quota, selection.gap)

    def check(self, count: int) -> None:
        """Raise UserError if no choice of `count` frames respects the limits."""
        room = self.room()
        if room is not None and count > room:
            named = [f"`{name}` {value}" for name, value in (("quota", self.quota), ("gap", self.gap)) if value]
            leave = "leaves" if len(named) == 1 else "leave"
            raise UserError(
                f"count: {' and '.join(named)} {leave} room for {room} frames of the pool, {count} were asked for",
                cure="relax the limits or lower `count`",
            )

    def room(self) -> int | None:
        """The most frames that can be taken together; None = all."""
        if self.are_none:
            return None
        return sum(len(self._packed(group)) for group in np.unique(self.groups).tolist())

    def _packed(self, group: int) -> list[int]:
        """As many rows of a group as the limits allow: from the first place on, each as soon as it may come."""
        rows = np.flatnonzero(self.groups == group)
        if self.gap is None:
            return [int(row) for row in rows[: self.quota]]
        packed: list[int] = []
        for row in rows[np.argsort(self.places[rows], kind="stable")].tolist():
            if not packed or self.places[row] - self.places[packed[-1]] >= self.gap:
                packed.append(row)
        return packed[: self.quota]

    def without_gap(self) -> Limits:
        """The quota alone: choices under it are the bases of a matroid, where greedy is the exact minimum."""
        return self._replace(gap=None)

    def first(self, order: npt.ArrayLike, count: int) -> Indices:
        """The first `count` frames of this order that may be taken together; fewer where the gap leaves no more."""
        order_N = np.asarray(order, dtype=np.int64)
        if self.gap is None:
            return order_N[:count] if self.quota is None else order_N[self._turns(order_N) < self.quota][:count]
        taken: list[int] = []
        places_of: dict[int, list[int]] = {}
        for row in order_N.tolist():
            if len(taken) == count:
                break
            near = places_of.setdefault(int(self.groups[row]), [])
            place = int(self.places[row])
            full = self.quota is not None and len(near) >= self.quota
            if not full and all(abs(place - other) >= self.gap for other in near):
                near.append(place)
                taken.append(row)
        return np.array(taken, dtype=np.int64)

    def exchangeable(self, chosen: Indices, given: Indices, taken: Indices) -> npt.NDArray[np.bool_]:
        """(given, taken): whether the chosen rows are within the limits after one of them is exchanged for another.

        They must be before; `given` are some of them, `taken` are not.
        """
        allowed = np.ones((len(given), len(taken)), dtype=bool)
        if self.are_none:
            return allowed
        groups = self.groups[taken]
        same_given = self.groups[given][:, None] == groups
        if self.quota is not None:
            held = np.sort(self.groups[chosen])
            of_group = np.searchsorted(held, groups, "right") - np.searchsorted(held, groups, "left")
            allowed &= same_given | (of_group < self.quota)
        if self.gap is not None:
            # One line of places for all groups, farther apart than any gap: no matrix of the chosen and the pool.
            line = self.groups * (int(np.ptp(self.places)) + self.gap) + self.places
            held = np.sort(line[chosen])
            first = np.searchsorted(held, line[taken] - self.gap, "right")
            near_chosen = np.searchsorted(held, line[taken] + self.gap, "left") - first
            near_given = same_given & (np.abs(self.places[given][:, None] - self.places[taken]) < self.gap)
            allowed &= near_given == near_chosen
        return allowed

    def by_turns(self, order: Indices) -> Indices:
        """The first frame of each group, then the second of each, ...; within a turn in the given order."""
        return order if self.are_none else order[np.argsort(self._turns(order), kind="stable")]

    def filled(self, order: npt.ArrayLike, count: int) -> Indices:
        """As `first`, but always `count` frames where there is room: a drive gives up its first frames for more."""
        order_N = np.asarray(order, dtype=np.int64)
        taken = self.first(order_N, count)
        if len(taken) == count or self.are_none:
            return taken
        taken = self.first(order_N, len(order_N))
        sets = {group: taken[self.groups[taken] == group].tolist() for group in np.unique(self.groups).tolist()}
        packings = {group: self._packed(group) for group in sets}
        for group in sorted(sets, key=lambda group: len(sets[group]) - len(packings[group])):
            if sum(map(len, sets.values())) >= count:
                break
            sets[group] = packings[group]
        kept = np.array([row for rows in sets.values() for row in rows], dtype=np.int64)
        return order_N[np.isin(order_N, kept)][:count]

    def closed_by(self, picked: Sequence[int]) -> Indices:
        """The rows that the last pick closes, given all picks: itself, its neighbours, its drive if that is full."""
        row = picked[-1]
        if self.are_none:
            return np.array([row], dtype=np.int64)
        same = np.flatnonzero(self.groups == self.groups[row])
        if self.quota is not None and int((self.groups[list(picked)] == self.groups[row]).sum()) >= self.quota:
            return same
        near: Indices = same[
            same == row if self.gap is None else np.abs(self.places[same] - self.places[row]) < self.gap
        ]
        return near

    def _turns(self, order_N: Indices) -> Indices:
        """How many frames of its group come before each."""
        groups_N = self.groups[order_N]
        by_group = np.argsort(groups_N, kind="stable")
        sorted_groups = groups_N[by_group]
        turns_N = np.empty(len(order_N), dtype=np.int64)
        turns_N[by_group] = np.arange(len(order_N)) - np.searchsorted(sorted_groups, sorted_groups)
        return turns_N


NO_LIMITS = Limits()


def _natural(frame_id: str) -> list[tuple[int, str]]:
    """A key by which frame 9 comes before frame 10, whether or not numbers are padded with zeros."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"([0-9]+)", frame_id)]


def near_duplicates(features: npt.ArrayLike | StoredRows, least_cosine: float) -> Indices:
    """For each row of (N, d) features the earlier row it repeats, -1 if it is to be kept.

    A row repeats the nearest of the kept rows before it when the cosine between them is at least `least_cosine`: the
    idea of SemDeDup (Abbas et al., 2023, arXiv 2303.09540), without its clusters, so that the answer is exact.
    """
    rows_ND = as_rows(features)
    repeats = np.full(len(rows_ND), -1, dtype=np.int64)
    kept = StoredRows((len(rows_ND), rows_ND.shape[1]), np.float32)  # of length 1, filled from the front
    kept_rows: list[int] = []
    for part in parts_of(len(rows_ND)):
        block, start = np.asarray(rows_ND[part], dtype=np.float32), part.start
        block = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        before = len(kept_rows)
        nearest_B, cosine_B = np.full(len(block), -1), np.full(len(block), -np.inf)
        for earlier in parts_of(before) if before else ():
            cosines = block @ kept[earlier].T
            places = cosines.argmax(axis=1)
            found = cosines[np.arange(len(block)), places]
            nearer = found > cosine_B
            nearest_B[nearer], cosine_B[nearer] = places[nearer] + earlier.start, found[nearer]
        within = block @ block.T
        added: list[int] = []  # rows of the block that are kept
        for index in range(len(block)):
            nearest, cosine = -1, -np.inf
            if before:
                nearest, cosine = kept_rows[int(nearest_B[index])], float(cosine_B[index])
            if added:
                place = int(within[index, added].argmax())
                if within[index, added[place]] > cosine:
                    nearest, cosine = start + added[place], float(within[index, added[place]])
            if cosine >= least_cosine - _COSINE_ERROR:
                repeats[start + index] = nearest
            else:
                kept_rows.append(start + index)
                added.append(index)
        kept[before : len(kept_rows)] = block[added]
    return repeats
