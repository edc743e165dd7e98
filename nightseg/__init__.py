"""nightseg: semantic segmentation that learns to see at night without night labels, on a Ray cluster.

Frames come in at the bottom, evidence leaves at the top. Folders of frames become frame tables (collect), a heap is
split into day and night (split), UNIT learns the way from day to night (train_translator), the labelled day frames
take it (translate), a Semantic FPN learns from both (train_segmenter), unlabelled night frames are measured and some
of them chosen (score, select), the model labels them (pseudo_label) and learns again, in rounds; test sets and a
report say what it was worth (evaluate, predict). Stages never import each other: they meet through committed tables.

Words: no torch, no ray
    errors.py               the error that is the user's to mend
    progress.py             bars on a terminal, a line every few seconds in a log
    storage/location.py     a file or folder, local or behind a URI: all reading and writing
    storage/remote.py       file systems behind URIs
    storage/parquet.py      tables to bytes and back
    storage/scratch.py      large files that can be made again, shared by the processes of a machine
    storage/events.py       curves and pictures as TensorBoard reads them
    storage/faults.py       points at which a test may kill the process
    workspace/stage.py      the run folder; a stage and its key
    workspace/attempt.py    where a stage works until it is committed
    workspace/commit.py     what a finished stage left
    workspace/lock.py       one driver at a time
    config/recipe.py        the recipe as frozen, strict types
    config/compute.py       its resources
    config/datasets.py      where frames come from
    config/unit.py          the translator that is trained
    config/translators.py   translators that need no training
    config/models.py        segmenters, teachers, selections
    config/training.py      loss, optimisation, augmentation of a segmenter
    config/presets.py       settings of UNIT known by a name
    config/strict.py        the base of all these types, and the small words they share

Frames: no ray
    frames/table.py         the frame row and its table; quarantine rows
    frames/images.py        decode and encode; the reasons a frame is bad
    frames/taxonomy.py      class lists, palettes, raw-id maps
    frames/datasets.py      folder layouts
    frames/augment.py       joint transforms of image and label
    frames/pairs.py         predictions and labels of two folders, by name
    frames/labels.py        the label of a row as train ids
    frames/sources.py       a file, folder, pattern, table or video as frames to read
    frames/video.py         videos as frames, frames as a video
    frames/vectors.py       columns of feature vectors
    frames/scenes/street.py     procedural street scenes: plan of a street, and the function `scene`
    frames/scenes/sheet.py      camera, and strokes that carry colour and surface together
    frames/scenes/things.py     people, bicyclists, trees, lamps, signs
    frames/scenes/cars.py       cars, vans, buses
    frames/scenes/lots.py       houses, shops, fences, skyline
    frames/scenes/weather.py    light and exposure of a domain
    frames/scenes/light.py      the look of a street under that light

Reading recipes: knows the layouts and class lists of the frames
    recipe/load.py          YAML and overrides in, a recipe or every error at once out
    recipe/names.py         the names of a recipe as a graph
    recipe/presets.py       trainings of others, as values to start from
    recipe/trainable.py     what cannot train
    recipe/schema.py        which keys and words are allowed where
    recipe/chain.py         rounds of a model as the models they stand for

Measures: no ray
    measures/histogram.py   luminance histograms; day, night and twilight
    measures/frechet.py     mergeable moments, Frechet distance, statistics files
    measures/scores.py      how near one frame is to a reference, by every definition
    measures/convex.py      the FID of weighted frames: value and gradient
    measures/exchange.py    exchanges of chosen rows for better ones, each rated by what it does
    measures/subset.py      the subset with the smallest FID, and its certificate
    measures/kernel.py      KID, herding
    measures/limits.py      near duplicates, quotas and gaps of sequences
    measures/selection.py   the methods of choosing frames behind one function
    measures/evidence.py    what a choice of frames has to beat
    measures/confusion.py   confusion matrix; PA, CA, mIoU, FWIoU
    measures/boundary.py    boundary IoU
    measures/edges.py       do the edges of two frames agree

Networks: torch, no ray
    networks/encoders.py    ResNets and EfficientNet-Lite0 as four feature maps, with their weights
    networks/timm_encoder.py    any encoder of timm as four feature maps, with its weights
    networks/batch_norm.py  frozen, synchronised and ordinary batch norms
    networks/weights.py     files of weights, read safely
    networks/semantic_fpn.py    the segmenter
    networks/detectron2.py  detectron2's modules and names behind ours
    networks/detectron2_config.py   what its configs say about a network
    networks/detectron2_checkpoint.py   its tensors as ours, and back
    networks/unpickle.py    pickles of arrays that can call nothing
    networks/unit.py        the translator and its discriminators
    networks/upsampling.py  upsampling and convolution as one layer
    networks/winograd.py    3x3 convolutions with a quarter of the multiplications
    networks/tiles.py       large images a tile at a time
    networks/perceptual.py  frozen features of the perceptual loss
    networks/features.py    frozen features that FID compares
    networks/extractors.py  the extractors by name, and where their weights lie
    networks/checkpoint.py  model folders
    networks/normaliser.py  bytes to an encoder's numbers, as a module

Translators that need no training: pixels in, pixels out; no ray
    translators/photometric.py  night by optics: less light, lens, sensor
    translators/lights.py   what shines at night, placed by the label
    translators/fourier.py  low-frequency amplitudes of another frame
    translators/colour.py   colours of another frame
    translators/lenders.py  which frame lends its look
    translators/command.py  a program of the user
    translators/ways.py     shards of frames through any of these
    translators/srgb.py     sRGB, linear light, Oklab
    translators/chance.py   random numbers of a frame

Learning: how one step learns; torch, no ray
    learning/segmentation.py    cross-entropy, focal and combined loss
    learning/hard_pixels.py which pixels of a frame are learned from
    learning/pixel_loss.py  the loss of a batch; classes weighed, hard pixels, strips
    learning/step.py        one step of a segmenter
    learning/learner.py     all that changes while it learns; checkpoints
    learning/averaging.py   running mean of weights
    learning/watching.py    its curves
    learning/label_sheet.py a look at a segmenter
    learning/batches.py     labelled frames as batches
    learning/decoded.py     where decoded frames are kept
    learning/schedule.py    learning rate of a step
    learning/optimizer.py   which weights decay
    learning/starting.py    the weights a training starts from
    learning/validation.py  confusion of a network in training
    learning/translation.py loss terms of UNIT
    learning/adversarial.py one step of the generators, and of the discriminators
    learning/collapse.py    when a training of UNIT has gone wrong
    learning/unpaired.py    day and night crops as batches
    learning/sample_sheet.py    a look at a translator
    learning/inference.py   how a frame goes through a network: whole, in windows, mirrored, at several scales
    learning/prediction.py  a model folder as a callable segmenter
    learning/export.py      a segmenter as an ONNX file, checked before it is written
    learning/self_training.py   which pixels of a pseudo-label are kept

Compute: ray, no domain words; how work is spread
    compute/cluster.py      join or start Ray
    compute/tables.py       a table as shards
    compute/inference.py    passes over shards on Ray Data
    compute/training.py     training loops on Ray Train
    compute/checkpoints.py  the state of a training on disk
    compute/board.py        news from workers to the driver
    compute/quiet.py        Ray's own output, silenced
    compute/launch.py       what is wrong with a cluster.yaml

Stages: explicit inputs, their part of the recipe, an attempt; each returns its commit
    stages/collect.py       folders and scenes to frame tables
    stages/split.py         day, night, twilight
    stages/train_translator.py  UNIT
    stages/translate.py     frames through a translator
    stages/judge_translation.py how good a translation is
    stages/train_segmenter.py   Semantic FPN
    stages/score.py         features of frames; FID of two sets
    stages/select.py        the frames to learn from
    stages/pseudo_label.py  labels of a teacher
    stages/evaluate.py      scores on labelled frames
    stages/predict.py       masks of unlabelled frames

Runs
    graph.py                node, view, inputs: the words of the graph
    rounds.py               the recipe as a graph of stages: the only place that knows the order
    rounds_translation.py   the part of it about sets of frames and translations
    results.py              results.json
    runner.py               do what is not committed; or say what would be done
    report/page.py          report.html
    report/run.py           a finished run as the report sees it
    report/gallery.py       which frames are shown
    report/figures.py       charts as SVG
    report/pictures.py      thumbnails as data URIs
    report/strip.py         the picture strip
    report/translations.py  the table of translations, their best and worst frames
    report/words.py         numbers and sentences
    trials.py               what a search tries, and one trial of it
    search.py               Ray Tune over the rounds
    distance.py             FID and KID of two sets of frames
    folder_scores.py        scores of a folder of predictions
    verbs.py                single stages without a recipe
    convert.py              detectron2's checkpoints as model folders, and back
    masks.py                masks of images and videos without a run
    adapt.py                recipe in, results and report out
    doctor.py               is this machine fit
    console.py              how answers and errors look
    cli.py                  `nightseg run`, `status`, `report`, `search`, `doctor`
    cli_steps.py            `nightseg split`, `fid`, `select`, `evaluate`, `predict`
    cli_models.py           `nightseg convert`, `export`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nightseg.learning.prediction import Segmenter


def load_model(path: str | Path, device: str | None = None) -> Segmenter:
    """Open a model folder, or `RUN_DIR:MODEL` of a finished run.

    Returns a callable: uint8 RGB image (H, W, 3) -> (uint8 train ids (H, W), float32 confidence (H, W) in (0, 1]).
    `device` is "cpu" or "cuda"; by default CUDA where there is one. It looks once at the whole frame; another way to
    look, with the same weights: `segment.using(window=(512, 1024), flip=True, scales=(0.75, 1, 1.25))`.
    Raises UserError if there is no such model.
    """
    from nightseg.learning.prediction import load_model as open_folder
    from nightseg.results import model_folder

    return open_folder(model_folder(path), device)
