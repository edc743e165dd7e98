"""Trainings of others, as values to start from: `training: {preset: detectron2, batch: 8}`.

A preset is put under what the recipe says when the recipe is read; the resolved recipe in the run folder has the values
and no preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # The released code of the thesis (facts: SGD 0.01, decay 1e-5, batch 4, 60 epochs, scales 0.5 to 2, no flip). Its
    # cosine falls and rises again every epoch, because its period was set to one epoch: here it falls once. It divides
    # the mean loss by the batch once more, so its 0.01 acts like 0.0025; the value as published is kept.
    "thesis": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "batch": 4,
        "epochs": 60,
        "decay": "cosine",
        "crop": [512, 1024],
        "augmentation": {"scale": [0.5, 2.0], "flip": 0.0},
    },
    # detectron2's Misc/semantic_R_50_FPN_1x: 90,000 iterations of 16 frames, steps at 60,000 and 80,000, short sides
    # 640 to 800 (as shares of the input size), frozen batch norms, biases decayed, norms not.
    "detectron2": {
        "optimizer": "sgd",
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decay_biases": True,
        "batch": 16,
        "epochs": 18,
        "steps_per_epoch": 5000,
        "warmup_steps": 1000,
        "decay": "step",
        "decay_at": [60_000 / 90_000, 80_000 / 90_000],
        "decay_factor": 0.1,
        "freeze_batch_norm": True,
        "augmentation": {"scale": [0.8, 1.0], "flip": 0.5},
    },
}


def fill_presets(data: dict[str, Any]) -> None:
    """Replace `preset` in the recipe's training and in those of its models by the values it stands for.

    An unknown preset stays, for the types to refuse with the ones there are.
    """
    models = data.get("models")
    owners = [data, *(models.values() if isinstance(models, dict) else ())]
    for owner in owners:
        training = owner.get("training") if isinstance(owner, dict) else None
        if isinstance(training, dict) and isinstance(training.get("preset"), str) and training["preset"] in PRESETS:
            written = {key: value for key, value in training.items() if key != "preset"}
            owner["training"] = _over(PRESETS[training["preset"]], written)


def _over(values: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what was written over them, mapping by mapping."""
    merged = dict(values)
    for key, value in written.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, dict) else value
    return merged
