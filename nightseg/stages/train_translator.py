"""Train UNIT between day and night frames: two unlabelled frame tables in, one model folder for both directions out."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import fit
from nightseg.data import table as frame
from nightseg.data.images import encode_png
from nightseg.networks.model_folder import save_model
from nightseg.progress import Progress
from nightseg.storage import Attempt, Commit, UserError
from nightseg.unit.data import FrameRef
from nightseg.unit.loss import TERMS, build_networks
from nightseg.unit.network import (
    DISCRIMINATORS,
    KIND,
    STRIDE,
    build_generators,
    check_tile,
    smallest_discriminated_side,
)
from nightseg.unit.perceptual import smallest_perceived
from nightseg.unit.settings import Translator
from nightseg.unit.train import Plan, learn, perceptual_features

VERSION = 4


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
    name = str(attempt.identity["name"])
    _check(name, settings, day, night, compute)
    perceptual_features(settings, torch.device("cpu"))  # what is missing fails here, not on the cluster
    build_networks(settings, seed, torch.device("cpu"))
    threads = max(1, min(8, int(compute.cpus_per_worker) - 1))
    plan = Plan(_refs(day), _refs(night), settings, seed, threads, attempt.folder)
    _warn(name, plan, progress)
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
    discriminators = {f"{DISCRIMINATORS}{name}": tensor for name, tensor in state["discriminators"].items()}
    save_model(attempt.folder / "model", state["ema"] | discriminators, _card(settings, attempt))
    (attempt.folder / "history.json").write_json(state["history"])
    generators = build_generators(settings.width, settings.res_blocks, state["ema"], settings.shared_blocks)
    (attempt.folder / "samples.png").write_bytes(encode_png(plan.sample_sheet(generators)))
    num_frames, last = day.num_rows + night.num_rows, state["history"][-1]
    outputs = ["model/model.safetensors", "model/model.json", "history.json", "samples.png"]
    return attempt.finish(
        rows_in=num_frames,
        rows_out=num_frames,
        outputs=outputs + (["samples"] if settings.samples_every else []),
        scratch=["trainer"],
        summary={"day": day.num_rows, "night": night.num_rows, **{term: last[term] for term in ("iteration", *TERMS)}},
    )


# -- before: what is refused ------------------------------------------------------------------------------------------


def _check(name: str, settings: Translator, day: pa.Table, night: pa.Table, compute: TrainCompute) -> None:
    where = f"translator {name}"
    for domain, table in (("day", day), ("night", night)):
        if table.num_rows == 0:
            raise UserError(
                f"{where}: its {domain} dataset {getattr(settings, domain)} holds no frame",
                cure="see the counts and the quarantine table of that dataset",
            )
    check_settings(name, settings, compute)


def check_settings(name: str, settings: Translator, compute: TrainCompute) -> None:
    """Refuse settings that cannot train, whatever the frames."""
    where = f"translator {name}"
    if settings.batch % compute.workers:
        raise UserError(
            f"{where}: batch {settings.batch} cannot be shared evenly by {compute.workers} workers "
            "(compute.train.workers)",
            cure=f"choose a batch that is a multiple of {compute.workers}",
        )
    crop = tuple(settings.crop)
    if any(side % STRIDE for side in crop):
        raise UserError(
            f"{where}: crop {crop} has sides that are no multiples of {STRIDE}",
            cure=f"choose multiples of {STRIDE} in height and width",
        )
    smallest = smallest_discriminated_side(settings.discriminator_scales)
    if min(crop) < smallest:
        raise UserError(
            f"{where}: crop {crop} is too small for a discriminator with {settings.discriminator_scales} scales, which "
            f"needs {smallest} pixels a side",
            cure="enlarge crop or set a smaller discriminator_scales",
        )
    smallest = smallest_perceived(settings.perceptual_network, settings.perceptual_layers)
    if settings.weights.perceptual > 0 and min(crop) < smallest:
        raise UserError(
            f"{where}: crop {crop} is too small for the perceptual loss, which needs {smallest} pixels a side",
            cure="enlarge crop or set weights.perceptual to 0",
        )
    if settings.tile is not None:
        check_tile(settings.tile, settings.res_blocks)


def _warn(name: str, plan: Plan, progress: Progress) -> None:
    """Of what can be trained on and may not be meant."""
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
            progress.say(f"translator {name}: there is only one {domain} frame, so that is all there is to learn")


def _refs(table: pa.Table) -> tuple[FrameRef, ...]:
    names = (frame.FRAME_ID, frame.URI, frame.HEIGHT, frame.WIDTH, frame.SHA256)
    columns = (table[column].to_pylist() for column in names if column in table.column_names)
    return tuple(FrameRef(*values) for values in zip(*columns, strict=True))


def _card(settings: Translator, attempt: Attempt) -> dict[str, Any]:
    network = {name: getattr(settings, name) for name in ("width", "res_blocks", "shared_blocks")}
    training = settings.model_dump(mode="json", exclude={*network, "perceptual_weights", "tile"})
    card = {"kind": KIND, **network, "directions": ["night", "day"]}
    parents = [settings.start] if settings.start else []
    return {**card, "training": training, "parents": parents, "key": attempt.key, "seed": attempt.seed}
