"""Random numbers of a frame: they follow from the seed and the frame's id, not from who works on it or when."""

from __future__ import annotations

import hashlib

import numpy as np


def frame_generator(seed: int, frame_id: str, purpose: str) -> np.random.Generator:
    """An independent stream for each (seed, frame, purpose): more draws of one purpose change no other."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{frame_id}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
