"""Labels of a teacher at the stride of its logits: how they are stored, and what of them is kept when they are read.

A file holds those of a shard of frames, a row a frame: the class of each logit, and the bin of its confidence. Which
of them are learned is no part of it but a `Kept`, so another threshold needs neither the teacher nor these files.

At full size a pixel lies between four logits, of which the teacher would interpolate all K classes. Here each of the
four votes for its class, by its weight in that interpolation times its log-odds log(c / (1 - c)). Where two classes
meet, log-odds are the difference of their logits, so the border and the confidence beside it are the teacher's own;
where more than two meet, that is an approximation. Nearest neighbours would be half a stride off at every border.

The stage `label` writes the files and an index, `pseudo_label` a `Kept`, and training reads both.

HW = height, width of the frame; hw = of the logits; K = number of classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.images import BadFrame
from nightseg.data.taxonomy import IGNORE
from nightseg.storage import Location, UserError, sha256_of

NUM_BINS: Final = 256  # of confidences, as a byte

# Table `index`: what the teacher says of each frame.
INDEX, HISTOGRAMS = "index", "histograms"  # table of frames; the same of all of them, a row a class
MODEL = "model"  # sha256 of the teacher's weights
MEAN_CONFIDENCE = "mean_confidence"  # in [0, 1]
COUNTS = "counts"  # logits that the teacher gives to each class, K values
HISTOGRAM = "histogram"  # logits by class and bin of confidence, K x 256 values, row by row
INDEX_SCHEMA: Final = pa.schema(
    [
        *((name, pa.string()) for name in (frame.FRAME_ID, MODEL)),
        (MEAN_CONFIDENCE, pa.float64()),
        (COUNTS, pa.list_(pa.int64())),
        (HISTOGRAM, pa.list_(pa.int32())),
    ]
)

# Table `labels`, and a file beside it: what of that is learned.
KEPT_NAME: Final = "kept.json"  # `Kept`
KEPT = "kept"  # share of the frame that keeps a label, a fraction
KEPT_COUNTS = "kept_counts"  # logits of each class that keep their label, K values
KEPT_SCHEMA: Final = pa.schema(
    [
        (frame.FRAME_ID, pa.string()),
        *((name, pa.float64()) for name in (KEPT, MEAN_CONFIDENCE)),
        *((name, pa.list_(pa.int64())) for name in (COUNTS, KEPT_COUNTS, frame.LABEL_PIXELS)),
    ]
)

LABEL = "label"  # zstd of uint8 2hw: classes, then bins of confidence
_SIDES, _COVERED = ("height", "width"), ("covered_height", "covered_width")
STORED_SCHEMA: Final = pa.schema(
    [(LABEL, pa.binary()), *((name, pa.int32()) for name in _SIDES), *((name, pa.float64()) for name in _COVERED)]
)
_PLACE = re.compile(r"^(.*)#(\d+)(\?.*)?$")  # file, row, and the options of a store, which end a URI
_LEAST_VOTE = 0.05  # of a logit with odds below this: where several classes share the rest, one may still be the first

Rules = Mapping[int, Sequence[int]]
"""Train id of a class -> those of the classes that it is never below, in a column of the image."""

Bytes = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


class StoredLabel(NamedTuple):
    """labels_hw: train ids. bins_hw: floor(256 c). covered: how many logits high and wide the frame is; the last ones
    may lie partly or wholly beyond it."""

    labels_hw: Bytes
    bins_hw: Bytes
    covered: tuple[float, float]


@dataclass(frozen=True)
class Kept:
    """Which pixels of stored labels are kept: the least bin of each class, NUM_BINS = none, and which classes are
    never below others in a column of the image."""

    bins: tuple[int, ...]
    never_below: Rules = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Kept:
        said = json.loads(text)
        return cls(tuple(said["bins"]), {int(low): tuple(above) for low, above in said["never_below"].items()})

    @property
    def text(self) -> str:
        """As JSON, for the column `label_kept` of a frame table."""
        rules = {str(low): list(above) for low, above in self.never_below.items()}
        return json.dumps({"bins": self.bins, "never_below": rules}, sort_keys=True)

    def apply(self, labels_hw: Bytes, bins_hw: Bytes) -> Bytes:
        """The stored labels, with 255 where they are not kept."""
        sure_hw = np.where(bins_hw >= np.array(self.bins)[labels_hw], labels_hw, np.uint8(IGNORE))
        return drop_impossible(sure_hw, self.never_below)


# -- files ------------------------------------------------------------------------------------------------------------


def packed(label: StoredLabel) -> dict[str, Any]:
    """A row of STORED_SCHEMA."""
    height, width = label.labels_hw.shape
    data = pa.compress(np.stack([label.labels_hw, label.bins_hw]).tobytes(), codec="zstd", asbytes=True)
    return {LABEL: data, **dict(zip((*_SIDES, *_COVERED), (height, width, *label.covered), strict=True))}


def histograms_of(index: pa.Table, num_classes: int) -> npt.NDArray[np.int32]:
    """Logits by frame, class and bin, int32 (N, K, B), of a part of the index."""
    found: npt.NDArray[np.int32] = index[HISTOGRAM].combine_chunks().flatten().to_numpy()
    return found.reshape(-1, num_classes, NUM_BINS)


def place_of(file: str, row: int) -> str:
    """What `label_uri` says of a row of a file."""
    return f"{file}#{row}"


def read_stored(uri: str, sha256: str | None = None) -> StoredLabel:
    """The label at a place. `sha256`: of its bytes. Raises BadFrame: label_missing, unreadable (it has changed)."""
    place = _PLACE.match(uri)
    if place is None:
        raise BadFrame("label_missing", f"{uri} is no place in a file of stored labels")
    file, row = f"{place[1]}{place[3] or ''}", int(place[2])
    try:
        data, height, width, *covered = (column[row].as_py() for column in _columns(file))
    except FileNotFoundError as error:
        raise BadFrame("label_missing", f"{file} is not there") from error
    except (UserError, IndexError) as error:
        raise BadFrame("unreadable", f"{uri}: {error}") from error
    if sha256 not in (None, sha256_of(data)):
        raise BadFrame("unreadable", f"{uri} has changed since it was written (sha256)")
    raw = pa.decompress(data, decompressed_size=2 * height * width, codec="zstd", asbytes=True)
    labels_hw, bins_hw = np.frombuffer(raw, dtype=np.uint8).reshape(2, height, width)
    return StoredLabel(labels_hw, bins_hw, (covered[0], covered[1]))


@lru_cache(maxsize=4)  # frames next to each other are often read one after the other
def _columns(file: str) -> tuple[pa.ChunkedArray, ...]:
    return tuple(Location.of(file).read_table().select(STORED_SCHEMA.names).columns)


def with_kept(frames: pa.Table, kept: Kept, pixels: pa.ChunkedArray) -> pa.Table:
    """Frames with stored labels, and what is kept of them; `pixels`: kept ones of each frame by class."""
    known = frames.set_column(frames.schema.get_field_index(frame.LABEL_PIXELS), frame.LABEL_PIXELS, pixels)
    return known.append_column(frame.LABEL_KEPT, pa.array([kept.text] * frames.num_rows, pa.string()))


# -- at full size -----------------------------------------------------------------------------------------------------


def kept_label(stored: StoredLabel, kept: Kept, size: tuple[int, ...]) -> Bytes:
    """The label of a frame of `size` = (height, width): uint8 HW train ids, 255 where they are not kept."""
    labels_HW, scores_HW = upsampled(stored, size)
    least_K = _log_odds(np.array(kept.bins, dtype=np.float64)).astype(np.float32)
    sure_HW = np.where(scores_HW >= least_K[labels_HW], labels_HW, np.uint8(IGNORE))
    return drop_impossible(sure_HW, kept.never_below)


def upsampled(stored: StoredLabel, size: tuple[int, ...]) -> tuple[Bytes, Scores]:
    """(train ids uint8 HW, log-odds of their confidence float32 HW) at the size of the frame."""
    labels_hw = stored.labels_hw
    above, below, down_H1 = _neighbours(size[0], stored.covered[0], labels_hw.shape[0])
    left, right, across_W = _neighbours(size[1], stored.covered[1], labels_hw.shape[1])
    down_H1 = down_H1[:, None]
    odds_hw = _LOG_ODDS[stored.bins_hw]
    rows_Hw = odds_hw[above] * (1 - down_H1) + odds_hw[below] * down_H1
    scores_HW = rows_Hw[:, left] * (1 - across_W) + rows_Hw[:, right] * across_W
    found_HW = labels_hw[above][:, left]
    y, x = np.nonzero(_is_mixed(labels_hw)[above][:, left])
    corners = [(rows[y], columns[x]) for rows in (above, below) for columns in (left, right)]
    shares = [
        down * across
        for down in (1 - down_H1[y, 0], down_H1[y, 0])
        for across in (1 - across_W[x], across_W[x])
    ]  # fmt: skip
    classes_4N = np.stack([labels_hw[corner] for corner in corners])
    weights_4N = np.stack([
        np.maximum(odds_hw[corner], _LEAST_VOTE) * share for corner, share in zip(corners, shares, strict=True)
    ])  # fmt: skip
    votes_4N = np.stack([(weights_4N * (classes_4N == one_N)).sum(axis=0) for one_N in classes_4N])
    best_1N = votes_4N.argmax(axis=0)[None]
    found_HW[y, x] = np.take_along_axis(classes_4N, best_1N, axis=0)[0]
    lead_N = 2 * np.take_along_axis(votes_4N, best_1N, axis=0)[0] - weights_4N.sum(axis=0)
    scores_HW[y, x] = np.minimum(scores_HW[y, x], lead_N)
    return found_HW, scores_HW


def drop_impossible(labels_HW: Bytes, rules: Rules) -> Bytes:
    """The label with 255 where a class has, above it in its column, one that it is never below."""
    wrong_HW = np.zeros(labels_HW.shape, dtype=np.bool_)
    for low, others in rules.items():
        is_above_HW = np.logical_or.accumulate(np.isin(labels_HW, others), axis=0)
        wrong_HW |= (labels_HW == low) & is_above_HW
    return np.where(wrong_HW, np.uint8(IGNORE), labels_HW)


def _neighbours(length: int, covered: float, num_logits: int) -> tuple[Any, Any, Scores]:
    """For each pixel of a side the logit before it, the one behind it, and the latter's weight: by pixel centres."""
    places = (np.arange(length) + 0.5) * (covered / length) - 0.5
    places = places.clip(0, num_logits - 1)
    before = places.astype(np.intp)
    return before, np.minimum(before + 1, num_logits - 1), (places - before).astype(np.float32)


def _is_mixed(labels_hw: Bytes) -> npt.NDArray[np.bool_]:
    """Whether a logit, those to its right and below, and the one between these, have more than one class."""
    padded = np.pad(labels_hw, ((0, 1), (0, 1)), mode="edge")
    mixed: npt.NDArray[np.bool_] = padded[1:, 1:] != labels_hw
    mixed |= (padded[:-1, 1:] != labels_hw) | (padded[1:, :-1] != labels_hw)
    return mixed


def _log_odds(bins: npt.NDArray[np.floating]) -> Scores:
    """Of a confidence of bins / 256; -inf for 0, inf for 256."""
    with np.errstate(divide="ignore"):
        odds: Scores = (np.log(bins) - np.log(NUM_BINS - bins)).astype(np.float32)
    return odds


_LOG_ODDS: Final = _log_odds(np.arange(NUM_BINS) + 0.5)  # of the middle of each bin
