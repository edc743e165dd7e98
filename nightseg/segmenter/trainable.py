"""What cannot train, found before a worker starts: frames without labels, settings that contradict each other."""

from __future__ import annotations

import pyarrow as pa

from nightseg.cluster.settings import TrainCompute
from nightseg.data import table as frame
from nightseg.errors import UserError
from nightseg.segmenter.settings import Network, Training


def check_training(
    model: str,
    train: pa.Table,
    validate: pa.Table | None,
    *,
    network: Network,
    training: Training,
    compute: TrainCompute,
    steps_per_epoch: int,
) -> None:
    """Raises UserError with the cure if these frames and settings cannot train."""
    total = training.epochs * steps_per_epoch
    if train.num_rows == 0:
        raise UserError(f"model {model}: its train sets hold no frame; look at the quarantine tables of its datasets")
    _check_labelled(train, f"model {model}, train")
    if validate is not None:
        _check_labelled(validate, f"model {model}, validate_on")
    if training.warmup_steps >= total:
        raise UserError(
            f"model {model}: training.warmup_steps is {training.warmup_steps}, but the whole training has {total} "
            f"steps ({training.epochs} epochs of {steps_per_epoch}), so the learning rate would never be reached; "
            f"set training.warmup_steps to {total // 10} or so"
        )
    shares = compute.workers * training.accumulate
    if training.batch % shares:
        parts = f" in {training.accumulate} parts each (training.accumulate)" if training.accumulate > 1 else ""
        raise UserError(
            f"model {model}: training.batch {training.batch} cannot be shared evenly by compute.train.workers "
            f"{compute.workers}{parts}; choose a batch that is a multiple of {shares}"
        )
    if network.norm == "sync" and compute.workers > 1 and not compute.gpus_per_worker:
        raise UserError(
            f"model {model}: network.norm sync is computed by GPUs only, and compute.train.gpus_per_worker is 0; use "
            "norm batch or frozen, or give each worker a GPU"
        )
    if network.input_size is not None:
        largest = tuple(round(side * training.augmentation.scale[1]) for side in network.input_size)
        if any(crop > side for crop, side in zip(training.crop, largest, strict=True)):
            raise UserError(
                f"model {model}: training.crop {training.crop} is larger than a frame can become, {largest} "
                f"(network.input_size times the largest training.augmentation.scale): every batch would be partly "
                f"padding; set training.crop to {network.input_size}"
            )


def _check_labelled(rows: pa.Table, where: str) -> None:
    labels = zip(rows[frame.LABEL_URI].to_pylist(), rows[frame.LABEL_ENCODING].to_pylist(), strict=True)
    bare = [index for index, (uri, encoding) in enumerate(labels) if uri is None or encoding is None]
    if bare:
        raise UserError(
            f"{where}: {len(bare)} of {rows.num_rows} frames have no label (first "
            f"{rows[frame.FRAME_ID][bare[0]].as_py()}); train and validate on labelled datasets, and learn from "
            f"unlabelled ones through self_training.pool"
        )
