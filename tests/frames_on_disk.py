"""Small frames on disk, and the pass over them without a cluster: what several test modules share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nightseg.data.images import encode_png
from nightseg.data.table import frame_table
from nightseg.storage import sha256_of


def image(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8 + seed % 3, 1))).astype(np.uint8)


def folder_of(folder: Path, seeds: range, broken: int = 0) -> pa.Table:
    """The frame table of a new folder with one image a seed, and files that are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        data = encode_png(image(seed))
        file = folder / f"{seed:03d}.PNG"
        file.write_bytes(data)
        digest = sha256_of(data)
        rows.append({"frame_id": f"d/{seed:03d}", "uri": str(file), "sha256": digest, "domain": "unknown"})
    for number in range(broken):
        (folder / f"broken{number}.png").write_bytes(b"not a picture")
        rows.append({"frame_id": f"d/broken{number}", "uri": str(folder / f"broken{number}.png")})
    return frame_table(rows)


def in_this_process(rows: pa.Table, worker: Any, arguments: Mapping[str, Any], **options: Any) -> list[Any]:
    """What map_shards does, without Ray: the contract of its shards, so that most tests start in no time."""
    attempt, size = options["attempt"], options["shard_rows"]
    attempt.plan(rows.num_rows, size)
    call, records = worker(**arguments), []
    for index, start in enumerate(range(0, rows.num_rows, size)):
        shard = rows.slice(start, size)
        records.append(
            attempt.shard(index)
            or attempt.write_shard(index, call(shard, attempt.folder), rows_in=shard.num_rows, seconds=0.0)
        )
    return records
