"""The verbs of `nightseg` that do one thing, to folders of frames or to a model, without a recipe and a run folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource
from pydantic import BaseModel, ValidationError

from nightseg.cli.output import (
    Answer,
    Verbs,
    answers,
    print_export,
    print_folder_scores,
    print_selection,
    print_split,
    print_starter,
)
from nightseg.cluster.settings import MapCompute
from nightseg.progress import progress_for
from nightseg.segmenter.settings import Inference
from nightseg.selection.settings import METHODS, METHODS_IN_WORDS, Extraction, Selection, known_extractor
from nightseg.storage import Location, UserError

Settings = TypeVar("Settings", bound=BaseModel)


# -- options that several verbs have ----------------------------------------------------------------------------------

_actors_option = click.option(
    "--actors",
    "compute",
    default=0,
    type=click.IntRange(0),
    callback=lambda _context, _option, actors: MapCompute(actors=actors),
    help="Processes of Ray with a CPU each, here or on a cluster; what they have done survives an interruption. "
    "0: this process.",
)


def _bad_option(default: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--max-bad-fraction",
        default=default,
        type=click.FloatRange(0, 1),
        help="Share of the frames that may be damaged or unreadable; above it the command fails.",
    )


def _place(context: click.Context, option: click.Parameter, text: str | None) -> Location | None:
    return None if text is None else Location.of(text)


def valid(kind: type[Settings], **values: Any) -> Settings:
    """Settings from the values of options of the same names. Raises UserError that names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0] if first["loc"] else "").replace("_", "-")
        raise UserError(f"{option} {first['input']}: {first['msg']}", cure="see --help") from error


def _checked_extractor(context: click.Context, parameter: click.Parameter, name: str) -> str:
    try:
        return known_extractor(name)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def _extractor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The four options of an `extraction`."""

    @click.option(
        "--extractor",
        default="inception",
        callback=_checked_extractor,
        help="Network whose features are compared. inception: pytorch-fid's (also inception_768, _192, _64); "
        "efficientnet_lite0: needs no download; resnet18 to resnet152; timm/NAME with --weights.",
    )
    @click.option(
        "--resize", type=click.Choice(["pytorch-fid", "clean"]), help="Resize rule; default: the one of the extractor."
    )
    @click.option("--fast", is_flag=True, help="Compute features in bfloat16 where this machine is faster at it.")
    @click.option("--weights", metavar="FILE", help="Weights of the extractor, where it needs a file.")
    @functools.wraps(command)
    def with_extraction(
        *, extractor: str, resize: Literal["pytorch-fid", "clean"] | None, fast: bool, weights: str | None, **rest: Any
    ) -> Any:
        mode: Literal["exact", "fast"] = "fast" if fast else "exact"
        return command(extraction=Extraction(name=extractor, weights=weights, resize=resize, mode=mode), **rest)

    return with_extraction


# -- a first recipe ---------------------------------------------------------------------------------------------------


@click.command()
@click.argument("day")
@click.argument("night")
@click.option("--labels", metavar="DIR", help="Where the labels of the day frames lie; default: below DAY.")
@click.option("--taxonomy", metavar="NAME_OR_FILE", help="The classes; default: what names and labels tell.")
@click.option("--out", default="recipe.yaml", metavar="RECIPE.yaml", help="The recipe to write.")
@click.option("--overwrite", is_flag=True, help="Also if it is there already.")
@answers
def init(day: str, night: str, labels: str | None, taxonomy: str | None, out: str, overwrite: bool) -> Answer:
    """Write a first recipe for your frames.

    For labelled DAY frames and NIGHT frames without labels. Looks at both folders and finds out what it can: where
    images and labels are (train and val folders, or split lists that it writes beside the recipe), which names belong
    together, ids or colours, known class lists, sizes, whether the night folder holds nights only. Says what it assumed
    and what you should check; both stand in the recipe, too.

    \b
    DAY     Cityscapes, BDD100K, Mapillary Vistas, ACDC as they are published, or any folder of images with labels
            beside them: images/ and labels/, train/rgb/ and train/masks/, a.jpg and a_mask.png, ...
    labels  PNG, TIFF, BMP or PGM: an id a pixel, or a colour a class (RGB)
    classes from classes.txt, .csv, .json or .yaml, label_colors.txt, labelmap.txt in DAY, by --taxonomy, or one for
            each id: then give them their names in the recipe

    \b
    nightseg init /data/mine /data/night --out mine.yaml
    nightseg check mine.yaml
    nightseg run mine.yaml
    """
    from nightseg.recipe.starter import AlreadyThere, write_starter

    try:
        starter = write_starter(day, night, out, labels=labels, classes=taxonomy, overwrite=overwrite)
    except AlreadyThere as error:
        raise UserError(error.what, cure="another name by --out, or --overwrite") from error
    return Answer(starter._asdict(), functools.partial(print_starter, starter))


# -- frames -----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("images")
@click.option("--out", required=True, metavar="FRAMES.parquet", help="The frame table to write.")
@click.option("--margin", default=0.2, type=click.FloatRange(0, 1), help="Closer calls are twilight.")
@_bad_option(1.0)
@_actors_option
@answers
def split(images: str, out: str, margin: float, max_bad_fraction: float, compute: MapCompute) -> Answer:
    """Separate a folder of images into day, night, twilight.

    By their luminance histograms; the evidence and the list of bad frames are written beside the table.

    \b
    nightseg split /data/dashcam --out dashcam.parquet
    """
    from nightseg.pipeline.single import split_folder

    done = split_folder(
        images, out, margin=margin, max_bad_fraction=max_bad_fraction, compute=compute, progress=progress_for()
    )
    return Answer(done, functools.partial(print_split, done, margin))


@click.command()
@click.argument("a")
@click.argument("b")
@_extractor_options
@_bad_option(0.01)
@_actors_option
@click.option("--save-a", metavar="FILE.npz", help="Keep the statistics of A; pytorch-fid reads the file, too.")
@click.option("--save-b", metavar="FILE.npz", help="Keep the statistics of B.")
@click.option(
    "--work",
    metavar="DIR",
    callback=_place,
    help="Where it keeps what is done, seen by all machines; default: nowhere.",
)
@answers
def fid(
    a: str,
    b: str,
    extraction: Extraction,
    max_bad_fraction: float,
    compute: MapCompute,
    save_a: str | None,
    save_b: str | None,
    work: Location | None,
) -> dict[str, Any]:
    """FID and KID between two sets of frames.

    A and B are image folders, frame tables (.parquet) or statistics (.npz, also pytorch-fid's). Where a file does not
    say what made it, --extractor and --resize do.

    \b
    nightseg fid translated/ /data/night --extractor efficientnet_lite0
    nightseg fid translated/ night.npz --weights pt_inception-2015-12-05-6726825d.pth --json
    """
    from nightseg.pipeline.single import distance

    asked = click.get_current_context().get_parameter_source("extractor")
    return distance(
        a,
        b,
        extraction=extraction,
        compute=compute,
        work=work,
        save_statistics=(save_a, save_b),
        insist=asked == ParameterSource.COMMANDLINE,
        max_bad_fraction=max_bad_fraction,
        progress=progress_for(),
    )


@click.command()
@click.argument("pool")
@click.option("--reference", metavar="REF", help="Images or frame table to be close to; random needs none.")
@click.option("--count", required=True, type=click.IntRange(1), help="How many frames to choose.")
@click.option("--method", default="fid-subset", type=click.Choice(list(METHODS)), help=METHODS_IN_WORDS)
@click.option("--quota", type=click.IntRange(1), help="Most frames of one sequence.")
@click.option("--gap", type=click.IntRange(1), help="Least distance of two frames of one sequence, in frames.")
@click.option("--duplicates", type=click.FloatRange(0, 1), help="Cosine from which a frame repeats an earlier one.")
@click.option("--out", required=True, metavar="DIR", help="Gets frames.parquet, scores.parquet, evidence.json.")
@click.option("--seed", default=0, type=click.IntRange(0))
@_extractor_options
@_bad_option(1.0)
@_actors_option
@answers
def select(
    pool: str,
    reference: str | None,
    out: str,
    seed: int,
    extraction: Extraction,
    max_bad_fraction: float,
    compute: MapCompute,
    **rules: Any,
) -> Answer:
    """Choose the frames of a pool that are closest to others.

    POOL and REF are image folders or frame tables (.parquet).

    \b
    nightseg select night.parquet --reference translated/ --count 1600 --extractor efficientnet_lite0 --out chosen
    """
    from nightseg.pipeline.single import select_frames

    source = click.get_current_context().get_parameter_source
    named = any(source(one) == ParameterSource.COMMANDLINE for one in ("extractor", "resize", "fast", "weights"))
    selection = valid(Selection, **rules, **({"extractor": extraction} if named else {}))
    done = select_frames(
        pool,
        reference,
        out,
        selection=selection,
        seed=seed,
        max_bad_fraction=max_bad_fraction,
        compute=compute,
        progress=progress_for(),
    )
    return Answer(done, functools.partial(print_selection, done))


@click.command()
@click.argument("predictions")
@click.argument("labels")
@click.option(
    "--taxonomy", required=True, help="cityscapes19, camvid11, or a file: a class list, or a recipe for its classes."
)
@click.option(
    "--label-encoding", metavar="NAME", help="What the ids of the labels mean; default: what their names and ids tell."
)
@click.option(
    "--absent-class",
    default="cityscapes",
    type=click.Choice(["cityscapes", "detectron2"]),
    help="A class that is predicted but not in the labels: counts as IoU 0, or is left out.",
)
@click.option("--boundary", is_flag=True, help="Boundary IoU, too: how well contours fit.")
@click.option(
    "--boundary-distance",
    default=0.02,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="How far a boundary reaches, as a share of the image's diagonal.",
)
@_bad_option(0.0)
@_actors_option
@click.option(
    "--work",
    metavar="DIR",
    callback=_place,
    help="Where it keeps what is done; default: with actors, a hidden folder in PREDICTIONS.",
)
@answers
def evaluate(
    predictions: str,
    labels: str,
    taxonomy: str,
    label_encoding: str | None,
    absent_class: Literal["cityscapes", "detectron2"],
    boundary: bool,
    boundary_distance: float,
    max_bad_fraction: float,
    compute: MapCompute,
    work: Location | None,
) -> Answer:
    """Score a folder of predictions against labels.

    Both hold PNG (or TIFF, BMP, PGM) files of the same names and sizes; predictions are train ids, as `nightseg
    predict` writes them.

    \b
    nightseg evaluate masks /data/camvid/day/test/labels --taxonomy camvid11
    nightseg evaluate masks /data/cityscapes/gtFine/val --taxonomy cityscapes19 --boundary --actors 8 --json
    """
    from nightseg.data.encodings import UnclearLabels
    from nightseg.errors import together
    from nightseg.pipeline.single import evaluate_folders
    from nightseg.recipe.types import Evaluation

    try:
        scores = evaluate_folders(
            Location.of(predictions),
            Location.of(labels),
            taxonomy,
            label_encoding=label_encoding,
            evaluation=valid(Evaluation, boundary=boundary_distance if boundary else None, absent_class=absent_class),
            max_bad_fraction=max_bad_fraction,
            compute=compute,
            work=work,
            progress=progress_for(),
        )
    except UserError as error:
        problems = [
            UserError(one.what, cure=one.cure_by("--label-encoding ")) if isinstance(one, UnclearLabels) else one
            for one in error.problems or [error]
        ]
        raise together(problems) from error
    return Answer(scores, functools.partial(print_folder_scores, scores))


def _inference_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--precision", default="float32",
                     type=click.Choice(["float32", "bfloat16"]), help="Of the network."),
        click.option("--scales", default="1", metavar="LIST", callback=_factors,
                     help="Look once at each scale, e.g. 0.75,1,1.25."),
        click.option("--flip", is_flag=True, help="Look at the mirrored frame as well."),
        click.option("--overlap", default=0.25,
                     help="Share of a window that the next one covers again."),
        click.option("--window", metavar="HxW", callback=_size_in_pixels, help="Slide a window over frames: 512x1024."),
    ):  # fmt: skip
        command = option(command)
    return command


def _size_in_pixels(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """`512x1024` as (height, width)."""
    if text is None:
        return None
    high, _, wide = text.lower().partition("x")
    if not (high.isdecimal() and wide.isdecimal() and int(high) and int(wide)):
        raise click.BadParameter(f"{text!r} is not HEIGHTxWIDTH in pixels, like 512x1024", context, parameter)
    return int(high), int(wide)


def _factors(context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers, like 0.75,1,1.25", context, parameter) from error


@click.command()
@click.argument("model")
@click.argument("source")
@click.option("--out", required=True, metavar="DIR", help="Gets the masks, and a folder for each other picture.")
@click.option("--save", default="mask", metavar="LIST", help="Any of mask,color,overlay,confidence.")
@click.option("--overlay-video", is_flag=True, help="Of a video: the overlays as NAME.overlay.mp4, too.")
@click.option(
    "--legend", is_flag=True, help="The classes below pictures in colours, and in legend.jpg: masks are data."
)
@_inference_options
@click.option("--device", help="cpu, cuda or cuda:N. Default: CUDA where there is one; with --actors, cpu.")
@click.option("--batch", default=8, type=click.IntRange(1), help="Frames, or windows, at a time.")
@_bad_option(1.0)
@_actors_option
@answers
def predict(
    model: str,
    source: str,
    out: str,
    save: str,
    overlay_video: bool,
    legend: bool,
    device: str | None,
    batch: int,
    max_bad_fraction: float,
    compute: MapCompute,
    **modes: Any,
) -> dict[str, Any]:
    """Segment images and videos.

    MODEL is a model folder, or RUN_DIR:MODEL_NAME of a finished run. SOURCE is a file, a folder (its images, to the
    bottom), a quoted pattern (** stands for any folders), a frame table (.parquet) or a video, whose frames are named
    by number. Where windows overlap logits are averaged, over mirror and scales probabilities.

    What cannot be read is listed in quarantine.json with a reason. An interrupted command that is given again
    continues, if model, settings and files are still the same; a finished one makes everything anew.

    \b
    nightseg predict runs/demo:adapted /data/night --out masks --save mask,overlay
    nightseg predict runs/demo:adapted 'drives/**/*.jpg' --out masks --flip --scales 0.75,1,1.25
    nightseg predict runs/demo:adapted drive.mp4 --out drive --window 512x1024 --overlay-video
    """
    from nightseg.pipeline.single import predict_frames

    inference = valid(Inference, **modes)
    gpus = 1.0 if device is not None and device.startswith("cuda") else 0.0
    return predict_frames(
        model,
        source,
        Location.of(out),
        save=tuple(word.strip() for word in save.split(",") if word.strip()),
        inference=inference,
        device=device,
        overlay_video=overlay_video,
        legend=legend,
        max_bad_fraction=max_bad_fraction,
        compute=MapCompute(actors=compute.actors, gpus_per_actor=gpus, batch=batch),
        progress=progress_for(),
    )


# -- models of other programs ------------------------------------------------------------------------------------------


def _three_numbers(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"{text!r} is not three numbers such as 103.53,116.28,123.675", context, parameter)
    return (numbers[0], numbers[1], numbers[2])


@click.group(cls=Verbs)
def convert() -> None:
    """Convert models from and to detectron2.

    \b
    nightseg convert detectron2 model_final.pth models/panoptic --config config.yaml
    nightseg convert to-detectron2 models/panoptic night.pth
    """


@convert.command()
@click.argument("checkpoint")
@click.argument("out")
@click.option("--config", metavar="FILE", help="detectron2's config.yaml, or a config of its model zoo.")
@click.option("--taxonomy", metavar="NAME_OR_FILE", help="The classes: cityscapes19, camvid11, or a YAML file.")
@click.option("--unfreeze", is_flag=True, help="Let frozen batch norms learn in trainings that start from this model.")
@click.option("--channels", type=click.Choice(["BGR", "RGB"]), help="Without a config: its INPUT.FORMAT.")
@click.option("--pixel-mean", metavar="A,B,C", callback=_three_numbers, help="Without a config: its PIXEL_MEAN.")
@click.option("--pixel-std", metavar="A,B,C", callback=_three_numbers, help="Without a config: its PIXEL_STD.")
@click.option("--stride-in-1x1/--stride-in-3x3", default=None, help="Without a config: its RESNETS.STRIDE_IN_1X1.")
@click.option("--min-size-test", type=click.IntRange(0), help="Without a config: its INPUT.MIN_SIZE_TEST, else 800.")
@click.option("--max-size-test", type=click.IntRange(1), help="Without a config: its INPUT.MAX_SIZE_TEST, else 1333.")
@answers
def detectron2(
    checkpoint: str, out: str, config: str | None, taxonomy: str | None, unfreeze: bool, **said: Any
) -> dict[str, Any]:
    """Make a model folder of a detectron2 checkpoint.

    CHECKPOINT is a .pth file, or a .pkl file of the model zoo, of a SemanticSegmentor or PanopticFPN (of which the
    semantic branch is taken) on a ResNet with FPN. OUT is the model folder to write. The network is then fed like any
    other here; what its own input was is read from the config and never guessed.

    \b
    nightseg convert detectron2 output/model_final.pth models/day --config output/config.yaml --taxonomy cityscapes19
    nightseg predict models/day /data/night --out masks
    """
    from nightseg.interop.detectron2 import convert_from_detectron2
    from nightseg.interop.detectron2_config import Detectron2Config

    options = {name: f"--{name.replace('_', '-')}" for name in ("channels", "pixel_mean", "pixel_std")}
    options["stride_in_1x1"] = "--stride-in-1x1 or --stride-in-3x3"
    missing = [option for name, option in options.items() if said[name] is None]
    stated = {name: value for name, value in said.items() if value is not None}
    if config is not None and stated:
        both = ", ".join((*options.values(), "--min-size-test", "--max-size-test"))
        raise UserError(f"--config and {both} exclude each other", cure="give the config alone")
    if config is None and len(missing) == len(options):
        beside = Location.of(checkpoint).parent / "config.yaml"
        which = f"--config {beside}, which lies there" if beside.exists() else "--config FILE"
        raise UserError(
            f"{checkpoint}: the input of its network, and where its ResNet has its strides, stand in detectron2's "
            "config.yaml and not in the checkpoint",
            cure=f"give {which}; or say it: the networks of detectron2's model zoo are "
            "--channels BGR --pixel-mean 103.53,116.28,123.675 --pixel-std 1,1,1 --stride-in-1x1",
        )
    if config is None and missing:
        raise UserError(f"convert: without a config these are missing: {', '.join(missing)}", cure="add them")
    source = Detectron2Config(**stated) if config is None else Location.of(config)
    return convert_from_detectron2(
        Location.of(checkpoint), Location.of(out), source, classes=taxonomy, unfreeze=unfreeze
    )


@convert.command()
@click.argument("model")
@click.argument("out", metavar="OUT.pth")
@answers
def to_detectron2(model: str, out: str) -> dict[str, Any]:
    """Make a detectron2 checkpoint of a model folder.

    MODEL is a model folder, or RUN_DIR:MODEL_NAME of a finished run, of a ResNet. Beside OUT.pth a config OUT.yaml is
    written; detectron2 builds its SemanticSegmentor from that and loads every tensor. A converted checkpoint that was
    not trained since comes back bit for bit.

    \b
    nightseg convert to-detectron2 models/day day.pth
    """
    from nightseg.interop.detectron2 import convert_to_detectron2
    from nightseg.pipeline.results import model_folder

    return convert_to_detectron2(model_folder(model), Location.of(out))


@click.command()
@click.argument("model")
@click.option("--out", required=True, metavar="FILE.onnx", help="The file to write.")
@click.option(
    "--size", metavar="HxW", callback=_size_in_pixels, help="Fix the frames' size, e.g. 512x1024. Default: any size."
)
@click.option(
    "--output",
    default="labels",
    type=click.Choice(["labels", "logits"]),
    help="labels: train ids and confidence; logits: of every class, for those who want the probabilities.",
)
@click.option(
    "--tolerance",
    default=1e-3,
    type=click.FloatRange(0, min_open=True),
    help="Largest difference of the confidence (of logits: over the largest one); above it no file is written.",
)
@answers
def export(
    model: str, out: str, size: tuple[int, int] | None, output: Literal["labels", "logits"], tolerance: float
) -> Answer:
    """Write a segmenter as an ONNX file.

    MODEL is a model folder, or RUN_DIR:MODEL_NAME of a finished run. The graph takes frames as they are, uint8 RGB
    [batch, height, width, 3], and does the rest: resizing, normalisation, padding, upsampling. Classes, palette, mean
    and std stand in its metadata. Before it is written it runs in onnxruntime, at several sizes, beside PyTorch.

    \b
    nightseg export runs/demo:adapted --out night.onnx
    """
    from nightseg.interop.onnx import export_onnx
    from nightseg.pipeline.results import model_folder

    made = export_onnx(model_folder(model), Location.of(out), size=size, output=output, tolerance=tolerance)
    return Answer(made, functools.partial(print_export, made))
