"""Online self-training: the EMA of the student labels unlabelled frames while the student learns (mean teacher, arXiv
1703.01780, with class mixes, DACS, arXiv 2007.08702), and guards that see when it teaches wrong things.

B labelled frames, P frames of the pool, H x W pixels of the crop, K classes, N bins of confidence.

In a step the teacher labels the pool; of each class the pixels below its bar are left out (255), and those that the
rules and the guard refuse. What is left becomes more frames of the student's batch. Bars follow from running counts of
pixels by class and confidence, as those of offline pseudo-labels do from a pass over all frames.

Counts are summed over the workers, and everything random follows from (seed, step, place of the frame in the batch of
all workers): so several workers are one teacher. On a GPU the host waits for counts only when bars are set anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from nightseg.cluster.session import Session, parts_of
from nightseg.data import table as frame
from nightseg.data.stored_labels import NUM_BINS
from nightseg.data.taxonomy import IGNORE, Taxonomy
from nightseg.segmenter.data import Batch, PoolBatch
from nightseg.segmenter.network import SemanticFPN, upsample_logits
from nightseg.segmenter.self_training import (
    NOTHING_KEPT,
    RARE_SHARE,
    class_thresholds,
    impossible,
    out_of_range,
    precise_thresholds,
    rules_of,
)
from nightseg.segmenter.settings import Masked, Teaching, Training

STEPS_BETWEEN_BARS: Final = 10  # setting them waits for the device; in as many first steps they are set every time
STEPS_BETWEEN_CHECKS: Final = 5  # of its precision on labelled frames
BOX_SHARES: Final = (0.1, 0.5)  # of the crop, that CutMix pastes
OUT_OF_RANGE: Final = {
    "ignore": "its pixels are not learned while it is so",
    "warn": "they are learned all the same (guard.act)",
    "stop": "the teacher teaches no more, the training goes on without the pool",
}


@dataclass(frozen=True)
class Pool:
    """Unlabelled frames, how a model teaches itself on them, and what is known to be wrong with that beforehand."""

    rows: pa.Table
    teaching: Teaching
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: pa.Table, teaching: Teaching, warnings: Sequence[str] = ()) -> Pool:
        """Labels that the rows may have are no business of it."""
        nothing = {frame.LABEL_URI: None, frame.LABEL_SHA256: None, frame.LABEL_ENCODING: None}
        bare = pa.Table.from_pylist([row | nothing for row in rows.to_pylist()], rows.schema)
        return cls(bare, teaching, tuple(warnings))


class Draws(NamedTuple):
    """Random numbers of the frames of the pool of one step, in [0, 1): the same are drawn whatever the settings."""

    classes_PK: Tensor
    box_P4: Tensor
    patches_Pyx: Tensor


class Teacher:
    """Labels the pool for the student; what it counted so far is its state. `network` is the student's EMA."""

    def __init__(
        self,
        network: SemanticFPN,
        teaching: Teaching,
        training: Training,
        seed: int,
        classes: Taxonomy,
        warnings: Sequence[str] = (),
    ) -> None:
        self.network = network
        self._known_warnings = list(warnings)
        self.online, self.threshold = teaching.online, teaching.threshold
        self.rules = rules_of(teaching.never_below, classes)
        self.classes = classes.classes
        self._training = training
        self._seed = seed
        self._device = network.normalise.scale.device
        mean = torch.tensor(network.body.mean, device=self._device)
        self._colour_311 = (255 * mean).round().to(torch.uint8).view(3, 1, 1)  # normalises to zero
        # float64: they are exact where nothing is forgotten, and sums over workers do not depend on their order.
        self._counts_KN = self._zeros(len(self.classes), NUM_BINS)  # running, older steps count less
        self._start_K = self._zeros(len(self.classes))  # of the first steps
        self._judged_2KN = self._zeros(2, *self._counts_KN.shape)  # right and all, on labelled frames under night light
        self._epoch_2K = self._zeros(2, len(self.classes))  # predicted and kept, since the epoch began
        self._bars_256 = torch.full((256,), NOTHING_KEPT, device=self._device)
        self.taught = 0
        self._is_stopped = False
        self._warned: dict[str, str] = {}  # class -> what was said of it

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def teaches(self, step: int) -> bool:
        return step >= self.online.warmup_steps and not self._is_stopped

    @torch.no_grad()
    def extend(
        self, batch: Batch, unlabelled: PoolBatch, step: int, session: Session, night: Sequence[int] = ()
    ) -> Batch:
        """The labelled batch, and beside it frames of the pool as the student shall learn them. `night`: places of
        the batch's frames under night light."""
        if self.threshold.precision is not None and self.taught % STEPS_BETWEEN_CHECKS == 0:
            self._judge(batch.images[list(night)], batch.labels[list(night)], session)
        labels_PHW, confidence_PHW = self.label(unlabelled.weak)
        seen_PHW = ~unlabelled.padding
        self._count(labels_PHW, confidence_PHW, seen_PHW, session)
        self._set_bars(step, session)
        is_kept_PHW = seen_PHW & (confidence_PHW >= self._bars_256[labels_PHW])
        kept_PHW = torch.where(is_kept_PHW, labels_PHW, IGNORE).to(torch.uint8)
        if self.rules:
            kept_PHW.masked_fill_(impossible(kept_PHW, self.rules), IGNORE)
        self._epoch_2K[1] += session.sum(_histogram(kept_PHW, 256))[: len(self.classes)]
        if self._is_stopped:
            return batch

        online, (height, width) = self.online, kept_PHW.shape[-2:]
        draws = self._draws(len(kept_PHW), height, width, step, session)
        learned = [
            Batch(batch.images, batch.labels, torch.ones(batch.labels.shape, device=self._device)),
            self._mixed(batch, Batch(unlabelled.strong, kept_PHW, self._weights(kept_PHW, online.weight)), draws),
        ]
        if online.masked is not None:
            images = self._masked(unlabelled.strong, draws.patches_Pyx, online.masked)
            learned.append(Batch(images, kept_PHW, self._weights(kept_PHW, online.weight * online.masked.weight)))
        # Of every part of the batch (accumulate) some are labelled, some are not.
        count = parts_of(session, self._training.accumulate)
        parts = [[part.tensor_split(count) for part in one if part is not None] for one in learned]
        return Batch(*(torch.cat([chunk for chunks in zip(*one, strict=True) for chunk in chunks])
                       for one in zip(*parts, strict=True)))  # fmt: skip

    def label(self, images_P3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Classes int64 PHW and their probabilities float32 PHW, means over the views that the recipe asks for."""
        online, (height, width) = self.online, images_P3HW.shape[-2:]
        images = self.network.normalise(images_P3HW)
        dtype = torch.bfloat16 if (online.precision or self._training.precision) == "bfloat16" else torch.float32
        total: Tensor | None = None
        views = [(scale, flip) for scale in online.scales for flip in ((False, True) if online.flip else (False,))]
        for scale, flip in views:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            view = images.flip(-1) if flip else images
            if scale != 1:
                view = F.interpolate(view, size, mode="bilinear", align_corners=False)
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits_PKhw = self.network(view).contiguous()
            logits_PKHW = upsample_logits(logits_PKhw, *size)
            if scale != 1:
                logits_PKHW = F.interpolate(logits_PKHW, (height, width), mode="bilinear", align_corners=False)
            p_PKHW = logits_PKHW.softmax(dim=1)
            p_PKHW = p_PKHW.flip(-1) if flip else p_PKHW
            total = p_PKHW if total is None else total.add_(p_PKHW)
        assert total is not None
        confidence_PHW, labels_PHW = total.max(dim=1)
        return labels_PHW, confidence_PHW / len(views)

    # -- counts, bars, guard -----------------------------------------------------------------------------------------

    def _count(self, labels_PHW: Tensor, confidence_PHW: Tensor, seen_PHW: Tensor, session: Session) -> None:
        counts_KN = session.sum(self._confidences(labels_PHW, confidence_PHW, seen_PHW))
        self._counts_KN.mul_(1 - 1 / self.online.memory).add_(counts_KN)
        counts_K = counts_KN.sum(dim=1)
        if self.taught < self.online.guard.start_steps:
            self._start_K += counts_K
        self._epoch_2K[0] += counts_K
        self.taught += 1

    def _confidences(self, labels_PHW: Tensor, confidence_PHW: Tensor, counted_PHW: Tensor) -> Tensor:
        """Counted pixels by class and bin of confidence, KN."""
        size = self._counts_KN.numel()
        bins_PHW = (confidence_PHW * NUM_BINS).long().clamp_max_(NUM_BINS - 1)
        index_PHW = torch.where(counted_PHW, labels_PHW * NUM_BINS + bins_PHW, size)  # the others behind the last one
        return _histogram(index_PHW, size + 1)[:-1].view_as(self._counts_KN)

    def _judge(self, images_B3HW: Tensor, truth_BHW: Tensor, session: Session) -> None:
        """How often the teacher is right, by class and confidence, where it is known. Every worker must call it."""
        judged_2KN = torch.zeros_like(self._judged_2KN)
        if len(images_B3HW):
            labels_BHW, confidence_BHW = self.label(images_B3HW)
            for place, counted_BHW in enumerate((labels_BHW == truth_BHW, truth_BHW != IGNORE)):
                judged_2KN[place] = self._confidences(labels_BHW, confidence_BHW, counted_BHW)
        kept = (1 - 1 / self.online.memory) ** STEPS_BETWEEN_CHECKS
        self._judged_2KN.mul_(kept).add_(session.sum(judged_2KN))

    def _set_bars(self, step: int, session: Session) -> None:
        if self.taught > STEPS_BETWEEN_BARS and self.taught % STEPS_BETWEEN_BARS:
            return
        counts_KN, start_K = self._counts_KN.cpu().numpy(), self._start_K.cpu().numpy()
        bars_K = class_thresholds(self.threshold, counts_KN.round().astype(np.int64))
        if self.threshold.precision is not None:
            right_KN, all_KN = self._judged_2KN.cpu().numpy()
            bars_K = np.maximum(bars_K, precise_thresholds(right_KN, all_KN, self.threshold.precision))
        shares_K = counts_KN.sum(axis=1) / max(counts_KN.sum(), 1.0)
        bars_K[shares_K < RARE_SHARE] = NOTHING_KEPT
        guard = self.online.guard
        if self.taught > guard.start_steps:
            start_shares_K = start_K / max(start_K.sum(), 1.0)
            outside_K = out_of_range(shares_K, start_shares_K, guard.range)
            self._warn(outside_K, shares_K, start_shares_K, step, session)
            if guard.act == "ignore":
                bars_K[outside_K] = NOTHING_KEPT
            self._is_stopped = guard.act == "stop" and bool(outside_K.any())
        self._bars_256[: len(bars_K)] = torch.from_numpy(_as_float32(bars_K)).to(self._device)

    def _warn(
        self,
        outside_K: npt.NDArray[np.bool_],
        shares_K: npt.NDArray[np.float64],
        start_K: npt.NDArray[np.float64],
        step: int,
        session: Session,
    ) -> None:
        for name, is_outside, share, start in zip(self.classes, outside_K, shares_K, start_K, strict=True):
            if is_outside and name not in self._warned:
                self._warned[name] = (
                    f"step {step + 1}: the teacher sees {name} on {share:.2%} of the pool, {start:.2%} at the start; "
                    f"{OUT_OF_RANGE[self.online.guard.act]}"
                )
                session.say(self._warned[name])

    # -- what the student sees ---------------------------------------------------------------------------------------

    def _draws(self, count: int, height: int, width: int, step: int, session: Session) -> Draws:
        masked = self.online.masked
        grid = (1, 1) if masked is None else (-(-height // masked.patch), -(-width // masked.patch))
        drawn = []
        for place in range(session.rank, count * session.world_size, session.world_size):
            rng = np.random.default_rng((self._seed, step, place))
            drawn.append((rng.random(len(self.classes)), rng.random(4), rng.random(grid)))
        arrays = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
        return Draws(*(array.to(self._device, torch.float32, non_blocking=True) for array in arrays))

    def _mixed(self, batch: Batch, pool: Batch, draws: Draws) -> Batch:
        """Frames of the pool with a part of a labelled frame and its label pasted on them: place i on place i."""
        partners = torch.arange(len(pool.labels), device=self._device) % len(batch.labels)
        labels_PHW = batch.labels[partners]
        match self.online.mix:
            case "classmix":
                pasted_PHW = half_of_the_classes(labels_PHW, draws.classes_PK)
            case "cutmix":
                pasted_PHW = boxes(draws.box_P4, *labels_PHW.shape[-2:])
            case "none":
                return pool
        images = torch.where(pasted_PHW[:, None], batch.images[partners], pool.images)
        return Batch(images, torch.where(pasted_PHW, labels_PHW, pool.labels), pool.weights)

    def _masked(self, images_P3HW: Tensor, patches_Pyx: Tensor, masked: Masked) -> Tensor:
        is_out_Pyx = (
            (patches_Pyx < masked.ratio).repeat_interleave(masked.patch, -2).repeat_interleave(masked.patch, -1)
        )
        height, width = images_P3HW.shape[-2:]
        return torch.where(is_out_Pyx[:, None, :height, :width], self._colour_311, images_P3HW)

    def _weights(self, labels_PHW: Tensor, weight: float) -> Tensor:
        return torch.full(labels_PHW.shape, weight, device=self._device)

    # -- what is told of it, and its state ---------------------------------------------------------------------------

    def points(self) -> dict[str, float]:
        """Curves: share of the pool and bar of each class, over the steps that count. Waits for the device."""
        counts_K = self._counts_KN.sum(dim=1)
        shares = (counts_K / counts_K.sum().clamp_min(1)).tolist()
        named = zip(self.classes, shares, self._bars_256.tolist(), strict=False)
        return {tag: value for name, share, bar in named for tag, value in
                ((f"pool_share/{name}", share), (f"pool_threshold/{name}", bar))}  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        return [*self._known_warnings, *self._warned.values()]

    def record(self) -> dict[str, Any] | None:
        """What is told of an epoch that has ended, and the next one begins; None if the teacher did not teach in it.

        `shares`: of the pool's pixels, as the teacher saw them; `kept`: of each class's pixels; `thresholds`: null for
        a class that is not learned now.
        """
        (predicted, kept), bars = self._epoch_2K.tolist(), self._bars_256.tolist()
        self._epoch_2K.zero_()
        total = sum(predicted)
        if not total:
            return None
        rows = list(zip(self.classes, predicted, kept, bars, strict=False))
        return {
            "shares": {name: count / total for name, count, _, _ in rows},
            "kept_share": sum(kept) / total,
            "kept": {name: learned / count if count else None for name, count, learned, _ in rows},
            "thresholds": {name: bar if bar <= 1 else None for name, _, _, bar in rows},
            "warnings": self.warnings,
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "counts": self._counts_KN,
            "start": self._start_K,
            "judged": self._judged_2KN,
            "epoch": self._epoch_2K,
            "bars": self._bars_256,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the network, which is the learner's."""
        return {name: tensor.cpu().clone() for name, tensor in self._tensors().items()} | {
            "taught": self.taught, "is_stopped": self._is_stopped, "warned": dict(self._warned)
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self.taught, self._is_stopped = int(state["taught"]), bool(state["is_stopped"])
        self._warned = dict(state["warned"])


# -- the rules as functions ------------------------------------------------------------------------------------------


def half_of_the_classes(labels_PHW: Tensor, draws_PK: Tensor) -> Tensor:
    """bool PHW: the pixels of half of the classes that a label has, one more of an odd number (arXiv 2007.07936):
    those with the smallest draws. Never those without a class. No wait for the device."""
    num_classes = draws_PK.shape[1]
    ids_PN = labels_PHW.flatten(1).long()
    has_P256 = torch.zeros(len(labels_PHW), 256, dtype=torch.bool, device=labels_PHW.device)
    has_PK = has_P256.scatter_(1, ids_PN, torch.ones_like(ids_PN, dtype=torch.bool))[:, :num_classes]
    place_PK = torch.where(has_PK, draws_PK, 2.0).argsort(dim=1).argsort(dim=1)
    chosen_P256 = torch.zeros_like(has_P256)
    chosen_P256[:, :num_classes] = has_PK & (place_PK < (has_PK.sum(dim=1, keepdim=True) + 1) // 2)
    return chosen_P256.gather(1, ids_PN).view_as(labels_PHW)


def boxes(draws_P4: Tensor, height: int, width: int) -> Tensor:
    """bool PHW: a box in each frame (CutMix, arXiv 1905.04899) of a drawn share of its pixels, form and place."""
    size, form, top, left = draws_P4.T[:, :, None, None]
    least, most = BOX_SHARES
    share = least + (most - least) * size
    high = share ** (0.25 + 0.5 * form)  # times share ** (0.75 - 0.5 form): between flat and upright, at most 1 each
    high, wide = (height * high).round(), (width * share / high).round()
    rows = torch.arange(height, device=draws_P4.device)[None, :, None] - (top * (height - high + 1)).floor()
    columns = torch.arange(width, device=draws_P4.device)[None, None, :] - (left * (width - wide + 1)).floor()
    inside: Tensor = (rows >= 0) & (rows < high) & (columns >= 0) & (columns < wide)
    return inside


def _histogram(index: Tensor, length: int) -> Tensor:
    """float64: how often each number below `length` is there. torch.bincount waits for a GPU."""
    flat = index.flatten().long()
    counts = torch.zeros(length, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).double()


def _as_float32(bars: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The smallest float32 that is no smaller: a float32 confidence passes it if and only if it passes the float64."""
    rounded = bars.astype(np.float32)
    return np.where(rounded < bars, np.nextafter(rounded, np.float32(np.inf)), rounded)
