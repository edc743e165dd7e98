"""Keys of recipes that have another name now: whoever writes the old one is told the new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

# The old key, with as many of the keys above it as make it unmistakable -> what stands in its place.
RENAMED: Final[Mapping[str, str]] = {
    "average": "ema_decay",
    "loss.strips": "loss_chunk_rows",
    "loss.hard_examples": "ohem",
    "ohem.least": "min_kept",
    "lenders": "style_images",
    "among": "nearest",
    "judge": "segmenter",
    "extractor_weights": "extractor.weights",
    "extractor_resize": "extractor.resize",
    "extractor_mode": "extractor.mode",
}


def new_name(path: Sequence[str]) -> str | None:
    """What the key at the end of `path` is called now; None if it never had another name."""
    suffixes = (".".join(path[start:]) for start in range(len(path)))  # the longest one knows best
    return next((RENAMED[suffix] for suffix in suffixes if suffix in RENAMED), None)
