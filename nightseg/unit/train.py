"""Training of UNIT: the loop of one worker, what is logged of it, its checkpoints, and when it has gone wrong.

Letters in tensor names: B batch, 3 RGB, H, W crop size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nightseg.cluster.session import Session, parts_of
from nightseg.data.images import encode_png
from nightseg.networks.ema import update_ema, warmed_up_decay
from nightseg.storage import Location, UserError
from nightseg.storage.events import Curves
from nightseg.unit.data import FrameReader, FrameRef, UnpairedCrops
from nightseg.unit.loss import (
    Networks,
    TermMeans,
    build_networks,
    chance_loss,
    latent_noise,
    parts_of_batch,
    set_learning_rate,
    step_in_parts,
    stepped_rate,
)
from nightseg.unit.network import STRIDE, Generators, to_uint8, to_unit_range
from nightseg.unit.perceptual import PerceptualFeatures, build_perceptual
from nightseg.unit.settings import Translator

HISTORY_ROWS: Final = 200  # of a short training; a long one has a row every MOST_ITERATIONS_A_ROW
MOST_ITERATIONS_A_ROW: Final = 100  # reading the losses waits for the device, so it is done this seldom

SATURATED_SHARE: Final = 1e-3  # of the loss at chance level
CONSTANT_GAP: Final = 1e-4  # between scores that aim at 0 and 1

SAMPLE_ROWS: Final = 4
SAMPLE_SIZE: Final = (256, 512)  # (height, width) of the largest tile of the sample sheet
SAMPLE_GAP: Final = 2

Row = Mapping[str, float]  # "iteration", and the mean of every loss term since the row before


@dataclass(frozen=True)
class Plan:
    """Everything the training loop needs, on every worker."""

    day: tuple[FrameRef, ...]
    night: tuple[FrameRef, ...]
    settings: Translator
    seed: int
    threads: int  # that decode frames
    log: Location | None = None  # folder of curves and samples while it trains

    @property
    def iterations_a_row(self) -> int:
        """Of the history."""
        return max(1, min(MOST_ITERATIONS_A_ROW, self.settings.iterations // HISTORY_ROWS))

    def reader(self, frames: tuple[FrameRef, ...]) -> FrameReader:
        return FrameReader(frames, short_side=self.settings.short_side, crop=self.settings.crop)

    def sample_sheet(self, generators: Generators) -> NDArray[np.uint8]:
        return sample_sheet(generators, self.reader(self.day), self.reader(self.night))


def learn(session: Session, arguments: dict[str, Any]) -> None:
    """The training loop of one worker. A worker or a run that died continues after its last checkpoint.

    All randomness is a function of (seed, iteration): on a CPU a resumed training ends with the bits of an undisturbed
    one. The discriminators see the images that the generators then improve; UNIT makes new ones, at twice the cost.
    """
    plan: Plan = arguments["plan"]
    settings, device = plan.settings, session.device
    networks = build_networks(settings, plan.seed, device)
    history, means, start = _restore(session, networks)
    if start >= settings.iterations:
        return
    features, precision = perceptual_features(settings, device), _precision(settings, device)
    log = Log(session, plan, start)
    latent_Chw = (4 * settings.width, settings.crop[0] // STRIDE, settings.crop[1] // STRIDE)
    bare_discriminators = compiled(networks.discriminators, settings.compile)
    generators = session.wrap(compiled(networks.generators, settings.compile))
    discriminators = session.wrap(bare_discriminators)
    crops = UnpairedCrops(
        plan.reader(plan.day),
        plan.reader(plan.night),
        seed=plan.seed,
        batch=settings.batch,
        rank=session.rank,
        world_size=session.world_size,
    )
    threads = 0 if crops.keep_in_memory(plan.threads) else plan.threads
    kept = start

    for iteration, batch in enumerate(crops.batches(start, settings.iterations, threads), start):
        set_learning_rate(networks, stepped_rate(settings.learning_rate, iteration, settings.step_every))
        day_B3HW, night_B3HW = (_to_device(crop, device) for crop in batch)
        noise = latent_noise(plan.seed, iteration, crops.slots, latent_Chw, device)
        parts = parts_of_batch(day_B3HW, night_B3HW, noise, parts_of(session, 1), session.world_size, settings.batch)
        sides = (networks, generators, discriminators, bare_discriminators)
        of_discriminators, of_generators = step_in_parts(*sides, features, parts, settings, precision)
        update_ema(networks.ema, networks.generators, warmed_up_decay(settings.ema_decay, iteration))

        done = iteration + 1
        means.add(of_discriminators, of_generators)
        if done % plan.iterations_a_row == 0 or done == settings.iterations:
            history.append({"iteration": done, **means.close(session.sum, session.world_size)})
            _check_health(history, kept, settings)
            log.terms(history[-1])
        if settings.samples_every is not None and (done % settings.samples_every == 0 or done == settings.iterations):
            log.samples(done, networks.ema, history)
        is_good = not _is_failing(history, settings)  # a checkpoint is what a training can go on from
        if done == settings.iterations or (done % settings.checkpoint_every == 0 and is_good):
            log.sheet(done, networks.ema)
            _report(session, networks, history, means, done, kept, settings)
            kept = done


def perceptual_features(settings: Translator, device: torch.device) -> PerceptualFeatures | None:
    """The frozen network of the perceptual loss, None where it has no weight. Raises UserError: no weights of it."""
    if settings.weights.perceptual == 0:
        return None
    features = build_perceptual(
        settings.perceptual_network,
        settings.perceptual_weights,
        sha256=settings.perceptual_sha256,
        layers=settings.perceptual_layers,
    )
    return features.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def compiled(module: nn.Module, wanted: bool) -> nn.Module:
    """The module, compiled when it is first used if that is wanted; its weights and their names stay the same."""
    return torch.compile(module) if wanted else module  # type: ignore[return-value]


def _precision(settings: Translator, device: torch.device) -> torch.autocast:
    is_low = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=is_low)


def _to_device(crops_B3HW: Tensor, device: torch.device) -> Tensor:
    """uint8 crops as float32 in [-1, 1] on the device, channels last."""
    if device.type == "cuda":
        crops_B3HW = crops_B3HW.pin_memory().to(device, non_blocking=True)
    return to_unit_range(crops_B3HW)


# -- what is logged ---------------------------------------------------------------------------------------------------


class Log:
    """Curves and samples of a training that goes on; rank 0 writes them, and the same again after a restart."""

    def __init__(self, session: Session, plan: Plan, start: int) -> None:
        self.session = session
        self.plan = plan
        self.folder = plan.log if session.rank == 0 else None
        self.curves = Curves(self.folder and self.folder / "tensorboard", start)

    def terms(self, row: dict[str, float]) -> None:
        """Every row of the history as it is made: mean loss terms (TERMS) since the row before, and `iteration`."""
        done = int(row["iteration"])
        self.session.progress(done, generator=row["total"], discriminator=row["discriminator_total"])
        self.curves.scalars(done, {f"loss/{name}": row[name] for name in row.keys() - {"iteration"}})
        self.curves.flush_if_due()

    def sheet(self, done: int, generators: Generators) -> None:
        """Both directions, for TensorBoard; written before the checkpoint, so that a restart finds no gap."""
        if self.folder is not None:
            sheet = self.plan.sample_sheet(generators)
            self.curves.picture(done, "samples/day_night_night_day", encode_png(sheet), *sheet.shape[:2])
            self.curves.flush()

    def samples(self, done: int, generators: Generators, history: list[dict[str, float]]) -> None:
        """`samples/<iteration>.png`, and the loss terms so far as `history.json`."""
        if self.folder is not None:
            (self.folder / "samples" / f"{done:07d}.png").write_bytes(encode_png(self.plan.sample_sheet(generators)))
            (self.folder / "history.json").write_json(history)


def sample_sheet(generators: Generators, day: FrameReader, night: FrameReader) -> NDArray[np.uint8]:
    """uint8 HWC RGB: rows of day, night made from it, night, day made from it; frames spread over both tables.

    The generators may be on any device and stay as they are.
    """
    device = next(generators.parameters()).device
    tiles = [_tiles(reader) for reader in (day, night)]
    height, width = (min(tile.shape[axis] for side in tiles for tile in side) for axis in (0, 1))
    columns = []
    for side, to in zip(tiles, ("night", "day"), strict=True):
        images_B3HW = torch.from_numpy(np.stack([_centre(tile, height, width) for tile in side])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            made = [generators.translate(to_unit_range(image[None].to(device)), to) for image in images_B3HW]  # type: ignore[arg-type]
        columns += [images_B3HW, to_uint8(torch.cat(made)).cpu()]
    rows = min(len(column) for column in columns)
    sheet = nn.functional.pad(torch.stack([column[:rows] for column in columns], 1), (0, SAMPLE_GAP, 0, SAMPLE_GAP))
    grid = sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + SAMPLE_GAP), 4 * (width + SAMPLE_GAP), 3)
    return np.ascontiguousarray(grid[:-SAMPLE_GAP, :-SAMPLE_GAP].numpy())


def _tiles(reader: FrameReader) -> list[NDArray[np.uint8]]:
    indices = np.unique(np.linspace(0, len(reader) - 1, SAMPLE_ROWS).round().astype(int))
    return [_centre(reader.read(int(index)), *SAMPLE_SIZE) for index in indices]


def _centre(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = max(0, (image.shape[0] - height) // 2), max(0, (image.shape[1] - width) // 2)
    return image[top : top + height, left : left + width]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _report(
    session: Session,
    networks: Networks,
    history: list[dict[str, float]],
    means: TermMeans,
    done: int,
    kept: int,
    settings: Translator,
) -> None:
    """One checkpoint. Weights that are not finite never become one, so the last checkpoint is always a good one."""
    broken = networks.first_not_finite()
    if broken is not None:
        raise _stopped(f"it has diverged: the weight {broken} is not finite", done, kept, settings)
    progress = {"iteration": done, "history": history, "sums": means.sums, "count": means.count}
    latest = dict(history[-1]) if history else {"iteration": done}
    session.report(latest, networks.state() | progress if session.rank == 0 else None)


def _restore(session: Session, networks: Networks) -> tuple[list[dict[str, float]], TermMeans, int]:
    """History, open means and number of finished iterations; the networks and optimisers are set."""
    state = session.restore()
    if state is None:
        return [], TermMeans(session.device), 0
    networks.load(state)
    means = TermMeans(session.device, state["sums"], int(state["count"]))
    return list(state["history"]), means, int(state["iteration"])


# -- trainings that have gone wrong -----------------------------------------------------------------------------------


def not_finite(row: Row) -> list[str]:
    """The terms of a row that are infinite or not a number."""
    return [name for name, value in row.items() if not math.isfinite(value)]


def failing(row: Row, chance: float) -> str | None:
    """Which discriminator teaches nothing in this row, and how; None if both do.

    Saturated: its loss is below a thousandth of that at chance level, so the generators get noise. Constant: it gives
    every patch of every image the same score. `chance`: the loss at chance level over all scales.
    """
    for domain in ("day", "night"):
        if row[f"discriminator_{domain}"] < SATURATED_SHARE * chance:
            loss = f"its loss is below {SATURATED_SHARE * chance:.2g}, a thousandth of that at chance level"
            return f"the {domain} discriminator is saturated: {loss}"
        if row[f"discriminator_gap_{domain}"] < CONSTANT_GAP:
            return f"the {domain} discriminator is constant: it gives every patch the same score, to {CONSTANT_GAP:g}"
    return None


def collapsed(history: Sequence[Row], *, lasting: int, chance: float) -> str | None:
    """The fault of all rows of the last `lasting` iterations, if they all have the same; not before as many.

    Either fault may pass, so it must last.
    """
    if not history or history[-1]["iteration"] < lasting:
        return None
    begin = history[-1]["iteration"] - lasting
    faults = {failing(row, chance) for row in history if row["iteration"] > begin}
    if len(faults) > 1:
        return None
    (fault,) = faults
    return None if fault is None else f"{fault}, in all of the last {lasting} iterations"


def _check_health(history: list[dict[str, float]], kept: int, settings: Translator) -> None:
    """UserError when the training has gone wrong; nothing of this iteration has become a checkpoint yet."""
    done, broken = int(history[-1]["iteration"]), not_finite(history[-1])
    if broken:
        what = f"it has diverged: the loss terms {', '.join(broken)} are not finite"
        raise _stopped(what, done, kept, settings)
    if settings.collapse_after is not None:
        fault = collapsed(history, lasting=settings.collapse_after, chance=_chance(settings))
        if fault is not None:
            raise _stopped(fault, done, kept, settings, "; to train on all the same, set collapse_after: null")


def _is_failing(history: list[dict[str, float]], settings: Translator) -> bool:
    """Whether a discriminator teaches nothing right now. At the start none does, and that counts for nothing."""
    lasting = settings.collapse_after
    if lasting is None or not history or history[-1]["iteration"] < lasting:
        return False
    return failing(history[-1], _chance(settings)) is not None


def _chance(settings: Translator) -> float:
    return chance_loss(settings.adversarial_loss) * settings.discriminator_scales


def _stopped(what: str, done: int, kept: int, settings: Translator, more: str = "") -> UserError:
    checkpoint = f"the last good checkpoint (iteration {kept}) is kept" if kept else "there was no checkpoint yet"
    return UserError(
        f"the training of the translator stopped at iteration {done}: {what}; {checkpoint}",
        cure=f"lower learning_rate (now {settings.learning_rate:g}) or weights.adversarial and run again{more}",
    )
