"""What the values of label files mean: by the names of the files, by the values of the whole set, by their palettes.

One file tells little: ids 7 and 11 are road and building in one encoding, sign and person in another. So the ids of all
files of a set are counted first. Where names and values leave one reading it is taken, and said; where they leave
several, or contradict each other, nobody can know, and `UnclearLabels` asks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nightseg.data.images import StoredLabel, UInt8
from nightseg.data.label_names import named_encoding
from nightseg.data.taxonomy import (
    COLORS,
    FROM_ONE,
    IGNORE,
    OTHER_COLORS,
    TRAIN_IDS,
    Taxonomy,
    in_words,
    packed,
    unpacked,
)
from nightseg.errors import UserError

LABEL_FILES_SCHEMA: Final = pa.schema(
    [
        *(("label_uri", pa.string()), ("label_encoding", pa.string())),  # of the frame table: what its layout says
        ("ids", pa.list_(pa.int64())),  # raw ids that occur
        ("pixels", pa.list_(pa.int64())),  # of each of them
        ("colours", pa.list_(pa.int64())),  # 65536 r + 256 g + b of each in the file's palette; null = it has none
        *(("edges", pa.int64()), ("blended", pa.int64())),  # of `_edges`
    ]
)
MOST_VOID: Final = 0.5  # of the pixels that another encoding gives a class: above, a reading is not believed
MOST_VOID_OF_NAMED: Final = 0.25  # ... if the files are called after it, and no id is there that only it and K know
LEAST_VOID_IDS: Final = 2  # different ids that are void then: one alone is what every set has
MOST_VOID_OF_MIXED: Final = 0.6  # ... of a single file, while the whole set is believed
MIXED_SHARE: Final = 0.05  # of the files that look like another encoding, from which on a folder holds two kinds
FEW_VALID: Final = 0.01
MOST_CONTRADICTED: Final = 0.01  # of the pixels, from which on colours of palettes and ids disagree
MOST_BLENDED: Final = 0.12
"""Of the edges of a set, those with an id between the ids on both sides. Measured on CamVid, Cityscapes and IDD: up to
0.05, nearest-neighbour scaling to an eighth included; 0.18 to 0.65 after interpolation or JPEG."""

BY_COLOURS: Final = "by the type of their files"
BY_LIST: Final = "by the class list"


class UnclearLabels(UserError):  # noqa: N818 what the labels are; a UserError by its base
    """Several encodings fit, or names and values say different things. `encodings`: those that one may ask for."""

    def __init__(self, what: str, encodings: Sequence[str], other_cure: str = "") -> None:
        self.encodings, self.other_cure = tuple(encodings), other_cure
        super().__init__(what, cure=self.cure_by("label_encoding: "))

    def cure_by(self, key: str) -> str:
        """The cure where one says the encoding by this key or option."""
        say = f"say what the ids mean by {key}{' or '.join(self.encodings)}"
        return f"{self.other_cure}, or {say}" if self.other_cure else say

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.encodings, self.other_cure)


class LabelFile(NamedTuple):
    """A label file as far as its meaning goes: its place, pixels by raw id, and the colours of these ids, if any."""

    uri: str
    pixels: Mapping[int, int]
    colours: Mapping[int, tuple[int, int, int]]
    edges: int = 0
    blended: int = 0


class Reading(NamedTuple):
    """How the labels of a set are read."""

    encodings: tuple[str, ...]  # of each file
    why: str
    valid: float  # share of the pixels that have a class
    absent: tuple[str, ...]  # classes that no pixel has
    blended: float  # share of the edges that look interpolated
    may_begin_with_one: bool = False  # nobody said what ids mean, 0 would be a class, and no pixel has it

    @property
    def encoding(self) -> str:
        """The one encoding, or those of the files by number: `label_ids (3 files), train_ids (2 files)`."""
        files = Counter(self.encodings)
        return next(iter(files)) if len(files) == 1 else ", ".join(f"{e} ({n} files)" for e, n in files.most_common())

    def facts(self) -> dict[str, Any]:
        """As JSON; `valid` is a fraction."""
        return {
            "encoding": self.encoding,
            "why": self.why,
            "files": len(self.encodings),
            "valid": self.valid,
            "absent": list(self.absent),
            "blended": self.blended,
        }

    def sentences(self) -> list[str]:
        """What is assumed, and what is odd about it, for a log."""
        absent = f"; without a pixel: {', '.join(self.absent)}" if self.absent else ""
        said = [
            f"{len(self.encodings)} labels read as {self.encoding} ({self.why}); {100 * self.valid:.1f} % of their "
            f"pixels have a class{absent}"
        ]
        if self.valid < FEW_VALID:
            said.append(
                f"warning: only {100 * self.valid:.2g} % of the pixels have a class, all others are ignored: look at "
                "the label files and at what their ids mean"
            )
        if self.may_begin_with_one:
            said.append(
                f"warning: no pixel has the id 0: if the classes begin with 1 there, the labels are {FROM_ONE}, and "
                "only you can say so"
            )
        if self.blended > MOST_BLENDED:
            said.append(
                f"warning: at {100 * self.blended:.0f} % of the edges between classes lie ids between those of both "
                "sides: the labels look scaled with interpolation or stored as JPEG once, which makes up classes; "
                "scale the original labels by nearest neighbour"
            )
        return said


def facts_of(uri: str, label: StoredLabel, encoding: str | None = None) -> dict[str, Any]:
    """The row of LABEL_FILES_SCHEMA of a label."""
    if label.ids.dtype == np.uint32:
        found, pixels = np.unique(label.ids, return_counts=True)
        return {
            "label_uri": uri, "label_encoding": encoding, "ids": found.tolist(), "pixels": pixels.tolist(),
            "colours": None, "edges": 0, "blended": 0,
        }  # fmt: skip
    ids_HW = label.ids.astype(np.uint8, copy=False)
    counts = _pixels_by_id(ids_HW)
    ids = np.flatnonzero(counts)
    colours = None if label.palette is None else [packed(label.palette[raw_id].tolist()) for raw_id in ids]
    return {
        "label_uri": uri,
        "label_encoding": encoding,
        "ids": ids.tolist(),
        "pixels": counts[ids].tolist(),
        "colours": colours,
        **_edges(ids_HW),
    }


def _edges(ids_HW: UInt8) -> dict[str, int]:
    """Neighbours in a row that differ, in every fourth row; and pixels whose id lies between those of both neighbours,
    as interpolation leaves them. Noise, which is no map of areas, has no edges."""
    rows = ids_HW[::4]
    steps = (rows[:, 1:] > rows[:, :-1], rows[:, 1:] < rows[:, :-1])  # up, down
    edges = sum(int(np.count_nonzero(step)) for step in steps)
    if edges > 0.3 * rows.size:
        return {"edges": 0, "blended": 0}
    return {"edges": edges, "blended": sum(int(np.count_nonzero(step[:, 1:] & step[:, :-1])) for step in steps)}


def _pixels_by_id(ids_HW: UInt8) -> NDArray[np.int64]:
    """int64[256]. Two neighbours are one 16-bit number, which takes half the time of counting bytes."""
    ids = np.ascontiguousarray(ids_HW).reshape(-1)
    even = ids.size // 2 * 2
    pairs = np.bincount(ids[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1) + np.bincount(ids[even:], minlength=256)
    return counts


def label_files(table: pa.Table) -> list[LabelFile]:
    """The rows of LABEL_FILES_SCHEMA, a file each."""
    files = []
    columns = ("label_uri", "ids", "pixels", "colours", "edges", "blended")
    for uri, ids, pixels, colours, *edges in zip(*(table[name].to_pylist() for name in columns), strict=True):
        rgb = {raw_id: (c >> 16, c >> 8 & 255, c & 255) for raw_id, c in zip(ids, colours or (), strict=False)}
        files.append(LabelFile(uri, dict(zip(ids, pixels, strict=True)), rgb, *edges))
    return files


def read_as(
    where: str,
    files: Sequence[LabelFile],
    classes: Taxonomy,
    *,
    asked: str | None,
    why: str = "as asked",
    usual: str | None = None,
) -> Reading:
    """How to read the labels of a set: as `asked`, else by the names of the files, else by what fits all values.

    `why`: what asks, for people. `usual`: the encoding of the layout, which wins where others would map the same ids to
    the same classes. Raises UnclearLabels; UserError: ids that no encoding knows, not one pixel with a class.
    """
    if asked is not None:
        if any(file.pixels.keys() - classes.encodings[asked].keys() for file in files):
            raise unknown_ids(where, files, classes, [asked])
        return _counted(where, files, classes, (asked,) * len(files), why, is_said=True)
    groups: dict[str | None, list[LabelFile]] = {}
    names = [name if (name := named_encoding(file.uri)) in classes.encodings else None for file in files]
    for name, file in zip(names, files, strict=True):
        groups.setdefault(name, []).append(file)
    found = {name: _Group(where, group, classes, name).encoding(usual) for name, group in groups.items()}
    why = "; ".join(dict.fromkeys(reason for _, reason in found.values()))
    return _counted(where, files, classes, tuple(found[name][0] for name in names), why)


def _counted(
    where: str,
    files: Sequence[LabelFile],
    classes: Taxonomy,
    encodings: tuple[str, ...],
    why: str,
    is_said: bool = False,
) -> Reading:
    by_class = np.zeros(256, np.int64)
    for file, encoding in zip(files, encodings, strict=True):
        ids = classes.encodings[encoding]
        for raw_id, pixels in file.pixels.items():
            by_class[ids.get(raw_id, IGNORE)] += pixels
    valid = int(by_class[: classes.num_classes].sum())
    if files and not valid:
        found = sorted({raw_id for file in files for raw_id in file.pixels})
        one = " and ".join(sorted(set(encodings)))
        raise UserError(
            f"{where}: none of the {len(files)} labels has a pixel with a class, only ignored ones: the ids "
            f"{_listed(found)} are void in {one} of the taxonomy {classes.name}",
            cure="check that these are the finished labels, and which encoding their ids are in: "
            f"{', '.join(sorted(classes.encodings))}",
        )
    absent = tuple(name for name, pixels in zip(classes.classes, by_class, strict=False) if not pixels)
    blended = sum(file.blended for file in files) / max(sum(file.edges for file in files), 1)
    seen = {raw_id for file in files for raw_id in file.pixels}
    is_odd = len(seen) > 2 and 0 not in seen and seen <= classes.encodings.get(FROM_ONE, {}).keys()
    is_odd &= not is_said and not any(named_encoding(file.uri) for file in files)
    is_odd &= all(classes.encodings[one].get(0) == 0 for one in set(encodings))
    return Reading(encodings, why, valid / max(int(by_class.sum()), 1), absent, blended, is_odd)


class _Group:
    """Files whose names say the same about their ids (`name` None: nothing), and what their values say."""

    def __init__(self, where: str, files: Sequence[LabelFile], classes: Taxonomy, name: str | None) -> None:
        self.where, self.files, self.classes, self.name = where, files, classes, name
        self.pixels = Counter[int]()
        for file in files:
            self.pixels.update(file.pixels)

    def encoding(self, usual: str | None) -> tuple[str, str]:
        """(the encoding, why)."""
        order = dict.fromkeys([usual, *self.classes.tried] if usual else self.classes.tried)
        fits: dict[tuple[int, ...], str] = {}  # what the ids become -> the first encoding that does that
        for one in order:
            if (mapped := self._mapped(one, self.pixels)) is not None:
                fits.setdefault(mapped, one)
        if self.name is not None and (mapped := self._mapped(self.name, self.pixels)) is not None:
            fits[mapped] = self.name
        found = list(fits.values())
        if self.name is not None:
            return self._by_name(found), "by the names of the files"
        if not found:
            raise unknown_ids(self.where, self.files, self.classes)
        found, spoken = self._by_palette(found)
        self._check_palettes(found)
        if len(found) > 1:
            believed = [one for one in found if not self._is_void(one, found, self.pixels, MOST_VOID)]
            found = believed or found
        if len(found) > 1:
            raise UnclearLabels(
                f"{self.where}: the ids {_listed(sorted(self.pixels))} of {len(self.files)} labels may be "
                f"{' or '.join(found)} of the taxonomy {self.classes.name}, which give them different classes",
                [*found, *self._from_one()],
            )
        self._check_mixture(found[0])
        self._check_ignored(found[0])
        if spoken:
            return found[0], "by the colours of their palettes"
        return found[0], "by their ids" if len(self.classes.encodings) > 1 else "the only encoding"

    def _by_name(self, found: list[str]) -> str:
        assert self.name is not None
        files = f"{len(self.files)} labels are called like {PurePosixPath(self.files[0].uri).name}"
        if self.name not in found:
            ids = [raw_id for raw_id in sorted(self.pixels) if raw_id not in self.classes.encodings[self.name]]
            if not found:
                raise unknown_ids(self.where, self.files, self.classes)
            raise UnclearLabels(
                f"{self.where}: {files}, but the ids {_listed(ids)} are not in {self.name}, and all are in "
                f"{' and '.join([*found, *self._from_one(with_zero=True)])}",
                [*self._from_one(with_zero=True), *found],
                self._rewritten(),
            )
        others = [one for one in found if one != self.name]
        if others and self._is_void(self.name, found, self.pixels, MOST_VOID_OF_NAMED):
            void = self._void(self.name, self.pixels) / self.pixels.total()
            raise UnclearLabels(
                f"{self.where}: {files}, but read as {self.name} {100 * void:.0f} % of their pixels would be void, and "
                f"no id is above {max(i for i in self.pixels if i != IGNORE)}: these look like {' or '.join(others)}",
                [*others, *self._from_one(), self.name],
            )
        self._by_palette([self.name])
        self._check_palettes([self.name])
        self._check_mixture(self.name)
        self._check_ignored(self.name)
        return self.name

    def _check_ignored(self, chosen: str) -> None:
        """Refuse what looks like train ids whose ignored pixels have one id from K on, or like ids from 1."""
        above = [i for i in self.pixels if self.classes.num_classes <= i != IGNORE]
        if len(above) != 1:
            return
        highest, is_next = above[0], above[0] == self.classes.num_classes
        ids = {i: number for i, number in self.pixels.items() if i < self.classes.num_classes}
        is_last = max(i for i in self.classes.encodings[chosen] if i != IGNORE) == highest  # CamVid's void is 11 = K
        most = MOST_VOID_OF_NAMED if is_next else MOST_VOID
        if (is_next and is_last) or not self._is_void(chosen, [chosen, TRAIN_IDS], ids, most):
            return
        ones = self._from_one(with_zero=True)
        ignored = f"{TRAIN_IDS} with {highest} for ignored pixels"
        looks = " or ".join([ignored, *ones] if 0 in self.pixels else [*ones, ignored])
        void = 100 * self._void(chosen, self.pixels) / self.pixels.total()
        raise UnclearLabels(
            f"{self.where}: {chosen} knows all ids, but {highest} is the highest of them, and {void:.0f} % of the "
            f"pixels would be void: these look like {looks}",
            [*ones, chosen],
            self._rewritten(),
        )

    def _from_one(self, with_zero: bool = False) -> list[str]:
        """`ids_from_one`, where ids may begin with 1; with 0 they are called that only `with_zero`."""
        ids = self.pixels.keys()
        may_be = ids <= self.classes.encodings.get(FROM_ONE, {}).keys() and (with_zero or 0 not in ids)
        return [FROM_ONE] if may_be else []

    def _rewritten(self) -> str:
        """The cure where one id from K on, the number of classes, stands for ignored pixels."""
        above = [i for i in self.pixels if self.classes.num_classes <= i != IGNORE]
        if len(above) != 1:
            return ""
        return f"write 255 for {above[0]}, or add an encoding with `ignore: [{above[0]}]` to the taxonomy's YAML file"

    def _check_palettes(self, found: Sequence[str]) -> None:
        if several := _several_ids(self.files):
            what = f"{self.where}: {several}: indices of palettes that were made for each file are no ids"
            raise UnclearLabels(what, found, "write the labels anew with the ids of their classes")

    def _check_mixture(self, chosen: str) -> None:
        """Refuse a set in which some files, by themselves, look like another encoding than the set."""
        for other in self.classes.tried:
            if other == chosen:
                continue
            odd = [file for file in self.files if self._looks_like(file, other, chosen)]
            if len(odd) >= max(1, MIXED_SHARE * len(self.files)):
                names = [PurePosixPath(file.uri).name for file in odd]
                raise UnclearLabels(
                    f"{self.where}: the labels are {chosen}, but {len(odd)} of {len(self.files)} look like {other} "
                    f"({_listed(names)}): two kinds of label seem to lie in one folder",
                    [chosen, other],
                    "keep one kind in the folder",
                )

    def _looks_like(self, file: LabelFile, other: str, chosen: str) -> bool:
        pair = [chosen, other]
        if self._mapped(other, file.pixels) is None or self._void(chosen, file.pixels) == sum(file.pixels.values()):
            return False
        return self._is_void(chosen, pair, file.pixels, MOST_VOID_OF_MIXED) and not self._is_void(
            other, pair, file.pixels, 0.1
        )

    def _mapped(self, encoding: str, pixels: Iterable[int]) -> tuple[int, ...] | None:
        """The train ids of the ids that occur, in their order; None if the encoding does not know one of them."""
        ids = self.classes.encodings[encoding]
        mapped = tuple(ids.get(raw_id, -1) for raw_id in sorted(pixels))
        return None if -1 in mapped else mapped

    def _void(self, encoding: str, pixels: Mapping[int, int]) -> int:
        ids = self.classes.encodings[encoding]
        return sum(number for raw_id, number in pixels.items() if ids.get(raw_id, IGNORE) == IGNORE)

    def _is_void(self, encoding: str, readings: Sequence[str], pixels: Mapping[int, int], most: float) -> bool:
        """Whether too much of what some reading gives a class is void in this one."""
        maps = [self.classes.encodings[one] for one in readings]
        meant = {i: n for i, n in pixels.items() if any(ids.get(i, IGNORE) != IGNORE for ids in maps)}
        own = self.classes.encodings[encoding]
        void = [i for i in pixels if own.get(i, IGNORE) == IGNORE]
        return len(void) >= LEAST_VOID_IDS and sum(meant.get(i, 0) for i in void) >= most * max(sum(meant.values()), 1)

    def _by_palette(self, found: list[str]) -> tuple[list[str], bool]:
        """Those that agree with the colours of the palettes, and whether these speak of the classes at all."""
        contradictions = {one: _contradiction(self.files, self.classes, one) for one in found}
        agree = [one for one, said in contradictions.items() if not said]
        if not agree:
            said = contradictions[found[0]]
            raise UnclearLabels(
                f"{self.where}: the palettes of the label files contradict {' or '.join(found)}: {said}",
                found,
                "write the labels anew with the ids of their classes",
            )
        return agree, any(said is not None for said in contradictions.values())


def check_palettes(where: str, files: Sequence[LabelFile], classes: Taxonomy) -> None:
    """Raise UserError if the colours of files that should hold train ids say that these are none."""
    if said := _contradiction(files, classes, TRAIN_IDS) or _several_ids(files):
        raise UserError(
            f"{where}: the palettes contradict {TRAIN_IDS} of the taxonomy {classes.name}: {said}",
            cure="write train ids (0 is the first class), and not the indices of a palette that some program made up",
        )


def _contradiction(files: Sequence[LabelFile], classes: Taxonomy, encoding: str) -> str | None:
    """Which ids have the colours of other classes; "" if the palettes agree, None if they do not speak of classes."""
    said = Counter[tuple[int, int]]()  # (raw id, class of its colour) -> pixels
    for file in files:
        said.update(_classes_of_palette(file, classes))
    if not said:
        return None
    ids = classes.encodings[encoding]
    against = Counter({pair: n for pair, n in said.items() if ids.get(pair[0], IGNORE) not in (pair[1], IGNORE)})
    if against.total() < MOST_CONTRADICTED * said.total():
        return ""
    shown = (f"{i} has the colour of {classes.classes[meant]!r}" for (i, meant), _ in against.most_common(3))
    return "id " + ", ".join(shown)


def _several_ids(files: Sequence[LabelFile]) -> str:
    """What to say if one colour has several ids; "" else. Files in which ids share a colour do not count."""
    by_colour: dict[tuple[int, int, int], Counter[int]] = defaultdict(Counter)
    for file in files:
        if len(set(file.colours.values())) == len(file.colours):
            for raw_id, colour in file.colours.items():
                by_colour[colour][raw_id] += file.pixels[raw_id]
    odd = {colour: ids.total() - max(ids.values()) for colour, ids in by_colour.items()}
    if not odd or sum(odd.values()) < max(1, MOST_CONTRADICTED * sum(ids.total() for ids in by_colour.values())):
        return ""
    worst = max(odd, key=lambda colour: odd[colour])
    return f"the colour {worst} has the ids {_listed(sorted(by_colour[worst]))} in different files"


def unknown_ids(
    where: str, files: Sequence[LabelFile], classes: Taxonomy, encodings: Iterable[str] | None = None
) -> UserError:
    """For every encoding (None: of the taxonomy) the first label that it does not know all ids of; what the labels hold
    together, and what the class list would have to say, in the numbers of both."""
    names_tried = list(classes.tried if encodings is None else encodings)
    found: dict[str, list[str]] = {}  # the first file, and its unknown ids -> of which encodings
    for name in names_tried:
        for file in files:
            unknown = [i for i in sorted(file.pixels) if i not in classes.encodings[name]]
            if unknown:
                shown = _listed([f"{in_words(raw_id, name)} ({file.pixels[raw_id]} pixels)" for raw_id in unknown])
                found.setdefault(f"{file.uri}: {'colours' if name == COLORS else 'ids'} {shown}", []).append(name)
                break
    told = "; ".join(
        f"{ids} are not in the encoding {' or '.join(names)} of the taxonomy {classes.name}"
        for ids, names in found.items()
    )
    several = f"{where}: no encoding of {classes.name} knows all ids: " if len(names_tried) > 1 else f"{where}: "
    pixels = Counter[int]()
    for file in files:
        pixels.update(file.pixels)
    if names_tried == [COLORS]:
        strange = [colour for colour, _ in pixels.most_common() if colour not in classes.encodings[COLORS]]
        shown = ", ".join(in_words(colour, COLORS) for colour in strange[:4])
        return UserError(
            several + told + f"; {len(strange)} of {len(pixels)} colours are in no class",
            cure=f"give the classes these colours (`color:` of the class list; of a class with several `ids: "
            f"{{{COLORS}: [{shown}]}}`), or ignore them: `ignore: {{{COLORS}: [{shown}]}}`, or all that are not "
            f"listed: `ignore: {{{COLORS}: rest}}`",
        )
    known = " or ".join(f"{_ranges(classes.encodings[name])} ({name})" for name in names_tried)
    told += (
        f"; the labels hold {_ranges(pixels)}, and {classes.name} has {classes.num_classes} classes and knows {known}"
    )
    return UserError(several + told, cure=_cure_of_unknown(pixels, files, classes))


def _cure_of_unknown(pixels: Mapping[int, int], files: Sequence[LabelFile], classes: Taxonomy) -> str:
    strange = sorted(pixels.keys() - classes.encodings[TRAIN_IDS].keys())
    names = classes.classes
    cures = []
    if all(file.pixels.keys() <= classes.encodings.get(FROM_ONE, {}).keys() for file in files):
        cures.append(f"label_encoding: {FROM_ONE} if 0 is void and 1 is {names[0]}")
    if len(strange) == 1:
        cures.append(
            f"if these are {TRAIN_IDS} (0 is {names[0]}) and {strange[0]} is void, write 255 for {strange[0]}, or say "
            f"`ignore: [{strange[0]}]` in a class list of your own"
        )
    own = sorted(pixels.keys() - {IGNORE})
    first = own[1] if own[0] == 0 and len(own) > classes.num_classes else own[0]
    cures.append(
        f"give classes their `ids:` in the class list, as in `{{name: {names[0]}, ids: {first}}}`, "
        f"and `ignore:` those of {_ranges(own)} that are none; or take the class list or encoding of these labels"
    )
    return "; ".join(cures)


def _ranges(ids: Iterable[int]) -> str:
    """0, 2, 3, 4, 255 as `0, 2..4, 255`; the last is always told."""
    parts: list[list[int]] = []
    for raw_id in sorted(ids):
        if parts and raw_id == parts[-1][1] + 1:
            parts[-1][1] = raw_id
        else:
            parts.append([raw_id, raw_id])
    told = [str(low) if low == high else f"{low}..{high}" for low, high in parts]
    return ", ".join(told if len(told) < 10 else [*told[:7], f"{len(told) - 8} more", told[-1]])


def _classes_of_palette(file: LabelFile, classes: Taxonomy) -> dict[tuple[int, int], int]:
    """(raw id, class whose colour it has) -> pixels; nothing where the palette is no list of class colours."""
    if not file.colours or all(colour == _voc_colour(raw_id) for raw_id, colour in file.colours.items()):
        return {}
    by_colour = {colour: index for index, colour in enumerate(classes.palette)}
    if classes.colors:  # those of another class list, whose labels these are
        by_colour = {
            unpacked(raw_id): to for raw_id, to in classes.colors.items() if to != IGNORE and raw_id != OTHER_COLORS
        }
    said = {(i, by_colour[colour]): file.pixels[i] for i, colour in file.colours.items() if colour in by_colour}
    meant = {index for _, index in said}
    return said if len(meant) > 1 and 2 * sum(said.values()) >= sum(file.pixels.values()) else {}


def _voc_colour(raw_id: int) -> tuple[int, int, int]:
    """Of the colour map that many tools write whatever the ids mean: PASCAL VOC's, bits of the id spread over RGB."""
    rgb = [0, 0, 0]
    for bit in range(8):
        rgb[bit % 3] |= (raw_id >> bit & 1) << 7 - bit // 3
    return rgb[0], rgb[1], rgb[2]


def _listed(values: Sequence[Any]) -> str:
    shown = values if len(values) == 9 else values[:8]  # "and 1 more" is no shorter than the one
    more = f" and {len(values) - 8} more" if len(values) > 9 else ""
    return ", ".join(map(str, shown)) + more
