"""Train one segmenter: labelled frames and a start in, a model folder and its history out.

B images, K classes, H x W pixels of the crop, h x w of the logits (a quarter).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor, nn

from nightseg.compute.training import Session, Workers, fit
from nightseg.config import Loss, Network, TrainCompute, Training
from nightseg.frames import table as frame
from nightseg.frames.augment import Augmentation
from nightseg.frames.taxonomy import Taxonomy
from nightseg.frames.taxonomy import taxonomy as load_taxonomy
from nightseg.learning.batches import (
    Batch,
    LabelledFrames,
    Pace,
    Sample,
    reading_threads,
    sample_order,
    training_batches,
)
from nightseg.learning.decoded import place_for
from nightseg.learning.optimizer import build_optimizer
from nightseg.learning.schedule import learning_rate
from nightseg.learning.segmentation import combined_loss_sum, mixture
from nightseg.learning.starting import starting_network
from nightseg.learning.validation import validation_confusion
from nightseg.measures.confusion import scores
from nightseg.networks.checkpoint import load_tensors, save_model
from nightseg.networks.encoders import freeze_batch_norm, normalise
from nightseg.networks.semantic_fpn import SemanticFPN, build_semantic_fpn, check_architecture, upsample_logits
from nightseg.progress import Progress
from nightseg.storage import Location, UserError
from nightseg.workspace import Attempt, Commit

VERSION = 2

STEPS_BETWEEN_CHECKS: Final = 10  # reading the loss waits for the device, so it is read this seldom


@dataclass(frozen=True)
class Plan:
    """What every worker needs to know. `start` is a model folder with the weights before the first step."""

    train: pa.Table
    validate: pa.Table | None
    start: Location
    classes: Taxonomy
    network: Network
    loss: Loss
    training: Training
    seed: int
    threads: int  # that decode and augment, in each worker

    @property
    def steps_per_epoch(self) -> int:
        return self.training.steps_per_epoch or -(-self.train.num_rows // self.training.batch)

    @property
    def total_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch


def train_segmenter(
    train: pa.Table,
    validate: pa.Table | None,
    *,
    name: str,
    network: Network,
    loss: Loss,
    training: Training,
    start: str | Commit,
    taxonomy: str,
    seed: int,
    attempt: Attempt,
    compute: TrainCompute,
    progress: Progress,
) -> Commit:
    """Commit `model/` (the weights of the last epoch) and `history.json` (one entry an epoch).

    `train` and `validate` are frame tables with absolute uris, every frame labelled; each row's label is mapped by its
    own encoding. `start`: "imagenet" (encoder only), "scratch", or the commit of another model, whose predictor is
    drawn anew when its class list differs. Validation is only watched: no epoch is chosen by it.
    Raises UserError: a frame without label or that has changed, settings that cannot train, a loss that is not finite.
    """
    begun = time.monotonic()
    classes = load_taxonomy(taxonomy)
    threads = max(1, min(8, int(compute.cpus_per_worker) - 1))
    workers = Workers(compute.workers, compute.cpus_per_worker, compute.gpus_per_worker, compute.max_failures)
    plan = Plan(train, validate, attempt.folder / "start", classes, network, loss, training, seed, threads)
    _check(plan, name, compute)
    initial = starting_network(
        start if isinstance(start, str) else start.folder / "model",
        **network.architecture(),
        encoder_weights=network.encoder_weights,
        classes=classes,
        seed=seed,
        say=lambda message: progress.say(f"model {name}: {message}"),
    )
    card = _card(initial, plan, start, attempt)
    save_model(plan.start, initial.state_dict(), card)
    result = fit(
        learn,
        {"plan": plan},
        folder=attempt.folder / "trainer",
        name=name,
        workers=workers,
        progress=progress,
        title=f"train {name}",
        total=plan.total_steps,
        unit="steps",
    )
    commit = _commit(result.load(), card, plan, attempt, time.monotonic() - begun)
    for scratch in ("trainer", "start"):
        (attempt.folder / scratch).delete()
    return commit


def _commit(state: dict[str, Any], card: dict[str, Any], plan: Plan, attempt: Attempt, seconds: float) -> Commit:
    save_model(attempt.folder / "model", state["network"], card)
    (attempt.folder / "history.json").write_json(state["history"])
    return attempt.finish(
        rows_in=plan.train.num_rows,
        rows_out=plan.train.num_rows,
        outputs=["model/model.safetensors", "model/model.json", "history.json"],
        summary={"steps": plan.total_steps, "pace": state["pace"], "last": state["history"][-1]},
        seconds=seconds,
    )


# -- before the training ----------------------------------------------------------------------------------------------


def check_network(network: Network, name: str) -> None:
    """Refuse a network that cannot be built here; called before any stage of the run, so that none is for nothing."""
    try:
        check_architecture(**network.architecture())
    except UserError as error:
        raise UserError(f"model {name}: {error}") from error


def _check(plan: Plan, name: str, compute: TrainCompute) -> None:
    """Refuse what cannot train, before a worker starts."""
    network, training, total = plan.network, plan.training, plan.total_steps
    if plan.train.num_rows == 0:
        raise UserError(f"model {name}: its train sets hold no frame; look at the quarantine tables of its datasets")
    _check_labelled(plan.train, f"model {name}, train")
    if plan.validate is not None:
        _check_labelled(plan.validate, f"model {name}, validate_on")
    if training.warmup_steps >= total:
        raise UserError(
            f"model {name}: training.warmup_steps is {training.warmup_steps}, but the whole training has {total} steps "
            f"({training.epochs} epochs of {plan.steps_per_epoch}), so the learning rate would never be reached; "
            f"set training.warmup_steps to {total // 10} or so"
        )
    if training.batch % compute.workers:
        raise UserError(
            f"model {name}: training.batch {training.batch} cannot be shared evenly by compute.train.workers "
            f"{compute.workers}; choose a batch that is a multiple of {compute.workers}"
        )
    if network.norm == "sync" and compute.workers > 1 and not compute.gpus_per_worker:
        raise UserError(
            f"model {name}: network.norm sync is computed by GPUs only, and compute.train.gpus_per_worker is 0; use "
            "norm batch or frozen, or give each worker a GPU"
        )
    if network.input_size is not None:
        largest = tuple(round(side * training.augmentation.scale[1]) for side in network.input_size)
        if any(crop > side for crop, side in zip(training.crop, largest, strict=True)):
            raise UserError(
                f"model {name}: training.crop {training.crop} is larger than a frame can become, {largest} "
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


def _card(initial: SemanticFPN, plan: Plan, start: str | Commit, attempt: Attempt) -> dict[str, Any]:
    classes, network = plan.classes, plan.network
    return {
        "kind": "semantic_fpn",
        **network.architecture(),
        "num_classes": classes.num_classes,
        "taxonomy": {
            "name": classes.name,
            "classes": list(classes.classes),
            "palette": [list(colour) for colour in classes.palette],
        },
        "input_size": list(network.input_size) if network.input_size else None,
        "mean": list(initial.body.mean),
        "std": list(initial.body.std),
        "start": start if isinstance(start, str) else start.name,
        "parents": [] if isinstance(start, str) else [{"stage": start.stage, "name": start.name, "key": start.key}],
        "key": attempt.key,  # of the stage: hash of recipe part, inputs and seed
        "seed": plan.seed,
    }


# -- the training itself: runs on every worker ------------------------------------------------------------------------


def learn(session: Session, settings: dict[str, Any]) -> None:
    """All epochs, as one worker sees them. A worker or a run that died continues after its last finished epoch."""
    plan: Plan = settings["plan"]
    training = plan.training
    frames, watched = _frames(plan, session)
    network = _network(plan).to(session.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training.freeze_batch_norm:
        freeze_batch_norm(network.body)  # before wrapping: DDP waits for every parameter that may have a gradient
    optimizer = build_optimizer(
        network,
        training.optimizer,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    history: list[dict[str, Any]] = []
    pace = Pace()
    state = session.restore()
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        history, pace = state["history"], Pace(**state["pace"])
    model = session.wrap(network)

    for epoch in range(len(history), training.epochs):
        record = {"epoch": epoch + 1, **_train_epoch(epoch, model, network, optimizer, frames, plan, session, pace)}
        if watched is not None and ((epoch + 1) % training.validate_every == 0 or epoch + 1 == training.epochs):
            record["validation"] = _validate(network, watched, plan, session)
        history.append(record)
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "pace": asdict(pace),
        }
        figures = {"epoch": float(epoch + 1), "loss": record["loss"]}
        if record.get("validation", {}).get("miou") is not None:
            figures["miou"] = record["validation"]["miou"]
        session.report(figures, state if session.rank == 0 else None)
        session.progress((epoch + 1) * plan.steps_per_epoch, **figures)


def _train_epoch(
    epoch: int,
    model: nn.Module,
    network: SemanticFPN,
    optimizer: torch.optim.Optimizer,
    frames: LabelledFrames,
    plan: Plan,
    session: Session,
    pace: Pace,
) -> dict[str, Any]:
    """Every step of one epoch. `model` is `network` as the cluster wraps it."""
    device, training, loss = session.device, plan.training, plan.loss
    terms = mixture(loss.kind, loss.alpha, loss.gamma, loss.focal_weight)
    network.train()
    if training.freeze_batch_norm:
        freeze_batch_norm(network.body)
    order = sample_order(len(frames), plan.steps_per_epoch * training.batch, plan.seed, epoch)
    figures = torch.zeros(plan.steps_per_epoch, 2, device=device)  # loss and gradient norm of each step
    rate, begun = 0.0, time.perf_counter()
    for index, batch in enumerate(pace.timed(_batches(frames, order, epoch, network, plan, session))):
        step = epoch * plan.steps_per_epoch + index
        rate = _set_learning_rate(optimizer, step, plan)
        images_B3HW = batch.images.to(device, non_blocking=True)
        labels_BHW = batch.labels.to(device, non_blocking=True)
        with _autocast(device, training):
            logits_BKhw = model(normalise(images_B3HW, network.body.mean, network.body.std))
        total, num_valid = combined_loss_sum(upsample_logits(logits_BKhw, *training.crop), labels_BHW, *terms)
        # A mean over the valid pixels of all workers: DDP averages gradients, hence the factor world_size.
        all_total, all_valid = session.sum(torch.stack([total.detach(), num_valid]))
        optimizer.zero_grad(set_to_none=True)
        (total * session.world_size / all_valid.clamp_min(1)).backward()
        optimizer.step()
        figures[index, 0] = all_total / all_valid.clamp_min(1)
        figures[index, 1] = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        )
        if (index + 1) % STEPS_BETWEEN_CHECKS == 0 or index + 1 == plan.steps_per_epoch:  # waits for the device
            recent = _check_finite(figures[: index + 1], frames, order, training.batch, step - index)
            session.progress(step + 1, loss=recent, learning_rate=rate)
    pace.seconds += time.perf_counter() - begun
    pace.frames += len(order)
    mean_loss, gradient_norm = figures.mean(dim=0).tolist()
    return {"steps": plan.steps_per_epoch, "loss": mean_loss, "gradient_norm": gradient_norm, "learning_rate": rate}


def _check_finite(figures: Tensor, frames: LabelledFrames, order: list[Sample], batch: int, first_step: int) -> float:
    """Mean loss of the last steps; UserError with the frames of the first step whose loss or gradient is not finite."""
    wrong = (~torch.isfinite(figures)).any(dim=1).nonzero()
    if len(wrong):
        index = int(wrong[0])
        loss, norm = figures[index].tolist()
        ids = ", ".join(frames.frame_id(sample.row) for sample in order[index * batch : (index + 1) * batch])
        raise UserError(
            f"training stopped at step {first_step + index + 1}: loss {loss:g}, gradient norm {norm:g}\n"
            f"  Frames of that batch: {ids}\n"
            f"  The checkpoint of the last whole epoch is kept. Lower training.learning_rate, lengthen "
            f"training.warmup_steps, or use training.precision: float32."
        )
    return float(figures[-STEPS_BETWEEN_CHECKS:, 0].mean())


def _validate(network: SemanticFPN, watched: LabelledFrames, plan: Plan, session: Session) -> dict[str, Any]:
    """Scores on the validation frames (fractions; null where undefined); each worker does its share of the frames."""
    mine = range(session.rank, len(watched), session.world_size)
    with _autocast(session.device, plan.training):
        matrix = validation_confusion(network, watched, mine, batch=plan.training.batch, device=session.device)
    found = scores(session.sum(matrix.to(session.device)).cpu().numpy(), "cityscapes")
    iou = {name: _or_null(value) for name, value in zip(plan.classes.classes, found.iou, strict=True)}
    means = {key: _or_null(getattr(found, key)) for key in ("pa", "ca", "miou", "fwiou")}
    return {**means, "iou": iou}


def _or_null(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)


def _frames(plan: Plan, session: Session) -> tuple[LabelledFrames, LabelledFrames | None]:
    """Training frames (labels at the input size) and validation frames (labels at their own size)."""

    def decoded(rows: pa.Table, resize_labels: bool) -> LabelledFrames:
        where: dict[str, Any] = {"size": plan.network.input_size, "resize_labels": resize_labels}
        kept = place_for(rows, plan.classes, **where, sharers=2 * session.world_size, workers=session.world_size)
        return LabelledFrames(rows, plan.classes, **where, kept=kept)

    return decoded(plan.train, True), None if plan.validate is None else decoded(plan.validate, False)


def _network(plan: Plan) -> SemanticFPN:
    network = build_semantic_fpn(**plan.network.architecture(), num_classes=plan.classes.num_classes)
    tensors, _ = load_tensors(plan.start)
    network.load_state_dict(tensors)
    return network


def _batches(
    frames: LabelledFrames, order: list[Sample], epoch: int, network: SemanticFPN, plan: Plan, session: Session
) -> Iterator[Batch]:
    drawn = plan.training.augmentation
    red, green, blue = (round(255 * mean) for mean in network.body.mean)
    return training_batches(
        frames,
        order,
        batch=plan.training.batch,
        rank=session.rank,
        world_size=session.world_size,
        seed=plan.seed,
        epoch=epoch,
        crop=plan.training.crop,
        augmentation=Augmentation(**drawn.model_dump()),
        fill=(red, green, blue),
        threads=reading_threads(torch.get_num_threads(), session.device.type),
        pin_memory=session.device.type == "cuda",
    )


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, plan: Plan) -> float:
    rate = learning_rate(
        step,
        peak=plan.training.learning_rate,
        total_steps=plan.total_steps,
        warmup_steps=plan.training.warmup_steps,
        power=plan.training.poly_power,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _autocast(device: torch.device, training: Training) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16")
