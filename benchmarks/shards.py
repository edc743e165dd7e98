"""What a pass over very many frames costs beside its work: shards, files, requests, memory. No image is read.

    python -m benchmarks.shards --frames 10000 1000000 --shard-rows 64 4096 --folder /tmp/shards

The frame table of so many frames goes through a worker that writes two numbers a frame, to a commit; then the same
again over the finished shards of an attempt that was not committed, as after a kill. Each in a process of its own, so
that its peak memory is its own; CPU time, because wall time on a shared machine says nothing. A file written is a
request to an object store; so is each marker read when a pass continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.progress import SilentProgress
from nightseg.storage import Location, Workspace

PART = 1_000_000
CPU_SECONDS_OF_A_FRAME = 0.02
"""Of features by EfficientNet-Lite0 on one core, roughly: what the cost of the shards is a share of."""


class TwoNumbers:
    """The least that a pass writes: an id, a score."""

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        scores = pa.array(np.arange(rows.num_rows, dtype=np.float64))
        return {"scores": pa.table({frame.FRAME_ID: rows[frame.FRAME_ID], "score": scores})}


def frames(count: int) -> pa.Table:
    """As a pool is listed: ids, uris, hashes, sizes. In parts, because Arrow's strings end at 2 GB."""
    return pa.concat_tables([_listed(range(first, min(count, first + PART))) for first in range(0, count, PART)])


def _listed(some: range) -> pa.Table:
    count, numbers = len(some), pa.array(np.arange(some.start, some.stop))
    text = numbers.cast(pa.string())
    columns = {
        frame.FRAME_ID: pa.compute.binary_join_element_wise("pool/drive/", text, ""),
        frame.URI: pa.compute.binary_join_element_wise("s3://frames/pool/drive/", text, ".jpg", ""),
        "sha256": pa.compute.utf8_lpad(text, 64, padding="0"),
    }
    height = pa.array(np.full(count, 720, np.int32))
    return pa.table({**columns, "height": height, "width": height})


def measure(count: int, shard_rows: int, folder: Path, continues: bool) -> dict[str, Any]:
    """A pass to its commit, or, if it `continues`, over finished shards."""
    attempt = Workspace(folder).stage("score", "pool", version=1, recipe={}, inputs={}, seed=0).open()
    rows, before = frames(count), time.process_time()
    compute = MapCompute(actors=0, shard_rows=shard_rows)
    shards = map_shards(
        rows, TwoNumbers, {}, title="pass", compute=compute, attempt=attempt, progress=SilentProgress()
    )  # fmt: skip
    mapped = time.process_time() - before
    commit = None if not continues else shards.finish("scores")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "shards": len(list(shards.parts("scores"))),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "commit_bytes": 0 if commit is None else next(folder.rglob("_COMMITTED.json")).stat().st_size,
        "cpu": mapped,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(*words: str) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, "-m", "benchmarks.shards", *words], check=True, stdout=subprocess.PIPE)
    return dict(json.loads(ended.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[10_000, 1_000_000], metavar="N")
    parser.add_argument("--shard-rows", type=int, nargs="+", default=[64, 4096], metavar="N")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="for what is written, removed again")
    parser.add_argument("--step", choices=["first", "again"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step is not None:
        print(json.dumps(measure(asked.frames[0], asked.shard_rows[0], asked.folder, asked.step == "again")))
        return 0
    print("| frames | of a shard | shards | files | MB | commit MB | CPU s | of the work | again, CPU s | peak MiB |")
    print(f"|{'---:|' * 10}")
    for count in asked.frames:
        for rows in asked.shard_rows:
            words = ["--frames", str(count), "--shard-rows", str(rows), "--folder", str(asked.folder / "run"), "--step"]
            first = in_a_process(*words, "first")
            again = in_a_process(*words, "again")
            share = first["cpu"] / (count * CPU_SECONDS_OF_A_FRAME)
            cells = [f"{count:,}", str(rows), str(first["shards"]), str(first["files"]), f"{first['bytes'] / 1e6:.1f}"]
            cells += [f"{again['commit_bytes'] / 1e6:.2f}", f"{first['cpu']:.1f}", f"{share:.2%}"]
            cells += [f"{again['cpu']:.2f}", f"{max(first['peak_mib'], again['peak_mib']):.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            shutil.rmtree(asked.folder / "run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
