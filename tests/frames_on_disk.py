"""Small frames on disk, which several test modules share."""

from __future__ import annotations

from pathlib import Path

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
