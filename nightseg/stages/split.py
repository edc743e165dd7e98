"""Separate a pool of frames into day and night by luminance histograms, and leave twilight out (thesis section 1).

One pass over the frames makes their histograms; the decision is made over all of them together, and takes a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.day_night import NUM_BANDS, NUM_BINS, Separation, Tone, by_parts, separate, tone_of, whole
from nightseg.data.table import vector_column, vectors
from nightseg.storage import Commit, Location, UserError

VERSION = 1

SCORE = "score"  # -1 is night, 1 is day
MARGIN = "margin"  # 0 to 1; frames below the recipe's margin are twilight
BANDS = "bands"  # 128 values: histogram of the upper third, then of the rest
CHROMA = "chroma"  # 0 to 255

NUM_EXAMPLES = 8  # frames of each kind that the evidence names
NUM_SCORE_BINS = 40

_CENTRES = ("night", "day", "dusk")


def split(pool: pa.Table, *, margin: float, **work: Unpack[Work]) -> Commit:
    """Commit `frames` (domain set; extra columns score, margin), `histograms`, `quarantine` and evidence.json.

    `pool` is a frame table with absolute uris; the domain it states is not used. Frames that are neither day nor
    night stay in `frames` with the domain twilight, or unknown if they have no colour; whoever uses the split picks one
    domain. The rule is that of `data.day_night.separate`.
    """
    if pool.num_rows == 0:
        cure = "see the counts of the pool's dataset: how many frames were quarantined, and why"
        raise UserError("split: there is no frame to split into day and night", cure=cure)
    named = pool.select([name for name in (frame.FRAME_ID, frame.URI, frame.SHA256) if name in pool.column_names])
    shards = map_shards(named, HistogramFrames, {}, title="split", **work)
    seen = shards.table("histograms")
    bands_NBH = vectors(seen[BANDS]).reshape(-1, NUM_BANDS, NUM_BINS)
    separation = separate(bands_NBH, seen[CHROMA].to_numpy(), margin=margin)
    frames = _frames(pool, seen, separation)
    shards.attempt.write_table("frames", frames)
    shards.attempt.write_json("evidence.json", _evidence(frames, bands_NBH, separation, margin))
    counts = dict(sorted(Counter(separation.domain).items()))
    return shards.finish("histograms", outputs=["frames.parquet", "evidence.json"], summary={"domains": counts})


def domains_of(frames: pa.Table, margin: float) -> list[str]:
    """The domains that some frames would have if they were the pool; without those that cannot be read."""
    seen = HistogramFrames()(frames.select([frame.FRAME_ID, frame.URI]), Location.of("."))["histograms"]
    if not seen.num_rows:
        return []
    bands_NBH = vectors(seen[BANDS]).reshape(-1, NUM_BANDS, NUM_BINS)
    return [str(domain) for domain in separate(bands_NBH, seen[CHROMA].to_numpy(), margin=margin).domain]


class HistogramFrames:
    """Luminance histograms of the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        tones: list[tuple[str, Tone]]
        tones, bad = frame.sort_out(
            rows,
            lambda row: (row[frame.FRAME_ID], tone_of(frame.image_of(row))),
        )
        bands = np.array([tone.bands for _, tone in tones], dtype=np.float32).reshape(-1, NUM_BANDS * NUM_BINS)
        seen = {
            frame.FRAME_ID: pa.array([name for name, _ in tones], pa.string()),
            BANDS: vector_column(bands),
            CHROMA: pa.array([tone.chroma for _, tone in tones], pa.float64()),
        }
        return {"histograms": pa.table(seen), "quarantine": frame.quarantine_table(bad)}


def _frames(pool: pa.Table, seen: pa.Table, separation: Separation) -> pa.Table:
    """The pool's rows that have a histogram, in the pool's order, with their domain."""
    place = {name: row for row, name in enumerate(pool[frame.FRAME_ID].to_pylist())}
    rows = pa.array([place[name] for name in seen[frame.FRAME_ID].to_pylist()], pa.int64())
    kept = pool.select(frame.FRAME_SCHEMA.names).take(rows)
    column = kept.schema.get_field_index(frame.DOMAIN)
    kept = kept.set_column(column, frame.DOMAIN, pa.array(separation.domain, pa.string()))
    for name, values in ((SCORE, separation.score), (MARGIN, separation.margin)):
        kept = kept.append_column(name, pa.array(values, pa.float64()))
    return kept


def _evidence(
    frames: pa.Table, bands_NBH: npt.NDArray[np.float32], separation: Separation, margin: float
) -> dict[str, Any]:
    """Why each frame went where it went: what a person needs to check a split."""
    domains = np.array(separation.domain)
    edges = np.linspace(-1, 1, NUM_SCORE_BINS + 1)
    whole_NH = by_parts(whole, bands_NBH)
    found = [name for name in frame.DOMAINS if (domains == name).any()]
    return {
        "margin": margin,
        "counts": {name: int((domains == name).sum()) for name in found},
        # fractions of pixels by luminance 0 to 255 in 64 steps, mean over the frames of the domain
        "histograms": {name: _rounded(whole_NH[domains == name].mean(axis=0)) for name in found},
        "scores": {
            "edges": _rounded(edges),
            "counts": {n: np.histogram(separation.score[domains == n], edges)[0].tolist() for n in found},
        },
        # root of the luminance between a frame's black and white at the quantiles 0.05, 0.15 ... 0.95
        "centres": {
            name: {"upper": _rounded(centre[0]), "lower": _rounded(centre[1])}
            for name, centre in zip(_CENTRES, separation.centres, strict=True)
        },
        "examples": {
            **{name: _examples(frames, -separation.margin, domains == name) for name in ("day", "night")},
            "twilight": _examples(frames, separation.margin, domains == "twilight"),
        },
        "borderline": _examples(frames, np.abs(separation.margin - margin), separation.margin > 0),
    }


def _examples(
    frames: pa.Table, order: npt.NDArray[np.float64], eligible: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """The eligible frames that come first in the given order."""
    rows = [int(row) for row in np.argsort(order, kind="stable") if eligible[row]][:NUM_EXAMPLES]
    columns = [frame.FRAME_ID, frame.URI, frame.DOMAIN, SCORE, MARGIN]
    return [dict(row) for row in frames.select(columns).take(pa.array(rows, pa.int64())).to_pylist()]


def _rounded(values: npt.NDArray[np.floating[Any]]) -> list[float]:
    return [round(float(value), 6) for value in values]
