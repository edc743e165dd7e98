"""nightseg: semantic segmentation that learns to see at night without night labels, on a Ray cluster.

Frames come in at the bottom, evidence leaves at the top. Folders of frames become frame tables (collect), a pool is
split into day and night (split), UNIT learns the way from day to night (train_translator), the labelled day frames
take it (translate), a Semantic FPN learns from both (train_segmenter), unlabelled night frames are measured and some
of them chosen (score, select), the model labels them (pseudo_label) and learns again, in rounds, or labels them while
it learns; test sets and a report say what it was worth (evaluate, predict). Stages never import each other: they meet
through committed tables.

A key of a recipe is a field of its room's settings.py and is used in that room, by the module that the map names; no
stage between has to be touched. docs/recipe.md is made again by the command that its test shows. A new field changes
the keys of the stages that are given its type (pipeline/graph.py): earlier runs compute them again.

Root: no torch, no ray
    errors.py    the error that is the user's to mend
    progress.py  bars on a terminal, a line every few seconds in a log
    settings.py  the base of all types of a recipe, and the small words they share

Storage
    storage/credentials.py  none of them in addresses, logs or errors
    storage/stores.py   file systems behind URIs: whole objects, and who was first to write one
    storage/paths.py    a file or folder, local or behind a URI: all reading and writing
    storage/tables.py   tables to bytes and back
    storage/yaml.py     YAML of settings, read strictly
    storage/commits.py  what makes files the result of a stage, and whether they still are it
    storage/attempts.py  where a stage works, shard by shard
    storage/workspace.py  the run folder: its stages and their keys
    storage/portable.py  places in a run folder, wherever it lies
    storage/lock.py     one driver at a time
    storage/scratch.py  large files that can be made again, shared by the processes of a machine
    storage/inputs.py   frames of stores, kept on a disk of the node that reads them
    storage/events.py   curves and pictures as TensorBoard reads them

Cluster: ray, no words of the domain
    cluster/settings.py        resources of trainings and passes
    cluster/ray.py             join or start Ray; its own output, silenced
    cluster/token.py           the token of a cluster: where it comes from, whether others may read it
    cluster/places.py          paths that every node must see
    cluster/local.py           a Ray of this machine alone: on loopback, in a private folder
    cluster/map.py             passes over shards, on Ray Data or in this process
    cluster/session.py         what a training loop sees of the cluster
    cluster/nodes.py           what fits on the nodes that are there, with how many workers a training goes on
    cluster/ahead.py           nodes asked of an autoscaler before the next stage needs them
    cluster/elastic.py         Ray Train's decisions on sizes and restarts, replaced by those
    cluster/turn.py            one stage at a time works in the driver's process, while others wait for the cluster
    cluster/train.py           training loops on Ray Train, and their checkpoints
    cluster/rendezvous.py      how the workers of a training find each other
    cluster/shortage.py        what a worker ran out of, in words
    cluster/progress_actor.py  from training workers to the driver: how far, and why it failed
    cluster/submit.py          jobs of a cluster: uploaded, started, followed, tried again
    cluster/launch.py          what is wrong with a cluster.yaml, and the most that it allows
    cluster/kuberay.py         what is wrong with a file for KubeRay

Frames: no torch, no ray
    data/settings.py        where frames come from; class lists of labels
    data/table.py           the frame row and its table; quarantine rows; columns of vectors
    data/images.py          decode and encode; the reasons a frame is bad
    data/jpeg.py            JPEG with the damage that libjpeg only warns of
    data/intact.py          damage of PNG, TIFF, WebP and raw pixels that decoders show
    data/taxonomy.py        class lists, palettes, raw-id maps
    data/class_list.py      class lists by name, from files, from a recipe; one mapped onto another
    data/label_names.py     what names of labels say: frame, ids, which of several files
    data/encodings.py       what the ids of label files mean: by names, values and palettes of a set
    data/labels.py          the label of a row as train ids
    data/stored_labels.py   labels of a teacher at the stride of its logits, and what of them is learned
    data/listing.py         the files that a folder means: links followed, nothing hidden, nothing that nightseg wrote
    data/patterns.py        folders, globs and templates of paths
    data/split_list.py      frames of a set by name, in text or CSV files
    data/layouts.py         folder layouts
    data/pairing.py         predictions and labels of two folders, by name
    data/discover.py        what two folders hold: layout, labels, classes, sizes, light
    data/sources.py         a file, folder, pattern, table or video as frames to read
    data/overlay.py         classes in their colours over a frame, and their legend
    data/video.py           videos as frames, frames as a video
    data/day_night.py       day, night and twilight by luminance histograms
    data/thumbnails.py      near duplicates by mean brightness
    data/prefetch.py        items computed by threads ahead of their use
    data/scenes/street.py   procedural street scenes: plan of a street, and the function `scene`
    data/scenes/sheet.py    camera, and strokes that carry colour and surface together
    data/scenes/things.py   people, trees, lamps, signs, cars, houses, fences, skyline
    data/scenes/light.py    weather of a domain, and how a street appears under it

Metrics
    metrics/confusion.py  confusion matrix; PA, CA, mIoU, FWIoU
    metrics/boundary.py   boundary IoU
    metrics/edges.py      do the edges of two frames agree
    metrics/ranks.py      rank correlation
    metrics/bootstrap.py  how far mIoU would move with other frames
    metrics/seeds.py      mean and spread over seeds, differences of models

Shared by networks
    networks/devices.py       the CPU, or a GPU that is there
    networks/downloads.py     whether anything may be fetched
    networks/weights.py       files of weights: found, or downloaded once where that is allowed; read safely
    networks/model_folder.py  model folders
    networks/normaliser.py    bytes to an encoder's numbers, as a module
    networks/ema.py           EMA of weights

The segmenter
    segmenter/settings.py       network, loss, training, inference, thresholds: what a recipe may say
    segmenter/encoders.py       ResNets, EfficientNet-Lites, timm's networks as four feature maps; their norms
    segmenter/network.py        the network; its model folders
    segmenter/start.py          what a training starts from: ImageNet weights, nothing, another model
    segmenter/detectron2.py     detectron2's modules and names behind ours
    segmenter/loss.py           segmentation_loss: cross-entropy, focal, combined; class weights, OHEM, chunks of rows
    segmenter/augment.py        joint transforms of image and label
    segmenter/data.py           parts of a training set, what an epoch draws of them, batches; caches of frames
    segmenter/optimizer.py      parameter groups, learning rate of a step
    segmenter/train.py          the training loop: step, learner, checkpoints, validation
    segmenter/watching.py       what a validation shows: scores and pictures as curves
    segmenter/norms.py          batch norm statistics of another domain
    segmenter/given.py          frames as a caller gives them, one or many
    segmenter/predict.py        a model folder as a callable segmenter: tiles, test-time augmentation
    segmenter/pictures.py       predictions as pictures
    segmenter/self_training.py  which pixels of a pseudo-label are kept, and what no label can be
    segmenter/teacher.py        online self-training: the EMA labels a pool in every step; its guards

The translator that is trained
    unit/settings.py    what a recipe may say about UNIT
    unit/network.py     encoders, decoders, discriminators; large images a tile at a time
    unit/perceptual.py  frozen features of the perceptual loss
    unit/start.py       weights that a training starts from
    unit/data.py        day and night crops as batches
    unit/loss.py        loss terms, and one step of the generators and of the discriminators
    unit/train.py       the training loop, its log and checkpoints, when it has gone wrong

Translators that need no training: pixels in, pixels out
    translators/settings.py      translators that need no training
    translators/photometric.py   night by optics: less light, lens, sensor; lights by the label
    translators/colour.py        sRGB, Oklab; colours or low frequencies of another frame
    translators/style_images.py  which frame's light or colours a frame is given
    translators/command.py       a program of the user
    translators/shards.py        shards of frames through any of these
    translators/rng.py           random numbers of a frame

Selection of frames
    selection/settings.py  the list of methods; counts, extraction of features: what a recipe may say
    selection/features.py  frozen features that distances are made from, by name of their network
    selection/frechet.py   FID and KID, mergeable moments, statistics files, frames by their positions
    selection/rows.py      vectors of a pool in a file, read some rows at a time
    selection/limits.py    near duplicates, quotas and gaps of sequences
    selection/exchange.py  exchanges of chosen rows for better ones, each rated by what it does
    selection/subset.py    the subset with the smallest FID, and its certificate
    selection/methods.py   a function for each method of that list; what one is given, scores of single frames
    selection/evidence.py  what a choice of frames has to beat

Models of other programs
    interop/detectron2.py         detectron2's checkpoints as model folders, and back
    interop/detectron2_config.py  what its configs say about a network
    interop/unpickle.py           pickles of arrays that can call nothing
    interop/onnx.py               a segmenter as an ONNX file, checked before it is written

Recipes
    recipe/types.py      the recipe as frozen, strict types, made of the rooms' settings
    recipe/load.py       YAML and overrides in, a recipe or every error at once out
    recipe/inherit.py    what a recipe leaves to its base, to presets and, of models, to the whole recipe
    recipe/checks.py     unknown names, cycles, missing folders, contradictions
    recipe/starter.py    a first recipe for two folders
    recipe/reference.py  which keys and words are allowed where; docs/recipe.md
    recipe/unions.py     which errors of pydantic are about what was written, where several types are allowed
    recipe/renamed.py    old names of keys

Stages: explicit inputs, their part of the recipe, an attempt; each returns its commit
    stages/collect.py               folders and scenes to frame tables
    stages/split.py                 day, night, twilight
    stages/train_translator.py      UNIT
    stages/translate.py             frames through a translator
    stages/evaluate_translation.py  how good a translation is
    stages/train_segmenter.py       Semantic FPN
    stages/adapt_norms.py           batch norm statistics of other frames
    stages/score.py                 features of frames; FID of two sets
    stages/select.py                the frames to learn from
    stages/label.py                 what a teacher says of frames
    stages/pseudo_label.py          which of that is learned: thresholds
    stages/evaluate.py              scores on labelled frames
    stages/consistency.py           how sure and consistent a model is on unlabelled frames
    stages/predict.py               masks of unlabelled frames

The report
    report/page.py          report.html
    report/run.py           a finished run as the report sees it
    report/comparison.py    what a gain is worth: a model beside its control; the headline
    report/published.py     published rows beside what was measured; which claims of the recipe hold
    report/frame_spread.py  that of the scores and gains of a run
    report/model_card.py    README.md beside the weights of a model
    report/templates.py     the templates, and how they write numbers
    report/ablation.py      what helped: models beside their controls, by seed and by class; what teachers saw
    report/gallery.py       which frames are shown
    report/selections.py    which frames were chosen, and what that was worth
    report/trainings.py     what each model learned from, for how long, and how it went
    report/charts.py        charts as SVG
    report/life.py          what a run knows of a frame
    report/life_page.py     the same in words, and as a page
    report/search_page.py   the page of a search
    report/check_page.py    the page of `nightseg check`
    report/pictures.py      thumbnails as data URIs
    report/sheets.py        pictures for a README: the strip, the sheet of translations
    report/translations.py  the table of translations, their best and worst frames
    report/formatting.py    numbers and sentences

Runs
    pipeline/graph.py    node, view, inputs: the words of the graph
    pipeline/build.py    the recipe as a graph of stages: the only place that knows the order
    pipeline/check.py    what a run would refuse later; what some frames of each folder say
    pipeline/estimate.py  time, disk and memory that a run will take
    pipeline/time_left.py  how long it will still take, by what its stages have cost
    pipeline/classes.py  which classes whole train, validation and test sets have
    pipeline/leaks.py    frames that a model has seen and is measured on
    pipeline/results.py  results.json
    pipeline/folder.py   what people find in a run folder: models, masks, chosen frames, tables, earlier results
    pipeline/verify.py   is every file of a run what was written
    pipeline/schedule.py which steps run when: side by side where there is room, and what a failure takes along
    pipeline/execute.py  what is committed is found, the rest is done: the nodes of a graph as steps of a schedule
    pipeline/plan.py     what a run would do, and why
    pipeline/run.py      a recipe from its check over all stages to results and report
    pipeline/submit.py   a recipe as a job of a cluster: what is uploaded, what must lie there
    pipeline/tracking.py a finished run in MLflow or W&B
    pipeline/search/settings.py   what a search may say: spaces, score, sampler, budgets
    pipeline/search/proposals.py  values of the next trial: a function of those before (Optuna)
    pipeline/search/importance.py  how much each value explains of the scores
    pipeline/search/records.py    what a search has done, in trials.json
    pipeline/search/trials.py     one trial as a run that borrows; what trials share
    pipeline/search/keys.py       what the searched keys reach: those refused, those that make other frames
    pipeline/search/tune.py       Ray Tune's part: side by side, ASHA, TensorBoard
    pipeline/search/run.py        a search from its check to its best recipe
    pipeline/single.py   single stages without a recipe

The command line
    cli/greeting.py  what is said before anything heavy is imported
    cli/doctor.py    is this machine fit
    cli/boards.py    TensorBoard beside a search
    cli/output.py    how answers and errors look
    cli/main.py      `nightseg run`, `check`, `recipe`, `status`, `verify`, `report`, `explain`, `search`, `submit`,
                     `doctor`
    cli/commands.py  `nightseg init`, `split`, `fid`, `select`, `evaluate`, `predict`, `convert`, `export`
    cli/jobs.py      the files of jobs/: parse, call one function, say what came of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

    from nightseg.pipeline.run import Adapted
    from nightseg.pipeline.single import FolderScores
    from nightseg.segmenter.predict import Segmenter

__all__ = ["evaluate", "load_model", "overlay", "run"]


def run(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    run_dir: str | Path | None = None,
    only: str | None = None,
    log: Sequence[str] = (),
    progress: bool = True,
) -> Adapted:
    """Run a recipe to its report, as `nightseg run` does: what is committed is skipped, what was interrupted continues.

    recipe: a YAML file, or what one would hold as a mapping. overrides: `["training.epochs=3"]` or
    `{"training.epochs": 3}`. run_dir: where the run lies, by default runs/NAME. only: this model and what it needs.
    log: "mlflow", "wandb": get the finished run. progress: lines on standard error.
    Returns the run: `.scores` (model -> test set -> mIoU in [0, 1]), `.results` (results.json), `.report`, `.models`
    and `.load(model)`. A model that fails stops only those that need it: `.failed` says which, `.failure` is an
    exception to raise. Raises UserError, before anything starts, with all that is wrong with the recipe.
    """
    from nightseg.pipeline.run import adapt
    from nightseg.progress import progress_for

    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    elif isinstance(overrides, str):
        overrides = [overrides]
    place = None if run_dir is None else str(run_dir)
    names = [log] if isinstance(log, str) else log
    return adapt(recipe, overrides, run_dir=place, only=only, log=names, progress=progress_for(quiet=not progress))


def load_model(path: str | Path, device: str | None = None) -> Segmenter:
    """Open a model folder, or `RUN_DIR:MODEL` of a finished run.

    Returns a callable: uint8 RGB image (H, W, 3) -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]).
    Images of Pillow, tensors and paths of image files are taken, too; what may mean several things is refused with its
    shape. Many frames (a list, an iterator, a folder, a pattern, a video) give an iterator: only a few of them are in
    memory at a time.
    `device` is "cpu" or "cuda"; by default CUDA where there is one. A tiled and test-time augmented prediction with the
    same weights: `segment.using(window=(512, 1024), flip=True, scales=(0.75, 1.0, 1.25))`.
    Raises UserError if there is no such model.
    """
    from nightseg.pipeline.results import model_folder
    from nightseg.segmenter.predict import Segmenter

    return Segmenter(model_folder(path), device)


def evaluate(
    predicted: Segmenter | str | Path,
    labels: str | Path,
    *,
    images: str | Path | None = None,
    taxonomy: str | None = None,
    label_encoding: str | None = None,
    absent_class: Literal["cityscapes", "detectron2"] = "cityscapes",
    boundary: float | None = None,
    device: str | None = None,
    progress: bool = False,
) -> FolderScores:
    """Score a model, or predictions that it made, against a folder of labels, paired by name.

    predicted: what `load_model` returned or takes, with the folder of `images`; or a folder of masks of train ids, as
    `nightseg predict` writes them. taxonomy: a name (camvid11) or a file; by default the classes of the model.
    label_encoding: what the ids of the labels mean; by default what their names and ids tell. absent_class: a class
    that is predicted but not in the labels counts as IoU 0, or is left out. boundary: boundary IoU, too, within this
    share of the diagonal. device: of a model that is named.
    Returns `.miou`, `.pa`, `.ca`, `.fwiou`, `.iou` (by class), fractions in [0, 1]; `.frames`; `.details`.
    Raises UserError: no such folder or model, a label without prediction, other sizes, unknown ids, damaged files.
    """
    from nightseg.pipeline.single import evaluate as score
    from nightseg.progress import progress_for

    return score(
        predicted, labels, images=images, taxonomy=taxonomy, label_encoding=label_encoding, absent_class=absent_class,
        boundary=boundary, device=device, progress=progress_for(quiet=not progress),
    )  # fmt: skip


def overlay(
    image: Any, labels: Any = None, taxonomy: str | None = None, *, legend: bool = False, opacity: float = 0.5
) -> Image.Image:
    """A frame with its classes in colour, as an image of Pillow: notebooks show it, `.save(FILE)` keeps it.

    image: as `load_model` takes it, or what a model returned, which has both image and labels. labels: what a model
    returned, uint8 train ids (H, W), or a mask file. taxonomy: whose train ids they are (a name or a file); known where
    a model returned them. legend: colours and names of all classes below. opacity: of the colours, 0 to 1.
    Raises UserError: sizes that differ, labels whose classes nobody says, no image.
    """
    from nightseg.data.class_list import taxonomy as class_list
    from nightseg.segmenter.pictures import overlay as drawn

    classes = None if taxonomy is None else class_list(taxonomy)
    return drawn(image, labels, classes, legend=legend, opacity=opacity)
