"""Train one segmenter: labelled frames and a start in, a model folder and its history out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa

from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.train import fit
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.images import BadFrame, encode_jpeg
from nightseg.data.labels import check_labelled, train_ids_of
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.stored_labels import KEPT_NAME, Kept, with_kept
from nightseg.data.taxonomy import IGNORE, Taxonomy
from nightseg.networks.model_folder import save_model
from nightseg.progress import Progress
from nightseg.segmenter.data import InMemory, LabelledFrames, Part, Sample
from nightseg.segmenter.network import SemanticFPN, check_architecture, model_card
from nightseg.segmenter.self_training import check_never_below
from nightseg.segmenter.settings import Loss, Network, Online, Teaching, Training
from nightseg.segmenter.start import starting_network
from nightseg.segmenter.teacher import Pool
from nightseg.segmenter.train import Plan, learn
from nightseg.storage import Attempt, Commit, UserError
from nightseg.translators.photometric import LitIds, render_night
from nightseg.translators.settings import PhotometricTranslator

VERSION = 5

RENDERED: Final = "rendered"  # table and folder: frames that were rendered anew, as samples saw them
PART: Final = "part"
RENDERING_URI: Final = "rendering_uri"
FRAMES_SHOWN, NIGHTS_SHOWN = 3, 3


def train_segmenter(
    train: Mapping[str, pa.Table],
    validate: pa.Table | None,
    *,
    name: str,
    weights: Mapping[str, float] | None = None,
    fresh: Mapping[str, PhotometricTranslator] | None = None,
    network: Network,
    loss: Loss,
    training: Training,
    start: str | Commit,
    taxonomy: AnyTaxonomy,
    seed: int,
    attempt: Attempt,
    compute: TrainCompute,
    progress: Progress,
    kept: Mapping[str, Commit] | None = None,
    pool: pa.Table | None = None,
    teaching: Teaching = Teaching(),  # noqa: B008 frozen
    warnings: Sequence[str] = (),
) -> Commit:
    """Commit `model/` (the last weights, or those of the best validation, or their EMA: its card says which) and
    `history.json` (one entry an epoch).
    `tensorboard/` beside them has the curves and some validation frames; it is no part of the result.

    `validate` and the tables of `train`, by the name of their part, are frame tables with absolute uris, every frame
    labelled; each row's label is mapped by its own encoding. `weights`: shares of the samples that the parts have,
    None = as many as they have frames. `fresh`: parts whose frames are rendered at night anew with every sample.
    `start`: "imagenet" (encoder only), "scratch", or the commit of another model, whose predictor is
    re-initialised when its class list differs. Validation is only watched, unless `training.keep` is best. `kept`: what
    is learned of parts with labels of a teacher. `pool`: frames for online self-training, whose labels are not read;
    `warnings`: what is known of it beforehand, said and kept.
    Raises UserError: a frame without label or that has changed, settings that cannot train, a loss that is not finite,
    labels that break `never_below`.
    """
    begin, curves = attempt.folder / "start", attempt.folder / "tensorboard"
    classes = load_taxonomy(taxonomy)
    rows, parts = put_together(as_kept(train, kept or {}), weights, fresh or {}, classes)
    unlabelled = None if pool is None else Pool.of(pool, teaching, warnings)
    plan = Plan(rows, parts, validate, begin, classes, network, loss, training, seed, curves, unlabelled)
    check_training(name, plan, compute)
    for warning in warnings:
        _say(progress, name, warning)
    card = _save_start(name, plan, start, attempt, progress)
    rendered = _rendered(plan, list(train), attempt)  # before the training: what cannot be read ends it now
    folder, title = attempt.folder / "trainer", f"train {name}"
    told: dict[str, Any] = {"title": title, "total": plan.total_steps, "unit": "steps", "progress": progress}
    state = fit(learn, {"plan": plan}, folder=folder, name=name, compute=compute, **told).load()
    kept = _save_kept(state, card, training, attempt)
    (attempt.folder / "history.json").write_json(state["history"])
    warned = {} if state["teacher"] is None else {"warnings": [*warnings, *state["teacher"]["warned"].values()]}
    return attempt.finish(
        rows_in=plan.sampler.num_frames,
        rows_out=plan.sampler.num_frames,
        outputs=["model/model.safetensors", "model/model.json", "history.json", *rendered],
        scratch=["trainer", "start"],
        summary={"steps": plan.total_steps, "pace": state["pace"], "last": state["history"][-1]} | kept | warned,
    )


def _save_kept(
    state: Mapping[str, Any], card: Mapping[str, Any], training: Training, attempt: Attempt
) -> dict[str, Any]:
    """Write the model; what the summary says of weights that validation chose."""
    weights, best = state["network"] if state["ema"] is None else state["ema"], state["best"]
    if best is None:
        save_model(attempt.folder / "model", weights, card)
        return {}
    of = "" if card["weights"] == "last" else f" of the {card['weights']}"
    which = f"best validation{of}, epoch {best['epoch']} of {training.epochs}"
    save_model(attempt.folder / "model", best["weights"], {**card, "weights": which})
    return {"kept": {"epoch": best["epoch"], "miou": best["miou"]}}


def _say(progress: Progress, name: str, message: str) -> None:
    progress.say(f"model {name}: {message}")


def _rendered(plan: Plan, names: Sequence[str], attempt: Attempt) -> list[str]:
    """Write some frames of the parts that are rendered anew, as samples saw them; the outputs, none without such parts.

    Table `rendered`: frame_id and uri of the source, the part, the uri of a rendering.
    """
    shown, size = [], plan.network.input_size
    frames = LabelledFrames(plan.train, plan.classes, size=size, resize_labels=True, cache=InMemory(0))
    for name, part in zip(names, plan.parts, strict=True):
        if part.render is None or not part.rows:
            continue
        for place in np.unique(np.linspace(0, len(part.rows) - 1, FRAMES_SHOWN).astype(int)):
            row = part.rows[place]
            image_3HW, label_HW = frames[row]
            source = {frame.FRAME_ID: frames.frame_id(row), frame.URI: plan.train[frame.URI][row].as_py()}
            for seed in range(NIGHTS_SHOWN):
                uri = f"{RENDERED}/{name}-{place}-{seed}.jpg"
                night_HW3 = part.render(image_3HW.permute(1, 2, 0).numpy(), label_HW.numpy(), seed)
                (attempt.folder / uri).write_bytes(encode_jpeg(night_HW3))
                shown.append({**source, PART: name, RENDERING_URI: uri})
    if not shown:
        return []
    attempt.write_table(RENDERED, pa.Table.from_pylist(shown))
    return [RENDERED, f"{RENDERED}.parquet"]


def as_kept(train: Mapping[str, pa.Table], kept: Mapping[str, Commit]) -> dict[str, pa.Table]:
    """The tables of the parts, with what is learned of the labels of those in `kept`."""
    tables = dict(train)
    for part, commit in kept.items():
        facts, said = commit.table("labels"), Kept.of(commit.file(KEPT_NAME).read_bytes().decode())
        same = facts[frame.FRAME_ID].equals(train[part][frame.FRAME_ID])
        assert same, f"{part}: other frames than those that were labelled"
        tables[part] = with_kept(train[part], said, facts[frame.LABEL_PIXELS])
    return tables


def put_together(
    tables: Mapping[str, pa.Table],
    weights: Mapping[str, float] | None,
    fresh: Mapping[str, PhotometricTranslator],
    classes: Taxonomy,
) -> tuple[pa.Table, tuple[Part, ...]]:
    """One table that has each file once, so that it is decoded once, and the parts as rows of it."""
    together = pa.concat_tables(tables.values(), promote_options="default")
    files = zip(
        *(together[column].to_pylist() for column in (frame.URI, frame.LABEL_URI, frame.LABEL_ENCODING)), strict=True
    )
    first: dict[tuple[str | None, ...], int] = {}
    places = [first.setdefault(file, len(first)) for file in files]
    kept = sorted({place: index for index, place in reversed(list(enumerate(places)))}.values())
    parts, begun = [], 0
    for name, table in tables.items():
        rows = tuple(places[begun : begun + table.num_rows])
        begun += table.num_rows
        if weights is not None and not rows:
            raise UserError(
                f"train: {name} has no frame, and a weight of {weights[name]:g}",
                cure="look at the counts and the quarantine of that dataset, or leave it out",
            )
        render = None
        if name in fresh:
            render = partial(render_night, optics=fresh[name], lit=LitIds.of(fresh[name].classes, classes.classes))
        parts.append(Part(rows, None if weights is None else weights[name], render))
    return together.take(pa.array(kept, pa.int64())), tuple(parts)  # also of no frame: it is refused later


def _save_start(name: str, plan: Plan, start: str | Commit, attempt: Attempt, progress: Progress) -> dict[str, Any]:
    """Write the network before its first step; the card that the trained one has, too."""
    initial = starting_network(
        start if isinstance(start, str) else start.folder / "model",
        plan.network,
        plan.classes,
        seed=plan.seed,
        say=partial(_say, progress, name),
    )
    card = _card(initial, plan, start, attempt)
    save_model(plan.start, initial.state_dict(), card)
    return card


def _card(initial: SemanticFPN, plan: Plan, start: str | Commit, attempt: Attempt) -> dict[str, Any]:
    return {
        **model_card(plan.network, plan.classes, initial.body.mean, initial.body.std),
        "weights": f"EMA, decay {plan.training.ema_decay:g}" if plan.training.ema_decay else "last",
        "start": start if isinstance(start, str) else start.name,
        "parents": [] if isinstance(start, str) else [{"stage": start.stage, "name": start.name, "key": start.key}],
        "key": attempt.key,  # of the stage: hash of recipe part, inputs and seed
        "seed": plan.seed,
    }


# -- before: what is refused ------------------------------------------------------------------------------------------


def check_network(network: Network, name: str) -> None:
    """Refuse a network that cannot be built here; called before any stage of the run, so that none is for nothing."""
    try:
        check_architecture(network)
    except UserError as error:
        raise UserError(f"model {name}: {error.what}", cure=error.cure) from error


def check_online(model: str, online: Online, training: Training, workers: int) -> None:
    """Refuse an online self-training that cannot be; called before any stage of the run, too."""
    where = f"model {model}: self_training"
    if not training.ema_decay:
        raise UserError(
            f"{where}: mode online needs the EMA of the weights, which is the teacher, and training.ema_decay is 0",
            cure="set training.ema_decay of this model, to 0.99 for some hundred steps, to 0.999 for many thousand",
        )
    total = training.epochs * training.steps_per_epoch if training.steps_per_epoch else None
    if total is not None and online.warmup_steps >= total:
        raise UserError(
            f"{where}.online.warmup_steps is {online.warmup_steps}, and the training has {total} steps: the teacher "
            "would never teach",
            cure=f"set it to {total // 4} or so",
        )
    shares = workers * training.accumulate
    if online.frames(training) % shares:
        raise UserError(
            f"{where}.online.batch: {online.frames(training)} frames of the pool cannot be shared evenly by "
            f"compute.train.workers {workers} in {training.accumulate} parts each (training.accumulate)",
            cure=f"set it to a multiple of {shares}",
        )


def check_training(model: str, plan: Plan, compute: TrainCompute) -> None:
    """Raise UserError with the cure if these frames and settings cannot train."""
    network, training, where = plan.network, plan.training, f"model {model}"
    if plan.train.num_rows == 0:
        raise UserError(
            f"{where}: its train sets hold no frame", cure="see the quarantine tables of its datasets for the reasons"
        )
    _check_keep(plan, where)
    cure = "train and validate on labelled datasets, and learn from unlabelled ones through self_training.pool"
    for key, rows in (("train", plan.train), ("validate_on", plan.validate)):
        if rows is not None:
            check_labelled(rows, f"{where}, {key}", cure)
            _check_valid(rows, plan.classes, f"{where}, {key}")
    _check_sampling(plan, where)
    check_steps(training, plan.sampler.num_frames, where)
    if plan.pool is not None:
        if plan.pool.rows.num_rows == 0:
            raise UserError(
                f"{where}: the pool holds no frame to learn from", cure="look at self_training.pool and its selection"
            )
        check_online(model, plan.pool.teaching.online, training, compute.workers)
        teaching = plan.pool.teaching
        samples = (Sample(row, 0, 0, number) for number, part in enumerate(plan.parts) for row in part.rows)
        if teaching.threshold.precision is not None and not any(map(plan.is_night, samples)):
            raise UserError(
                f"{where}: self_training.threshold.precision is measured on labelled frames under night light, and its "
                "train sets have none (domain night or twilight)",
                cure="add day frames that are translated to night to its train sets, or leave precision out",
            )
        check_never_below(teaching.never_below, plan.train, plan.classes, where)
    check_settings(network, training, compute, where)


def check_steps(training: Training, num_frames: int, where: str) -> None:
    """Refuse a warm-up that is as long as the training."""
    of_epoch = training.steps_of_epoch(num_frames)
    total = training.epochs * of_epoch
    if training.warmup_steps >= total:
        steps, epochs = f"{total} step{'s' * (total > 1)}", f"{training.epochs} epoch{'s' * (training.epochs > 1)}"
        raise UserError(
            f"{where}: training.warmup_steps is {training.warmup_steps}, but the whole training has {steps} "
            f"({epochs} of {of_epoch}), so the learning rate would never be reached",
            cure=f"set training.warmup_steps to {total // 10} or so",
        )


def check_settings(network: Network, training: Training, compute: TrainCompute, where: str) -> None:
    """Refuse settings that cannot train, whatever the frames."""
    shares = compute.workers * training.accumulate
    if training.batch % shares:
        parts = f" in {training.accumulate} parts each (training.accumulate)" if training.accumulate > 1 else ""
        raise UserError(
            f"{where}: training.batch {training.batch} cannot be shared evenly by compute.train.workers "
            f"{compute.workers}{parts}",
            cure=f"choose a batch that is a multiple of {shares}",
        )
    if network.norm == "sync" and compute.workers > 1 and not compute.gpus_per_worker:
        raise UserError(
            f"{where}: network.norm sync is computed by GPUs only, and compute.train.gpus_per_worker is 0",
            cure="use norm batch or frozen, or give each worker a GPU",
        )
    if network.input_size is not None:
        largest = tuple(round(side * training.augmentation.scale[1]) for side in network.input_size)
        if any(crop > side for crop, side in zip(training.crop, largest, strict=True)):
            raise UserError(
                f"{where}: training.crop {training.crop} is larger than a frame can become, {largest} "
                "(network.input_size times the largest training.augmentation.scale): every batch would be partly "
                "padding",
                cure=f"set training.crop to {network.input_size}",
            )


def _check_keep(plan: Plan, where: str) -> None:
    if plan.training.keep == "best" and not (plan.validate is not None and plan.validate.num_rows):
        raise UserError(
            f"{where}: training.keep is best, and it has no validation frames to tell which weights are",
            cure="give it validate_on, labelled frames that it is not tested on, or set training.keep to last",
        )


def _check_sampling(plan: Plan, where: str) -> None:
    if plan.training.class_sampling is not None and not plan.sampler.knows_classes:
        raise UserError(
            f"{where}: training.class_sampling needs a train set whose labels were all counted when they were "
            "collected, and this model has none",
            cure="start a new run folder to collect them again, or set it to null",
        )


def _check_valid(rows: pa.Table, classes: Taxonomy, where: str) -> None:
    """Refuse labels of nothing but ignored pixels. Usually the first label that is read has others, and ends it."""
    for row in rows.to_pylist():
        try:
            train_ids = train_ids_of(row, classes)
        except BadFrame:
            return  # it was good when it was collected: reading the frames says what has happened to it
        if train_ids is not None and (train_ids != IGNORE).any():
            return
    raise UserError(
        f"{where}: none of the {rows.num_rows} labels has a pixel with a class, only ignored ones",
        cure="check the labels of its datasets, and what their ids mean (label_encoding)",
    )
