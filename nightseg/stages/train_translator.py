"""Train UNIT between day and night frames: two unlabelled frame tables in, one model folder for both directions out.

Letters in tensor names: B batch, 3 RGB, H, W crop size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import Session, fit
from nightseg.data import table as frame
from nightseg.data.images import encode_png
from nightseg.networks.model_folder import save_model
from nightseg.progress import Progress
from nightseg.storage import Attempt, Commit, Location, UserError
from nightseg.storage.events import Curves
from nightseg.unit.collapse import ailing, collapsed, not_finite
from nightseg.unit.data import FrameReader, FrameRef, UnpairedCrops
from nightseg.unit.loss import TERMS, TermMeans, TermWeights, adversarial_loss, latent_noise, loss_of_a_coin
from nightseg.unit.network import (
    DISCRIMINATORS,
    KIND,
    STRIDE,
    Generators,
    build_generators,
    check_tile,
    smallest_discriminated_side,
    to_unit_range,
)
from nightseg.unit.perceptual import PerceptualFeatures, build_perceptual, smallest_perceived
from nightseg.unit.sample_sheet import sample_sheet
from nightseg.unit.settings import Translator
from nightseg.unit.step import (
    Networks,
    average,
    build_networks,
    compiled,
    discriminator_step,
    generator_step,
    set_learning_rate,
    stepped_rate,
)

VERSION = 3

HISTORY_ROWS: Final = 200  # of a short training; a long one has a row every ITERATIONS_BETWEEN_LOOKS
ITERATIONS_BETWEEN_LOOKS: Final = 100  # reading the losses waits for the device, so it is done this seldom


@dataclass(frozen=True)
class Plan:
    """Everything the training loop needs, on every worker."""

    day: tuple[FrameRef, ...]
    night: tuple[FrameRef, ...]
    settings: Translator
    seed: int
    threads: int  # that decode frames
    journal: Location | None = None  # where the training is to be looked at while it goes on

    @property
    def iterations_between_looks(self) -> int:
        return max(1, min(ITERATIONS_BETWEEN_LOOKS, self.settings.iterations // HISTORY_ROWS))

    def reader(self, frames: tuple[FrameRef, ...]) -> FrameReader:
        return FrameReader(frames, short_side=self.settings.short_side, crop=self.settings.crop)

    def sample_sheet(self, generators: Generators) -> bytes:
        """PNG."""
        return encode_png(sample_sheet(generators, self.reader(self.day), self.reader(self.night)))


def train_translator(
    settings: Translator,
    day: pa.Table,
    night: pa.Table,
    *,
    seed: int,
    attempt: Attempt,
    compute: TrainCompute,
    progress: Progress,
) -> Commit:
    """Commit `model/` (both directions), `history.json` (mean loss terms) and `samples.png`.

    `tensorboard/` beside them has the loss terms and a sample sheet of each checkpoint; it is no part of the result.
    `day` and `night` are frame tables with absolute uris. The sample sheet has the columns day, night made from it,
    night, day made from it. With `samples_every` there is one under `samples/` every so many iterations, written while
    the training goes on. Raises UserError: settings that cannot train, a frame that has gone bad since it was
    collected, perceptual weights that cannot be had, a training that has diverged or whose discriminator collapsed.
    """
    begun = time.monotonic()
    name = str(attempt.identity["name"])
    _check(name, settings, day, night, compute)
    if settings.weights.perceptual > 0:
        _features(settings, torch.device("cpu"))  # fails here, not on the cluster
    if settings.start is not None:
        _networks(settings, seed, torch.device("cpu"))
    threads = max(1, min(8, int(compute.cpus_per_worker) - 1))
    plan = Plan(_refs(day), _refs(night), settings, seed, threads, attempt.folder)
    _say_what_is_odd(name, plan, progress)
    result = fit(
        learn,
        {"plan": plan},
        folder=attempt.folder / "trainer",
        name=name,
        compute=compute,
        progress=progress,
        title=f"train {name}",
        total=settings.iterations,
        unit="iterations",
    )
    state = result.load()
    judges = {f"{DISCRIMINATORS}{part}": tensor for part, tensor in state["discriminators"].items()}
    save_model(attempt.folder / "model", state["averaged"] | judges, _card(settings, attempt))
    (attempt.folder / "history.json").write_json(state["history"])
    generators = build_generators(settings.width, settings.res_blocks, state["averaged"], settings.shared_blocks)
    (attempt.folder / "samples.png").write_bytes(plan.sample_sheet(generators))
    num_frames = day.num_rows + night.num_rows
    last = state["history"][-1]
    commit = attempt.finish(
        rows_in=num_frames,
        rows_out=num_frames,
        outputs=[
            *("model/model.safetensors", "model/model.json", "history.json", "samples.png"),
            *(["samples"] if settings.samples_every else []),
        ],
        summary={"day": day.num_rows, "night": night.num_rows, **{term: last[term] for term in ("iteration", *TERMS)}},
        seconds=time.monotonic() - begun,
    )
    (attempt.folder / "trainer").delete()
    return commit


# -- before: what is refused ------------------------------------------------------------------------------------------


def _check(name: str, settings: Translator, day: pa.Table, night: pa.Table, compute: TrainCompute) -> None:
    where = f"translator {name}"
    for domain, table in (("day", day), ("night", night)):
        if table.num_rows == 0:
            raise UserError(
                f"{where}: its {domain} dataset {getattr(settings, domain)} holds no frame; look at the counts and the "
                "quarantine table of that dataset"
            )
    if settings.batch % compute.workers:
        raise UserError(
            f"{where}: batch {settings.batch} cannot be shared evenly by {compute.workers} workers "
            f"(compute.train.workers); choose a batch that is a multiple of {compute.workers}"
        )
    if any(side % STRIDE for side in settings.crop):
        raise UserError(f"{where}: crop {tuple(settings.crop)} must be multiples of {STRIDE} in height and width")
    smallest = smallest_discriminated_side(settings.discriminator_scales)
    if min(settings.crop) < smallest:
        raise UserError(
            f"{where}: crop {tuple(settings.crop)} is too small for a discriminator with "
            f"{settings.discriminator_scales} scales, which needs {smallest} pixels a side; enlarge crop or set a "
            "smaller discriminator_scales"
        )
    smallest = smallest_perceived(settings.perceptual_network, settings.perceptual_layers)
    if settings.weights.perceptual > 0 and min(settings.crop) < smallest:
        raise UserError(
            f"{where}: crop {tuple(settings.crop)} is too small for the perceptual loss, which needs {smallest} pixels "
            "a side; enlarge crop or set weights.perceptual to 0"
        )
    if settings.tile is not None:
        check_tile(settings.tile, settings.res_blocks)


def _say_what_is_odd(name: str, plan: Plan, progress: Progress) -> None:
    """What can be trained on and may not be meant."""
    for domain, frames in (("day", plan.day), ("night", plan.night)):
        reader = plan.reader(frames)
        small = [frame_ref for frame_ref in frames if reader.is_too_small(frame_ref.height, frame_ref.width)]
        if small:
            progress.say(
                f"translator {name}: {len(small)} of {len(frames)} {domain} frames are smaller than the crop "
                f"{tuple(plan.settings.crop)} and are enlarged until it fits (first {small[0].frame_id}, "
                f"{small[0].height} x {small[0].width})"
            )
        if len(frames) == 1:
            progress.say(f"translator {name}: there is only one {domain} frame, so its look is all there is to learn")


def _refs(table: pa.Table) -> tuple[FrameRef, ...]:
    columns = (table[column].to_pylist() for column in (frame.FRAME_ID, frame.URI, frame.HEIGHT, frame.WIDTH))
    return tuple(FrameRef(*values) for values in zip(*columns, strict=True))


def _card(settings: Translator, attempt: Attempt) -> dict[str, Any]:
    network = {name: getattr(settings, name) for name in ("width", "res_blocks", "shared_blocks")}
    training = settings.model_dump(mode="json", exclude={*network, "perceptual_weights", "tile"})
    card = {"kind": KIND, **network, "directions": ["night", "day"]}
    parents = [settings.start] if settings.start else []
    return {**card, "training": training, "parents": parents, "key": attempt.key, "seed": attempt.seed}


# -- the training itself: runs on every worker ------------------------------------------------------------------------


def learn(session: Session, settings: dict[str, Any]) -> None:
    """The training loop of one worker. A worker or a run that died continues after its last checkpoint.

    Order, crops, mirroring and noise are functions of (seed, iteration), so on a CPU a resumed training ends with the
    same bits as an undisturbed one. The discriminators judge the very images that the generators then improve: UNIT
    draws new noise in between and pays for a second pass of every encoder and decoder.
    """
    plan: Plan = settings["plan"]
    recipe, device = plan.settings, session.device
    networks = _networks(recipe, plan.seed, device)
    history, means, start = _restore(session, networks)
    if start >= recipe.iterations:
        return
    weights, adversarial = TermWeights(**recipe.weights.model_dump()), adversarial_loss(recipe.adversarial_loss)
    features, precision, journal = _features(recipe, device), _precision(recipe, device), Journal(session, plan, start)
    latent_Chw = (4 * recipe.width, recipe.crop[0] // STRIDE, recipe.crop[1] // STRIDE)
    judges = compiled(networks.discriminators, recipe.compile)
    generators = session.wrap(compiled(networks.generators, recipe.compile))
    discriminators = session.wrap(judges)
    crops = UnpairedCrops(
        plan.reader(plan.day),
        plan.reader(plan.night),
        seed=plan.seed,
        batch=recipe.batch,
        rank=session.rank,
        world_size=session.world_size,
    )
    ahead = 0 if crops.keep_in_memory(plan.threads) else plan.threads
    kept = start

    for iteration, batch in enumerate(crops.batches(start, recipe.iterations, ahead), start):
        set_learning_rate(networks, stepped_rate(recipe.learning_rate, iteration, recipe.step_every))
        day_B3HW, night_B3HW = (_to_device(crop, device) for crop in batch)
        noise = latent_noise(plan.seed, iteration, crops.slots, latent_Chw, device)
        with precision:
            translation = generators(day_B3HW, night_B3HW, noise, weights.needs_cycle)
        game = (day_B3HW, night_B3HW, translation, weights, adversarial, precision)
        judged = discriminator_step(networks, discriminators, *game)
        made = generator_step(networks, judges, features, *game)
        average(networks, min(recipe.ema_decay, (1 + iteration) / (10 + iteration)))

        done = iteration + 1
        means.add(judged, made)
        if done % plan.iterations_between_looks == 0 or done == recipe.iterations:
            history.append({"iteration": done, **means.close(session.sum, session.world_size)})
            _check_health(history, kept, recipe)
            journal.terms(history[-1])
        if recipe.samples_every is not None and (done % recipe.samples_every == 0 or done == recipe.iterations):
            journal.samples(done, networks.averaged, history)
        is_good = not _is_ailing(history, recipe)  # what is kept is what a training can go on from
        if done == recipe.iterations or (done % recipe.checkpoint_every == 0 and is_good):
            journal.look(done, networks.averaged)
            _report(session, networks, history, means, done, kept, recipe)
            kept = done


class Journal:
    """What can be looked at while the training goes on; rank 0 writes it, and the same again after a restart."""

    def __init__(self, session: Session, plan: Plan, start: int) -> None:
        self.session = session
        self.plan = plan
        self.folder = plan.journal if session.rank == 0 else None
        self.curves = None if self.folder is None else Curves(self.folder / "tensorboard", start)

    def terms(self, row: dict[str, float]) -> None:
        """Every row of the history as it is made: mean loss terms (TERMS) since the row before, and `iteration`."""
        done = int(row["iteration"])
        self.session.progress(done, generator=row["total"], discriminator=row["discriminator_total"])
        if self.curves is not None:
            self.curves.scalars(done, {f"loss/{name}": row[name] for name in row.keys() - {"iteration"}})
            self.curves.flush_if_due()

    def look(self, done: int, generators: Generators) -> None:
        """Both directions, for TensorBoard; written before the checkpoint, so that a restart finds no gap."""
        if self.curves is not None:
            sheet = sample_sheet(generators, self.plan.reader(self.plan.day), self.plan.reader(self.plan.night))
            self.curves.picture(done, "samples/day_night_night_day", encode_png(sheet), *sheet.shape[:2])
            self.curves.flush()

    def samples(self, done: int, generators: Generators, history: list[dict[str, float]]) -> None:
        """`samples/<iteration>.png`, and the loss terms so far as `history.json`."""
        if self.folder is not None:
            (self.folder / "samples" / f"{done:07d}.png").write_bytes(self.plan.sample_sheet(generators))
            (self.folder / "history.json").write_json(history)


def _networks(recipe: Translator, seed: int, device: torch.device) -> Networks:
    return build_networks(
        width=recipe.width,
        res_blocks=recipe.res_blocks,
        shared_blocks=recipe.shared_blocks,
        discriminator_width=recipe.discriminator_width,
        discriminator_scales=recipe.discriminator_scales,
        discriminator_norm=recipe.discriminator_norm,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        start=recipe.start,
        seed=seed,
        device=device,
    )


def _features(recipe: Translator, device: torch.device) -> PerceptualFeatures | None:
    if recipe.weights.perceptual == 0:
        return None
    features = build_perceptual(
        recipe.perceptual_network,
        recipe.perceptual_weights,
        sha256=recipe.perceptual_sha256,
        layers=recipe.perceptual_layers,
    )
    return features.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _precision(recipe: Translator, device: torch.device) -> torch.autocast:
    is_low = recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=is_low)


def _to_device(crops_B3HW: Tensor, device: torch.device) -> Tensor:
    """uint8 crops as float32 in [-1, 1] on the device, channels last."""
    if device.type == "cuda":
        crops_B3HW = crops_B3HW.pin_memory().to(device, non_blocking=True)
    return to_unit_range(crops_B3HW)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _report(
    session: Session,
    networks: Networks,
    history: list[dict[str, float]],
    means: TermMeans,
    done: int,
    kept: int,
    recipe: Translator,
) -> None:
    """One checkpoint. Weights that are not finite never become one, so the last checkpoint is always a good one."""
    broken = networks.first_not_finite()
    if broken is not None:
        raise UserError(_gone_wrong(f"it has diverged: the weight {broken} is not finite", done, kept, recipe))
    progress = {"iteration": done, "history": history, "sums": means.sums, "count": means.count}
    state = networks.state() | progress
    latest = {name: value for name, value in history[-1].items()} if history else {"iteration": done}
    session.report(latest, state if session.rank == 0 else None)


def _restore(session: Session, networks: Networks) -> tuple[list[dict[str, float]], TermMeans, int]:
    """History, open means and number of finished iterations; the networks and optimisers are set."""
    state = session.restore()
    if state is None:
        return [], TermMeans(session.device), 0
    networks.load(state)
    means = TermMeans(session.device, state["sums"], int(state["count"]))
    return list(state["history"]), means, int(state["iteration"])


def _check_health(history: list[dict[str, float]], kept: int, recipe: Translator) -> None:
    """UserError when the training has gone wrong; nothing of this iteration has become a checkpoint yet."""
    done, broken = int(history[-1]["iteration"]), not_finite(history[-1])
    if broken:
        what = f"it has diverged: the loss terms {', '.join(broken)} are not finite"
        raise UserError(_gone_wrong(what, done, kept, recipe))
    if recipe.collapse_after is not None:
        ailment = collapsed(history, lasting=recipe.collapse_after, coin=_coin(recipe))
        if ailment is not None:
            more = " To train on all the same, set collapse_after: null."
            raise UserError(_gone_wrong(ailment, done, kept, recipe) + more)


def _is_ailing(history: list[dict[str, float]], recipe: Translator) -> bool:
    """Whether a discriminator teaches nothing right now. At the start none does, and that counts for nothing."""
    lasting = recipe.collapse_after
    if lasting is None or not history or history[-1]["iteration"] < lasting:
        return False
    return ailing(history[-1], _coin(recipe)) is not None


def _coin(recipe: Translator) -> float:
    return loss_of_a_coin(recipe.adversarial_loss) * recipe.discriminator_scales


def _gone_wrong(what: str, done: int, kept: int, recipe: Translator) -> str:
    checkpoint = f"The last good checkpoint (iteration {kept}) is kept" if kept else "There was no checkpoint yet"
    return (
        f"the training of the translator stopped at iteration {done}: {what}. {checkpoint}. Lower learning_rate (now "
        f"{recipe.learning_rate:g}) or weights.adversarial and run again."
    )
