"""Train one segmenter: labelled frames and a start in, a model folder and its history out.

B images, K classes, H x W pixels of the crop, h x w of the logits (a quarter).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import torch
from torch import nn

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import Session, fit
from nightseg.data.taxonomy import Taxonomy
from nightseg.data.taxonomy import taxonomy as load_taxonomy
from nightseg.networks.ema import decay_of_step, update_average
from nightseg.networks.model_folder import load_tensors, save_model
from nightseg.progress import Progress
from nightseg.segmenter.augment import Augmentation
from nightseg.segmenter.data import Batch, LabelledFrames, Sample, reading_threads, sample_order, training_batches
from nightseg.segmenter.decoded import place_for
from nightseg.segmenter.encoders import freeze_batch_norm
from nightseg.segmenter.hard_pixels import HardPixels
from nightseg.segmenter.learner import Learner, Stopwatch, step_seed
from nightseg.segmenter.loss import mixture
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn, check_architecture
from nightseg.segmenter.optimizer import build_optimizer, set_learning_rate
from nightseg.segmenter.pixel_loss import PixelLoss
from nightseg.segmenter.schedule import Schedule
from nightseg.segmenter.settings import Loss, Network, Training
from nightseg.segmenter.starting import starting_network
from nightseg.segmenter.step import parts_of, training_step
from nightseg.segmenter.trainable import check_training
from nightseg.segmenter.validation import described, share_statistics, validation_confusion
from nightseg.segmenter.watching import draw_steps, draw_validation
from nightseg.storage import Attempt, Commit, Location, UserError
from nightseg.storage.events import Curves

VERSION = 2

STEPS_BETWEEN_LOOKS: Final = 10  # reading the loss waits for the device, so it is read this seldom
SECONDS_BETWEEN_CHECKPOINTS: Final = 600.0  # in an epoch, unless the recipe says after how many steps
OPTIMIZER_SETTINGS: Final = {
    *("learning_rate", "momentum", "weight_decay", "decay_biases", "encoder_rate", "head_rate"),
}


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
    curves: Location | None = None  # where TensorBoard finds them

    @property
    def steps_per_epoch(self) -> int:
        return self.training.steps_per_epoch or -(-self.train.num_rows // self.training.batch)

    @property
    def total_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        t = self.training
        course = (t.decay, t.poly_power, t.decay_at, t.decay_factor)
        return Schedule(t.learning_rate, self.total_steps, t.warmup_steps, *course)

    @property
    def pixel_loss(self) -> PixelLoss:
        loss, hard = self.loss, self.loss.hard_examples
        weights = None if loss.class_weights is None else self.classes.per_class(loss.class_weights, default=1.0)
        return PixelLoss(
            mixture(loss.kind, loss.alpha, loss.gamma, loss.focal_weight),
            weights,
            None if hard is None else HardPixels(hard.share, hard.confidence, hard.least),
            loss.strips,
        )


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
    """Commit `model/` (the last weights, or their running mean: its card says which) and `history.json` (one entry an
    epoch). `tensorboard/` beside them has the curves and a look at validation frames; it is no part of the result.

    `train` and `validate` are frame tables with absolute uris, every frame labelled; each row's label is mapped by its
    own encoding. `start`: "imagenet" (encoder only), "scratch", or the commit of another model, whose predictor is
    drawn anew when its class list differs. Validation is only watched: no epoch is chosen by it.
    Raises UserError: a frame without label or that has changed, settings that cannot train, a loss that is not finite.
    """
    begun = time.monotonic()
    classes = load_taxonomy(taxonomy)
    begin, curves = attempt.folder / "start", attempt.folder / "tensorboard"
    plan = Plan(train, validate, begin, classes, network, loss, training, seed, curves)
    shape: dict[str, Any] = {"network": network, "training": training, "steps_per_epoch": plan.steps_per_epoch}
    check_training(name, train, validate, compute=compute, **shape)
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
        compute=compute,
        progress=progress,
        title=f"train {name}",
        total=plan.total_steps,
        unit="steps",
    )
    commit = _commit(result.load(), card, plan, attempt, time.monotonic() - begun)
    for scratch in ("trainer", "start"):
        (attempt.folder / scratch).delete()
    return commit


def check_network(network: Network, name: str) -> None:
    """Refuse a network that cannot be built here; called before any stage of the run, so that none is for nothing."""
    try:
        check_architecture(**network.architecture())
    except UserError as error:
        raise UserError(f"model {name}: {error}") from error


def _commit(state: dict[str, Any], card: dict[str, Any], plan: Plan, attempt: Attempt, seconds: float) -> Commit:
    save_model(attempt.folder / "model", state["network"] if state["average"] is None else state["average"], card)
    (attempt.folder / "history.json").write_json(state["history"])
    return attempt.finish(
        rows_in=plan.train.num_rows,
        rows_out=plan.train.num_rows,
        outputs=["model/model.safetensors", "model/model.json", "history.json"],
        summary={"steps": plan.total_steps, "pace": state["pace"], "last": state["history"][-1]},
        seconds=seconds,
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
        "weights": f"running mean, decay {plan.training.average:g}" if plan.training.average else "last",
        "start": start if isinstance(start, str) else start.name,
        "parents": [] if isinstance(start, str) else [{"stage": start.stage, "name": start.name, "key": start.key}],
        "key": attempt.key,  # of the stage: hash of recipe part, inputs and seed
        "seed": plan.seed,
    }


# -- the training itself: runs on every worker ------------------------------------------------------------------------


def learn(session: Session, settings: dict[str, Any]) -> None:
    """All epochs, as one worker sees them. A worker or a run that died continues after its last checkpoint.

    A checkpoint may lie anywhere in an epoch: on CPUs, the resumed training ends with the bits of an undisturbed one.
    """
    plan: Plan = settings["plan"]
    training = plan.training
    frames, watched = _frames(plan, session)
    learner = _learner(plan, session)
    state = session.restore()
    if state is not None:
        learner.restore(state)
    model = _model(learner, plan, session)
    curves = Curves(plan.curves, learner.step) if session.rank == 0 and plan.curves is not None else None

    while learner.step < plan.total_steps:
        _train_epoch(model, learner, frames, plan, session, curves)
        loss, gradient_norm = learner.figures.mean(dim=0).tolist()
        epoch, rate = learner.step // plan.steps_per_epoch, plan.schedule.learning_rate(learner.step - 1)
        record = {"epoch": epoch, "steps": plan.steps_per_epoch, "loss": loss, "gradient_norm": gradient_norm}
        record |= {"learning_rate": rate}
        if watched is not None and (epoch % training.validate_every == 0 or epoch == training.epochs):
            record["validation"] = _validate(learner, watched, plan, session)
            if curves is not None:
                with _autocast(session.device, training):
                    draw_validation(curves, learner, record["validation"], watched, plan.classes)
        learner.history.append(record)
        figures = {"epoch": float(epoch), "loss": loss}
        if record.get("validation", {}).get("miou") is not None:
            figures["miou"] = record["validation"]["miou"]
        _checkpoint(session, learner, curves, figures)
        session.progress(learner.step, **figures)


def _train_epoch(
    model: nn.Module, learner: Learner, frames: LabelledFrames, plan: Plan, session: Session, curves: Curves | None
) -> None:
    """The rest of the epoch that is under way. `model` is the learner's network as the cluster wraps it."""
    device, training, network = session.device, plan.training, learner.network
    network.train()
    if training.freeze_batch_norm:
        freeze_batch_norm(network.body)
    epoch, begun = divmod(learner.step, plan.steps_per_epoch)
    order = sample_order(len(frames), plan.steps_per_epoch * training.batch, plan.seed, epoch)
    batches = _batches(frames, order[begun * training.batch :], epoch, network, plan, session)
    schedule, loss = plan.schedule, plan.pixel_loss
    watch, looked, saved = Stopwatch(learner.pace), learner.step, (time.monotonic(), learner.step)

    def frames_of(index: int) -> list[str]:
        samples = order[index * training.batch : (index + 1) * training.batch]
        return [frames.frame_id(sample.row) for sample in samples]

    for batch in learner.pace.timed(batches):
        rate = schedule.learning_rate(learner.step)
        set_learning_rate(learner.optimizer, rate)
        torch.manual_seed(step_seed(plan.seed, learner.step, session.rank))
        images_B3HW = batch.images.to(device, non_blocking=True)
        labels_BHW = batch.labels.to(device, non_blocking=True)
        figures = training_step(
            model,
            learner.optimizer,
            parts_of(images_B3HW, labels_BHW, training.accumulate),
            loss,
            mean=network.body.mean,
            std=network.body.std,
            precision=_precision(training),
            clip_norm=training.clip_norm,
            world_size=session.world_size,
            sum_over_workers=session.sum,
        )
        if learner.average is not None:
            update_average(learner.average, network, decay_of_step(training.average, learner.step))
        learner.note(figures)

        is_end, is_planned = learner.steps_of_epoch == 0, learner.step % (training.checkpoint_every or math.inf) == 0
        if not (is_end or is_planned or learner.steps_of_epoch % STEPS_BETWEEN_LOOKS == 0):
            continue
        recent = learner.recent(learner.step - looked, frames_of, saved[1])  # waits for the device
        lap = watch.lap((learner.step - looked) * training.batch)
        looked = learner.step
        session.progress(looked, loss=recent.loss, learning_rate=rate)
        if curves is not None:
            draw_steps(curves, looked, recent, rate, lap)
        if not is_end and (is_planned or (not training.checkpoint_every and _is_overdue(session, saved[0]))):
            _checkpoint(session, learner, curves, {"epoch": float(epoch), "step": float(looked), "loss": recent.loss})
            saved = (time.monotonic(), looked)
            watch.restart()


def _is_overdue(session: Session, saved: float) -> bool:
    """Whether the last checkpoint is long ago, by the clock of rank 0, so that all workers agree."""
    late = session.rank == 0 and time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS
    return float(session.sum(torch.tensor([float(late)], device=session.device))) > 0


def _checkpoint(session: Session, learner: Learner, curves: Curves | None, figures: dict[str, float]) -> None:
    if curves is not None:
        curves.flush()  # first: whoever continues from this checkpoint finds the curves up to it
    session.report(figures, learner.state() if session.rank == 0 else None)


def _validate(learner: Learner, watched: LabelledFrames, plan: Plan, session: Session) -> dict[str, Any]:
    """Scores on the validation frames (fractions; null where undefined); each worker does its share of the frames."""
    judged = learner.judged
    if session.world_size > 1:
        share_statistics(judged, session.rank, session.sum)
    mine = range(session.rank, len(watched), session.world_size)
    with _autocast(session.device, plan.training):
        matrix = validation_confusion(judged, watched, mine, batch=plan.training.batch, device=session.device)
    return described(session.sum(matrix.to(session.device)).cpu().numpy(), plan.classes.classes)


# -- what it is made of -----------------------------------------------------------------------------------------------


def _learner(plan: Plan, session: Session) -> Learner:
    """Network, optimiser and running mean before the first step, the same on every worker."""
    training = plan.training
    network = _network(plan).to(session.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training.freeze_batch_norm:
        freeze_batch_norm(network.body)  # before wrapping: DDP waits for every parameter that may have a gradient
    rules = training.model_dump(include=OPTIMIZER_SETTINGS)
    optimizer = build_optimizer(network, training.optimizer, encoder=network.body, **rules)
    return Learner.start(network, optimizer, plan.steps_per_epoch, averages=training.average > 0)


def _model(learner: Learner, plan: Plan, session: Session) -> nn.Module:
    """The network as a step calls it: compiled if asked for, and wrapped for the workers."""
    network = learner.network
    if not plan.training.compile:
        return session.wrap(network)
    if session.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise UserError("training.compile needs a C++ compiler (g++) on every node; install one, or set it to false")
    compiled: Any = torch.compile(network, dynamic=False)  # a module, whatever its type says
    return session.wrap(compiled)


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


def _precision(training: Training) -> torch.dtype:
    return torch.bfloat16 if training.precision == "bfloat16" else torch.float32


def _autocast(device: torch.device, training: Training) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16")
