"""Train UNIT between day and night frames: two unlabelled frame tables in, one model folder for both directions out.

Letters in tensor names: B batch, 3 RGB, H, W crop size.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nightseg.compute.training import Session, Workers, fit
from nightseg.config import TrainCompute, Translator
from nightseg.frames import table as frame
from nightseg.frames.images import encode_png
from nightseg.learning.sample_sheet import sample_sheet
from nightseg.learning.translation import (
    DiscriminatorLosses,
    GeneratorLosses,
    TermWeights,
    discriminator_loss,
    generator_loss,
    latent_noise,
)
from nightseg.learning.unpaired import FrameReader, FrameRef, Stream, UnpairedCrops, mix_seed
from nightseg.networks.checkpoint import save_model
from nightseg.networks.perceptual import SMALLEST_PERCEIVED, PerceptualFeatures, build_perceptual
from nightseg.networks.unit import (
    KIND,
    STRIDE,
    Discriminators,
    Generators,
    build_generators,
    smallest_discriminated_side,
    to_unit_range,
)
from nightseg.progress import Progress
from nightseg.storage import Location, UserError
from nightseg.storage.events import Curves
from nightseg.workspace import Attempt, Commit

VERSION = 2

ADAM_BETAS: Final = (0.5, 0.999)
LEARNING_RATE_FACTOR: Final = 0.5
HISTORY_ROWS: Final = 200  # of a short training; a long one has a row every ITERATIONS_BETWEEN_LOOKS
ITERATIONS_BETWEEN_LOOKS: Final = 100  # reading the losses waits for the device, so it is done this seldom
TERMS: Final = tuple(f"discriminator_{name}" for name in DiscriminatorLosses._fields) + GeneratorLosses._fields


@dataclass(frozen=True)
class Plan:
    """Everything the training loop needs, on every worker."""

    day: tuple[FrameRef, ...]
    night: tuple[FrameRef, ...]
    settings: Translator
    seed: int
    threads: int  # that decode frames
    curves: Location | None = None  # where TensorBoard finds them

    @property
    def iterations_between_looks(self) -> int:
        return max(1, min(ITERATIONS_BETWEEN_LOOKS, self.settings.iterations // HISTORY_ROWS))

    def reader(self, frames: tuple[FrameRef, ...]) -> FrameReader:
        return FrameReader(frames, short_side=self.settings.short_side, crop=self.settings.crop)


class Networks(NamedTuple):
    """What is trained, and the two optimisers that do it."""

    generators: Generators
    discriminators: Discriminators
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    averaged: Generators  # running mean of the generators: what the model becomes


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
    night, day made from it. Raises UserError: settings that cannot train, a frame that has gone bad since it was
    collected, perceptual weights that cannot be had, a training that has diverged.
    """
    begun = time.monotonic()
    name = str(attempt.identity["name"])
    _check(name, settings, day, night, compute)
    if settings.weights.perceptual > 0:
        build_perceptual(settings.perceptual_network, settings.perceptual_weights)  # fails here, not on the cluster
    threads = max(1, min(8, int(compute.cpus_per_worker) - 1))
    plan = Plan(_refs(day), _refs(night), settings, seed, threads, attempt.folder / "tensorboard")
    result = fit(
        learn,
        {"plan": plan},
        folder=attempt.folder / "trainer",
        name=name,
        workers=Workers(compute.workers, compute.cpus_per_worker, compute.gpus_per_worker, compute.max_failures),
        progress=progress,
        title=f"train {name}",
        total=settings.iterations,
        unit="iterations",
    )
    state = result.load()
    save_model(attempt.folder / "model", state["averaged"], _card(settings, attempt))
    (attempt.folder / "history.json").write_json(state["history"])
    generators = build_generators(settings.width, settings.res_blocks, state["averaged"])
    sheet = sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night))
    (attempt.folder / "samples.png").write_bytes(encode_png(sheet))
    num_frames = day.num_rows + night.num_rows
    last = state["history"][-1]
    commit = attempt.finish(
        rows_in=num_frames,
        rows_out=num_frames,
        outputs=["model/model.safetensors", "model/model.json", "history.json", "samples.png"],
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
    if settings.weights.perceptual > 0 and min(settings.crop) < SMALLEST_PERCEIVED:
        raise UserError(
            f"{where}: crop {tuple(settings.crop)} is too small for the perceptual loss, which needs "
            f"{SMALLEST_PERCEIVED} pixels a side; enlarge crop or set weights.perceptual to 0"
        )


def _refs(table: pa.Table) -> tuple[FrameRef, ...]:
    columns = (table[column].to_pylist() for column in (frame.FRAME_ID, frame.URI, frame.HEIGHT, frame.WIDTH))
    return tuple(FrameRef(*values) for values in zip(*columns, strict=True))


def _card(settings: Translator, attempt: Attempt) -> dict[str, Any]:
    training = settings.model_dump(mode="json", exclude={"width", "res_blocks", "perceptual_weights"})
    card = {"kind": KIND, "width": settings.width, "res_blocks": settings.res_blocks, "directions": ["night", "day"]}
    return {**card, "training": training, "parents": [], "key": attempt.key, "seed": attempt.seed}


# -- the training itself: runs on every worker ------------------------------------------------------------------------


def learn(session: Session, settings: dict[str, Any]) -> None:
    """The training loop of one worker. A worker or a run that died continues after its last checkpoint.

    Order, crops, mirroring and noise are functions of (seed, iteration), so on a CPU a resumed training ends with the
    same bits as an undisturbed one. The discriminators judge the very images that the generators then improve: UNIT
    draws new noise in between and pays for a second pass of every encoder and decoder.
    """
    plan: Plan = settings["plan"]
    recipe, device = plan.settings, session.device
    networks = build_networks(recipe, plan.seed, device)
    history, window, start = _restore(session, networks)
    if start >= recipe.iterations:
        return
    curves = _curves(plan, session, start)
    weights = TermWeights(**recipe.weights.model_dump())
    features = _features(recipe, device)
    crops = UnpairedCrops(
        plan.reader(plan.day),
        plan.reader(plan.night),
        seed=plan.seed,
        batch=recipe.batch,
        rank=session.rank,
        world_size=session.world_size,
    )
    ahead = 0 if crops.keep_in_memory(plan.threads) else plan.threads
    latent_Chw = (4 * recipe.width, recipe.crop[0] // STRIDE, recipe.crop[1] // STRIDE)
    generators, discriminators = session.wrap(networks.generators), session.wrap(networks.discriminators)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for iteration, batch in enumerate(crops.batches(start, recipe.iterations, ahead), start):
        _set_learning_rate(networks, recipe.learning_rate * LEARNING_RATE_FACTOR ** (iteration // recipe.step_every))
        day_B3HW, night_B3HW = (_to_device(crop, device) for crop in batch)
        noise = latent_noise(plan.seed, iteration, crops.slots, latent_Chw, device)
        with autocast:
            translation = generators(day_B3HW, night_B3HW, noise, weights.needs_cycle)
            judged = discriminator_loss(discriminators, day_B3HW, night_B3HW, translation)
        networks.discriminator_optimizer.zero_grad(set_to_none=True)
        judged.total.backward()  # type: ignore[no-untyped-call]
        networks.discriminator_optimizer.step()

        networks.discriminators.requires_grad_(False)  # its gradients are not wanted in the generators' step
        with autocast:
            # The bare discriminators: nothing of theirs is exchanged between the workers in this step.
            made = generator_loss(networks.discriminators, features, day_B3HW, night_B3HW, translation, weights)
        networks.generator_optimizer.zero_grad(set_to_none=True)
        made.total.backward()  # type: ignore[no-untyped-call]
        networks.generator_optimizer.step()
        networks.discriminators.requires_grad_(True)
        _average(networks, min(recipe.average, (1 + iteration) / (10 + iteration)))
        done = iteration + 1
        window.add(judged, made)
        if done % plan.iterations_between_looks == 0 or done == recipe.iterations:
            row = window.close(session)
            _check_finite(row, done, recipe)
            history.append({"iteration": done, **row})
            session.progress(done, generator=row["total"], discriminator=row["discriminator_total"])
            _draw(curves, done, row)
        if done % recipe.checkpoint_every == 0 or done == recipe.iterations:
            _show(curves, done, networks.averaged, plan)
            _report(session, networks, history, window, done, recipe)


def _curves(plan: Plan, session: Session, start: int) -> Curves | None:
    """What TensorBoard shows, written by one worker; it goes on after `start` iterations."""
    return Curves(plan.curves, start) if session.rank == 0 and plan.curves is not None else None


def _draw(curves: Curves | None, done: int, row: dict[str, float]) -> None:
    if curves is not None:
        curves.scalars(done, {f"loss/{name}": value for name, value in row.items()})
        curves.flush_if_due()


def _show(curves: Curves | None, done: int, generators: Generators, plan: Plan) -> None:
    """A look at both directions. What is there is written before the checkpoint, so that a restart finds no gap."""
    if curves is not None:
        sheet = sample_sheet(generators, plan.reader(plan.day), plan.reader(plan.night))
        curves.picture(done, "samples/day_night_night_day", encode_png(sheet), *sheet.shape[:2])
        curves.flush()


class Window:
    """Sums of the loss terms since the last row of the history, kept on the device."""

    def __init__(self, device: torch.device, sums: Tensor | None = None, count: int = 0) -> None:
        self.sums = torch.zeros(len(TERMS), device=device) if sums is None else sums.to(device)
        self.count = count

    def add(self, judged: DiscriminatorLosses, made: GeneratorLosses) -> None:
        self.sums += torch.stack([term.detach().float() for term in (*judged, *made)])
        self.count += 1

    def close(self, session: Session) -> dict[str, float]:
        """Mean of every term over the window and all workers; the window starts anew."""
        means = session.sum(self.sums.clone()) / (session.world_size * max(1, self.count))
        self.sums.zero_()
        self.count = 0
        return dict(zip(TERMS, means.tolist(), strict=True))


def build_networks(recipe: Translator, seed: int, device: torch.device) -> Networks:
    """New networks, the same on every worker, and their optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, Stream.WEIGHTS))
        generators = Generators(recipe.width, recipe.res_blocks)
        discriminators = Discriminators(
            recipe.discriminator_width, recipe.discriminator_scales, recipe.discriminator_norm
        )
    optimizers = []
    for module in (generators, discriminators):
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers.append(
            torch.optim.Adam(
                module.parameters(),
                lr=recipe.learning_rate,
                betas=ADAM_BETAS,
                weight_decay=recipe.weight_decay,
                fused=True,
            )
        )
    averaged = copy.deepcopy(generators).requires_grad_(False)
    generator_optimizer, discriminator_optimizer = optimizers
    return Networks(generators, discriminators, generator_optimizer, discriminator_optimizer, averaged)


def _average(networks: Networks, decay: float) -> None:
    """One step of the running mean of the generators' weights; `decay` 0 keeps the latest ones.

    An adversarial game circles around its solution, and the mean of the circle is nearer to it (arXiv 1806.04498).
    """
    parameters = list(networks.generators.parameters())
    torch._foreach_lerp_(list(networks.averaged.parameters()), [p.detach() for p in parameters], 1 - decay)


def _features(recipe: Translator, device: torch.device) -> PerceptualFeatures | None:
    if recipe.weights.perceptual == 0:
        return None
    features = build_perceptual(recipe.perceptual_network, recipe.perceptual_weights)
    return features.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _to_device(crops_B3HW: Tensor, device: torch.device) -> Tensor:
    """uint8 crops as float32 in [-1, 1] on the device, channels last."""
    if device.type == "cuda":
        crops_B3HW = crops_B3HW.pin_memory().to(device, non_blocking=True)
    return to_unit_range(crops_B3HW)


def _set_learning_rate(networks: Networks, learning_rate: float) -> None:
    for optimizer in (networks.generator_optimizer, networks.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _report(
    session: Session,
    networks: Networks,
    history: list[dict[str, float]],
    window: Window,
    done: int,
    recipe: Translator,
) -> None:
    """One checkpoint. Weights that are not finite never become one, so the last checkpoint is always a good one."""
    for module in (networks.generators, networks.averaged, networks.discriminators):
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise UserError(_diverged("a weight is", done, recipe))
    state = {
        "generators": networks.generators.state_dict(),
        "averaged": networks.averaged.state_dict(),
        "discriminators": networks.discriminators.state_dict(),
        "generator_optimizer": networks.generator_optimizer.state_dict(),
        "discriminator_optimizer": networks.discriminator_optimizer.state_dict(),
        "iteration": done,
        "history": history,
        "window_sums": window.sums,
        "window_count": window.count,
    }
    latest = {name: value for name, value in history[-1].items()} if history else {"iteration": done}
    session.report(latest, state if session.rank == 0 else None)


def _restore(session: Session, networks: Networks) -> tuple[list[dict[str, float]], Window, int]:
    """History, open window and number of finished iterations; the networks and optimisers are set."""
    state = session.restore()
    if state is None:
        return [], Window(session.device), 0
    networks.generators.load_state_dict(state["generators"])
    networks.averaged.load_state_dict(state["averaged"])
    networks.discriminators.load_state_dict(state["discriminators"])
    networks.generator_optimizer.load_state_dict(state["generator_optimizer"])
    networks.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
    window = Window(session.device, state["window_sums"], int(state["window_count"]))
    return list(state["history"]), window, int(state["iteration"])


def _check_finite(row: dict[str, float], done: int, recipe: Translator) -> None:
    broken = [name for name, value in row.items() if not np.isfinite(value)]
    if broken:
        raise UserError(_diverged(f"the loss terms {', '.join(broken)} are", done, recipe))


def _diverged(what: str, done: int, recipe: Translator) -> str:
    kept = (done - 1) // recipe.checkpoint_every * recipe.checkpoint_every
    return (
        f"the training of the translator has diverged: {what} not finite at iteration {done}. The last good checkpoint "
        f"(iteration {kept}) is kept. Lower learning_rate (now {recipe.learning_rate:g}) or weights.adversarial and "
        "run again."
    )
