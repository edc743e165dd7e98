"""The training of a segmenter as one worker sees it: epochs, steps, validation, checkpoints.

B images, K classes, H x W pixels of the crop, h x w of the logits (a quarter).

The learning rate is a function of the step, order and augmentation of the frames of (seed, epoch), dropout of
`step_seed`: a checkpoint within an epoch needs no state of a scheduler, loader or generator, whoever reads it.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.cluster.session import Session, exchange, parts_of
from nightseg.data import table as frame
from nightseg.data.taxonomy import Taxonomy
from nightseg.metrics.confusion import Counts, confusion_matrix, scores
from nightseg.networks.ema import ema_of, update_ema, warmed_up_decay
from nightseg.segmenter.data import (
    Batch,
    LabelledFrames,
    Part,
    PoolBatch,
    Reading,
    Sample,
    Sampler,
    cache_for,
    label_pixels,
    pool_batches,
    reading_threads,
    training_batches,
)
from nightseg.segmenter.encoders import freeze_batch_norm
from nightseg.segmenter.loss import divisor, segmentation_loss
from nightseg.segmenter.network import SemanticFPN, load_semantic_fpn, upsample_logits
from nightseg.segmenter.optimizer import build_optimizer, learning_rate_of, set_learning_rate
from nightseg.segmenter.settings import Loss, Network, Training
from nightseg.segmenter.teacher import Pool, Teacher
from nightseg.segmenter.watching import draw_validation
from nightseg.storage import Location, UserError
from nightseg.storage.events import Curves

STEPS_BETWEEN_READS: Final = 10  # reading the loss waits for the device, so it is read this seldom
SECONDS_BETWEEN_CHECKPOINTS: Final = 600.0  # in an epoch, unless the recipe says after how many steps
POOL_STREAM: Final = 2**31  # in the place of a worker's number: random numbers that no worker draws
NORM_GUARD: Final = 1e-6  # torch.nn.utils.clip_grad_norm_ has the same

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What every worker needs to know. `start` is a model folder with the weights before the first step."""

    train: pa.Table
    parts: Sequence[Part]
    validate: pa.Table | None
    start: Location
    classes: Taxonomy
    network: Network
    loss: Loss
    training: Training
    seed: int
    curves: Location | None = None  # where TensorBoard finds them
    pool: Pool | None = None  # of online self-training

    @cached_property
    def sampler(self) -> Sampler:
        classes = self.training.class_sampling
        counted = None if classes is None else label_pixels(self.train, self.classes.num_classes)
        return Sampler(self.parts, classes, counted)

    @property
    def steps_per_epoch(self) -> int:
        return self.training.steps_of_epoch(self.sampler.num_frames)

    @property
    def total_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch

    @cached_property
    def _domains(self) -> list[str]:
        return [str(domain) for domain in self.train[frame.DOMAIN].to_pylist()]

    def is_night(self, sample: Sample) -> bool:
        """Whether a labelled frame is seen under night light: taken so, or translated."""
        rendered = self.parts[sample.part].render is not None
        return rendered or self._domains[sample.row] in ("night", "twilight")

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        weights = self.loss.class_weights
        return None if weights is None else self.classes.per_class(weights, default=1.0)

    def learning_rate(self, step: int) -> float:
        return learning_rate_of(self.training, step, self.total_steps)


def learn(session: Session, settings: dict[str, Any]) -> None:
    """All epochs, as one worker sees them. A worker or a run that died continues after its last checkpoint.

    A checkpoint may lie anywhere in an epoch: on CPUs, the resumed training ends with the bits of an undisturbed one.
    """
    plan: Plan = settings["plan"]
    training = plan.training
    frames, watched, pool = _frames(plan, session)
    learner = start_learner(plan, session)
    state = session.restore()
    if state is not None:
        learner.restore(state)
    model = _model(learner, plan, session)
    curves = Curves(plan.curves if session.rank == 0 else None, learner.step)

    while learner.step < plan.total_steps:
        _train_epoch(model, learner, frames, pool, plan, session, curves)
        loss, gradient_norm = learner.metrics.mean(dim=0).tolist()
        epoch, rate = learner.step // plan.steps_per_epoch, plan.learning_rate(learner.step - 1)
        record = {"epoch": epoch, "steps": plan.steps_per_epoch, "loss": loss, "gradient_norm": gradient_norm}
        record |= {"learning_rate": rate}
        if learner.teacher is not None:
            record["teacher"] = learner.teacher.record()
        if watched is not None and (epoch % training.validate_every == 0 or epoch == training.epochs):
            record["validation"] = validate(learner.evaluated, watched, plan, session)
            if training.keep == "best":
                learner.keep_if_best(epoch, record["validation"]["miou"])
            with _autocast(session.device, training):
                draw_validation(curves, learner.step, record["validation"], learner.evaluated, watched)
        learner.history.append(record)
        reported = {"epoch": float(epoch), "loss": loss}
        reported |= _figures(record.get("validation", {}))
        _checkpoint(session, learner, curves, reported)
        session.progress(learner.step, **reported)


def _figures(scores: Mapping[str, Any]) -> dict[str, float]:
    """A validation as a progress carries it: mIoU for the eye, the others by `validation/KEY` for a search."""
    plain = {key: value for key, value in scores.items() if key != "iou"}
    by_class = {f"iou.{name}": value for name, value in scores.get("iou", {}).items()}
    known = {key: value for key, value in (plain | by_class).items() if value is not None}
    return {key if key == "miou" else f"validation/{key}": value for key, value in known.items()}


def _train_epoch(
    model: nn.Module,
    learner: Learner,
    frames: LabelledFrames,
    pool: LabelledFrames | None,
    plan: Plan,
    session: Session,
    curves: Curves,
) -> None:
    """The rest of the epoch that is under way. `model` is the learner's network as the cluster wraps it."""
    training, network, parts = plan.training, learner.network, _parts(plan, session)
    network.train()
    if training.freeze_batch_norm:
        freeze_batch_norm(network.body)
    epoch, begun = divmod(learner.step, plan.steps_per_epoch)
    order = plan.sampler.epoch(plan.steps_per_epoch * training.batch, plan.seed, epoch)
    batches = _batches(frames, order[begun * training.batch :], epoch, learner, plan, session)
    read, saved = learner.step, (time.monotonic(), learner.step)
    learner.pace.restart()

    def frames_of(index: int) -> list[str]:
        return [frames.frame_id(sample.row) for sample in order[index * training.batch : (index + 1) * training.batch]]

    unlabelled = _pool_batches(pool, learner, plan, session)
    for batch, pool_batch in learner.pace.timed(zip(batches, unlabelled, strict=False)):
        set_learning_rate(learner.optimizer, rate := plan.learning_rate(learner.step))
        torch.manual_seed(step_seed(plan.seed, learner.step, session.rank))
        metrics = training_step(
            model,
            learner.optimizer,
            network.normalise,
            _with_pool(batch.to(session.device), pool_batch, order, learner, plan, session),
            plan.loss,
            training,
            parts=parts,
            class_weights=plan.class_weights,
            world_size=session.world_size,
            sum_over_workers=session.sum,
        )
        if learner.teacher is not None:
            average_statistics(network, session)  # or every worker would have another teacher
        if learner.ema is not None:
            update_ema(learner.ema, network, warmed_up_decay(training.ema_decay, learner.step))
        learner.note(metrics)

        # Once in a while: progress, curves, checkpoints within the epoch.
        is_end, is_planned = learner.steps_of_epoch == 0, learner.step % (training.checkpoint_every or math.inf) == 0
        if not (is_end or is_planned or learner.steps_of_epoch % STEPS_BETWEEN_READS == 0):
            continue
        recent = learner.recent(learner.step - read, frames_of, saved[1])  # waits for the device
        pace = learner.pace.lap((learner.step - read) * training.batch)
        read = learner.step
        session.progress(read, loss=recent["train/loss"], learning_rate=rate)
        curves.scalars(read, {**recent, "train/learning_rate": rate, **pace, **learner.teacher_points()})
        curves.flush_if_due()
        if not is_end and (is_planned or (not training.checkpoint_every and _is_overdue(session, saved[0]))):
            reported = {"epoch": float(epoch), "step": float(read), "loss": recent["train/loss"]}
            _checkpoint(session, learner, curves, reported)
            saved = (time.monotonic(), read)
            learner.pace.restart()


def _batches(
    frames: LabelledFrames, order: list[Sample], epoch: int, learner: Learner, plan: Plan, session: Session
) -> Iterator[Batch]:
    reading = _reading(learner, session, plan.seed, epoch)
    return training_batches(frames, plan.parts, order, plan.training, reading)


def _pool_batches(
    frames: LabelledFrames | None, learner: Learner, plan: Plan, session: Session
) -> Iterator[PoolBatch | None]:
    """Of the steps of this epoch that are to come; None before the teacher teaches, and where there is no pool."""
    epoch, begun = divmod(learner.step, plan.steps_per_epoch)
    if frames is None or plan.pool is None:
        yield from itertools.repeat(None, plan.steps_per_epoch)
        return
    online = plan.pool.teaching.online
    waiting = min(max(online.warmup_steps - learner.step, 0), plan.steps_per_epoch - begun)
    yield from itertools.repeat(None, waiting)
    batch, seed = online.frames(plan.training), step_seed(plan.seed, 0, POOL_STREAM)
    order = Sampler([Part.whole(len(frames))]).epoch(plan.steps_per_epoch * batch, seed, epoch)[
        (begun + waiting) * batch :
    ]
    reading = _reading(learner, session, seed, epoch)
    yield from pool_batches(frames, order, online.augmentation, reading, batch=batch, crop=plan.training.crop)


def _with_pool(
    batch: Batch, pool_batch: PoolBatch | None, order: list[Sample], learner: Learner, plan: Plan, session: Session
) -> Batch:
    """The batch with what the teacher makes of the pool, while it teaches."""
    teacher = learner.teacher
    if teacher is None or pool_batch is None or not teacher.teaches(learner.step):
        return batch
    begun = learner.steps_of_epoch * plan.training.batch
    mine = order[begun : begun + plan.training.batch][session.rank :: session.world_size]
    night = [place for place, sample in enumerate(mine) if plan.is_night(sample)]
    return teacher.extend(batch, pool_batch.to(session.device), learner.step, session, night)


def _parts(plan: Plan, session: Session) -> int:
    """In how many parts each worker takes a step. Norms that are shared exchange in every part: all have as many."""
    parts = parts_of(session, plan.training.accumulate)
    return min(parts, plan.training.batch // session.world_size) if plan.network.norm == "sync" else parts


def _reading(learner: Learner, session: Session, seed: int, epoch: int) -> Reading:
    red, green, blue = (round(255 * mean) for mean in learner.network.body.mean)  # normalises to zero
    return Reading(
        session.rank,
        session.world_size,
        seed,
        epoch,
        fill=(red, green, blue),
        threads=reading_threads(torch.get_num_threads(), session.device.type),
        pin_memory=session.device.type == "cuda",
    )


def _is_overdue(session: Session, saved: float) -> bool:
    """Whether the last checkpoint is long ago, by the clock of rank 0, so that all workers agree."""
    late = session.rank == 0 and time.monotonic() - saved >= SECONDS_BETWEEN_CHECKPOINTS
    return float(session.sum(torch.tensor([float(late)], device=session.device))) > 0


def _checkpoint(session: Session, learner: Learner, curves: Curves, metrics: dict[str, float]) -> None:
    curves.flush()  # first: whoever continues from this checkpoint finds the curves up to it
    session.report(metrics, learner.state() if session.rank == 0 else None)


# -- one step ---------------------------------------------------------------------------------------------------------


class StepMetrics(NamedTuple):
    """float32 scalars on the device: mean loss over the pixels of all workers, norm of the gradient before clipping."""

    loss: Tensor
    gradient_norm: Tensor


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    normalise: Callable[[Tensor], Tensor],
    batch: Batch,
    loss: Loss,
    training: Training,
    *,
    parts: int | None = None,
    class_weights: Sequence[float] | None = None,
    world_size: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> StepMetrics:
    """Learn from a batch on the device, in `parts` as equal as can be; nothing here waits for the device.

    `parts`: null = `training.accumulate`; never more than there are frames. Sums are added up over parts and workers,
    and divided once, by the weight of all pixels that count: so a step is the same however its frames are split (but
    for batch norms, whose statistics are those of a part). `model` takes normalised images to logits at a quarter of
    their size; it may be wrapped for several workers, then `sum_over_workers` adds a tensor up over them.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = []
    count = min(parts or training.accumulate, len(batch.labels))
    split = [part.tensor_split(count) for part in batch if part is not None]
    for number, (images_B3HW, labels_BHW, *weights) in enumerate(zip(*split, strict=True), 1):
        # Of several parts only the last one exchanges gradients: all that were added up by then.
        with exchange(model, number == count):
            with _autocast(images_B3HW.device, training):
                logits_BKhw = model(normalise(images_B3HW))
            total, weight = segmentation_loss(
                logits_BKhw, labels_BHW, loss, class_weights, pixel_weights_BHW=weights[0] if weights else None
            )
            torch.autograd.backward(total)
        sums.append(torch.stack([total.detach(), weight]))
    all_total, all_weight = sum_over_workers(torch.stack(sums).sum(dim=0))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = world_size / divisor(all_weight)  # the exchange has averaged over the workers
    norm = torch.nn.utils.get_total_norm(gradients) * scale
    if training.clip_norm is not None:
        scale = scale * (training.clip_norm / (norm + NORM_GUARD)).clamp_max(1.0)
    torch._foreach_mul_(gradients, scale)
    optimizer.step()
    return StepMetrics(all_total / divisor(all_weight), norm)


def _autocast(device: torch.device, training: Training) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bfloat16")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step on one worker."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


# -- what changes while it learns, and how it goes into a checkpoint and comes back -----------------------------------


@dataclass
class Pace:
    """How fast a training went, without validations and checkpoints; `waiting_seconds` of its `seconds` it waited for
    a batch."""

    seconds: float = 0.0
    waiting_seconds: float = 0.0
    frames: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What happened since the last lap does not count."""
        self._begun, self._waited = time.perf_counter(), self.waiting_seconds

    def lap(self, frames: int) -> dict[str, float]:
        """`frames` were learned from since the last lap or restart; the points of its curves."""
        seconds, waiting = time.perf_counter() - self._begun, self.waiting_seconds - self._waited
        self.seconds += seconds
        self.frames += frames
        self.restart()
        least = max(seconds, 1e-9)
        return {"pace/images_per_second": frames / least, "pace/data_wait_share": waiting / least}

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; time spent waiting for them is counted."""
        stream = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(stream, None)
            self.waiting_seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


@dataclass
class Learner:
    """A network and its optimiser after `step` steps.

    `ema`: of the network, if one is kept; `teacher`: what labels a pool with it. `metrics`: steps_per_epoch x 2, loss
    and gradient norm of the steps of the epoch that is under way or has just ended. `history`: one entry for each
    finished epoch. `best`: epoch, miou and weights (on the CPU) of the best validation so far, if it is asked for.
    """

    network: SemanticFPN
    optimizer: torch.optim.Optimizer
    ema: SemanticFPN | None
    metrics: Tensor
    teacher: Teacher | None = None
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    best: dict[str, Any] | None = None

    @property
    def evaluated(self) -> SemanticFPN:
        """What is validated and becomes the model."""
        return self.network if self.ema is None else self.ema

    @property
    def steps_of_epoch(self) -> int:
        """Steps of the epoch that is under way; 0 between epochs."""
        return self.step % len(self.metrics)

    def note(self, metrics: StepMetrics) -> None:
        """One more step is done. Nothing is read back from the device."""
        self.metrics[self.steps_of_epoch] = torch.stack(metrics)
        self.step += 1

    def keep_if_best(self, epoch: int, miou: float | None) -> None:
        """Remember the validated weights if none before were as good: of equal epochs the earliest stays.

        All workers call it with the same score; the statistics of batch norms are rank 0's by then, as in checkpoints.
        """
        if miou is not None and (self.best is None or miou > self.best["miou"]):
            weights = {name: value.detach().cpu().clone() for name, value in self.evaluated.state_dict().items()}
            self.best = {"epoch": epoch, "miou": miou, "weights": weights}

    def recent(self, steps: int, frames_of: Callable[[int], Sequence[str]], saved_step: int) -> dict[str, float]:
        """Means over the last `steps` steps, which lie in one epoch, as points of curves. Waits for the device.

        Raises UserError if a loss or a gradient is not finite, with the frames of that step: `frames_of` its number in
        the epoch. `saved_step`: where the last checkpoint is, for the message.
        """
        end = self.steps_of_epoch or len(self.metrics)
        metrics = self.metrics[end - steps : end]
        wrong = (~torch.isfinite(metrics)).any(dim=1).nonzero()
        if len(wrong):
            index = end - steps + int(wrong[0])
            loss, norm = self.metrics[index].tolist()
            kept = (
                f"The last good checkpoint (step {saved_step}) is kept" if saved_step else "There is no checkpoint yet"
            )
            raise UserError(
                f"training, step {self.step - end + index + 1}: loss {loss:g}, gradient norm {norm:g}\n"
                f"  Frames of that batch: {', '.join(frames_of(index))}\n  {kept}",
                cure="lower training.learning_rate, lengthen training.warmup_steps, set training.clip_norm, or use "
                "training.precision: float32",
            )
        mean = metrics.mean(dim=0).tolist()
        return {"train/loss": mean[0], "train/gradient_norm": mean[1]}

    def teacher_points(self) -> dict[str, float]:
        """Its curves; none before it has taught."""
        return self.teacher.points() if self.teacher is not None and self.teacher.taught else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors, numbers, lists and dictionaries."""
        return {
            "network": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "metrics": self.metrics[: self.steps_of_epoch].cpu().clone(),
            "teacher": None if self.teacher is None else self.teacher.state(),
            "history": self.history,
            "pace": asdict(self.pace),
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.network.load_state_dict(state["network"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.teacher is not None:
            self.teacher.restore(state["teacher"])
        self.step = int(state["step"])
        self.metrics[: len(state["metrics"])] = state["metrics"].to(self.metrics.device)
        self.history, self.pace = list(state["history"]), Pace(**state["pace"])
        self.best = state["best"]


def start_learner(plan: Plan, session: Session) -> Learner:
    """Network, optimiser and EMA before the first step, the same on every worker."""
    network = load_semantic_fpn(plan.start, plan.network, plan.classes.num_classes)
    network = network.to(session.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if plan.training.freeze_batch_norm:
        freeze_batch_norm(network.body)  # before wrapping: DDP waits for every parameter that may have a gradient
    optimizer = build_optimizer(network, plan.training, encoder=network.body)
    ema = ema_of(network) if plan.training.ema_decay else None
    teacher = None
    if plan.pool is not None:
        assert ema is not None, "online self-training without ema_decay"
        teacher = Teacher(ema, plan.pool.teaching, plan.training, plan.seed, plan.classes, plan.pool.warnings)
    return Learner(network, optimizer, ema, torch.zeros(plan.steps_per_epoch, 2, device=session.device), teacher)


def _model(learner: Learner, plan: Plan, session: Session) -> nn.Module:
    """The network as a step calls it: compiled if asked for, and wrapped for the workers."""
    if not plan.training.compile:
        return session.wrap(learner.network)
    if session.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise UserError(
            "training.compile: it needs a C++ compiler (g++) on every node", cure="install one, or set it to false"
        )
    compiled: Any = torch.compile(learner.network, dynamic=False)  # a module, whatever its type says
    return session.wrap(compiled)


def _frames(plan: Plan, session: Session) -> tuple[LabelledFrames, LabelledFrames | None, LabelledFrames | None]:
    """Training frames (labels at the input size), validation frames (labels at their own size), the pool."""
    tables = 2 if plan.pool is None else 3

    def decoded(rows: pa.Table, resize_labels: bool) -> LabelledFrames:
        where: dict[str, Any] = {"size": plan.network.input_size, "resize_labels": resize_labels}
        cache = cache_for(rows, plan.classes, **where, sharers=tables * session.world_size, workers=session.world_size)
        return LabelledFrames(rows, plan.classes, **where, cache=cache)

    return (
        decoded(plan.train, True),
        None if plan.validate is None else decoded(plan.validate, False),
        None if plan.pool is None else decoded(plan.pool.rows, True),
    )


# -- validation -------------------------------------------------------------------------------------------------------


def validate(network: SemanticFPN, frames: LabelledFrames, plan: Plan, session: Session) -> dict[str, Any]:
    """Scores on whole frames at the labels' own size, fractions, null where undefined; `iou` by class.

    Each worker does its share of the frames; the network is left in evaluation mode.
    """
    if session.world_size > 1:
        _share_statistics(network, session)
    network.eval()
    total = np.zeros((network.num_classes, network.num_classes), dtype=np.int64)
    waiting: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), _autocast(session.device, plan.training):
        for index in range(session.rank, len(frames), session.world_size):
            image, label = frames[index]
            if waiting and (len(waiting) == plan.training.batch or waiting[-1][0].shape != image.shape):
                total += _confusion(network, waiting, session.device)
                waiting = []
            waiting.append((image, label))
        if waiting:
            total += _confusion(network, waiting, session.device)
    found = scores(session.sum(torch.from_numpy(total).to(session.device)).cpu().numpy(), "cityscapes")
    iou = {name: _or_null(value) for name, value in zip(plan.classes.classes, found.iou, strict=True)}
    return {key: _or_null(getattr(found, key)) for key in ("pa", "ca", "miou", "fwiou")} | {"iou": iou}


def _confusion(network: SemanticFPN, views: list[tuple[Tensor, Tensor]], device: torch.device) -> Counts:
    images_B3HW = torch.stack([image for image, _ in views]).to(device)
    logits_BKhw = network(network.normalise(images_B3HW))
    total = np.zeros((network.num_classes, network.num_classes), dtype=np.int64)
    for logits_Khw, (image, label) in zip(logits_BKhw, views, strict=True):
        logits_1KHW = upsample_logits(logits_Khw[None], *image.shape[-2:])
        if logits_1KHW.shape[-2:] != label.shape:
            logits_1KHW = F.interpolate(logits_1KHW, tuple(label.shape), mode="bilinear", align_corners=False)
        prediction = logits_1KHW[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        total += confusion_matrix(label.numpy(), prediction, network.num_classes)
    return total


@torch.no_grad()
def _share_statistics(network: SemanticFPN, session: Session) -> None:
    """Rank 0's batch norm statistics for every worker: each has its own after a step, and rank 0's are those saved."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    mine = torch.cat([buffer.flatten() for buffer in buffers])
    shared = session.sum(mine if session.rank == 0 else torch.zeros_like(mine))
    for buffer, values in zip(buffers, torch.split(shared, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))


@torch.no_grad()
def average_statistics(network: SemanticFPN, session: Session) -> None:
    """Means over the workers in place of each one's batch norm statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers or session.world_size == 1:
        return
    mean = session.sum(torch.cat([buffer.flatten() for buffer in buffers])) / session.world_size
    for buffer, values in zip(buffers, torch.split(mean, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))


def _or_null(fraction: float) -> float | None:
    return None if math.isnan(fraction) else float(fraction)
