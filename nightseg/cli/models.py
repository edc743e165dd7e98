"""The verbs of `nightseg` that turn model folders into files of other programs, and back."""

from __future__ import annotations

import math
from typing import Literal

import click

from nightseg.cli.commands import size_in_pixels
from nightseg.cli.output import answer, json_option, libraries_on_stderr, print_json, print_table
from nightseg.storage import Location, UserError


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


@click.group()
def convert() -> None:
    """Convert models from and to detectron2.

    \b
    nightseg convert detectron2 model_final.pth models/panoptic --config config.yaml
    nightseg convert to-detectron2 runs/demo:self_trained night.pth
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
@json_option
def detectron2(
    checkpoint: str,
    out: str,
    config: str | None,
    taxonomy: str | None,
    unfreeze: bool,
    channels: str | None,
    pixel_mean: tuple[float, float, float] | None,
    pixel_std: tuple[float, float, float] | None,
    stride_in_1x1: bool | None,
    as_json: bool,
) -> None:
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

    options = {
        "--channels": channels,
        "--pixel-mean": pixel_mean,
        "--pixel-std": pixel_std,
        "--stride-in-1x1 or --stride-in-3x3": stride_in_1x1,
    }
    missing = [option for option, value in options.items() if value is None]
    if config is not None and len(missing) < len(options):
        raise UserError(f"--config and {', '.join(options)} exclude each other", cure="give the config alone")
    if config is None and len(missing) == len(options):
        beside = Location.of(checkpoint).parent / "config.yaml"
        which = f"--config {beside}, which lies there" if beside.exists() else "--config FILE"
        raise UserError(
            f"{checkpoint}: the input of its network, and where its ResNet has its strides, stand in detectron2's "
            "config.yaml and not in the checkpoint",
            cure=f"give {which}; or say it: the networks of detectron2's model zoo are "
            "--channels BGR --pixel-mean 103.53,116.28,123.675 --pixel-std 1,1,1 --stride-in-1x1",
        )
    said: Location | Detectron2Config
    if config is not None:
        said = Location.of(config)
    elif channels is not None and pixel_mean is not None and pixel_std is not None and stride_in_1x1 is not None:
        said = Detectron2Config(channels, pixel_mean, pixel_std, stride_in_1x1)
    else:
        raise UserError(f"convert: without a config these are missing: {', '.join(missing)}", cure="add them")
    with libraries_on_stderr():
        found = convert_from_detectron2(
            Location.of(checkpoint),
            Location.of(out),
            said,
            classes=taxonomy,
            unfreeze=unfreeze,
        )
    answer(found, as_json)


@convert.command()
@click.argument("model")
@click.argument("out", metavar="OUT.pth")
@json_option
def to_detectron2(model: str, out: str, as_json: bool) -> None:
    """Make a detectron2 checkpoint of a model folder.

    MODEL is a model folder, or RUN_DIR:MODEL_NAME of a finished run, of a ResNet. Beside OUT.pth a config OUT.yaml is
    written; detectron2 builds its SemanticSegmentor from that and loads every tensor. A converted checkpoint that was
    not trained since comes back bit for bit.

    \b
    nightseg convert to-detectron2 models/day day.pth
    """
    from nightseg.interop.detectron2 import convert_to_detectron2
    from nightseg.pipeline.results import model_folder

    with libraries_on_stderr():
        found = convert_to_detectron2(model_folder(model), Location.of(out))
    answer(found, as_json)


@click.command()
@click.argument("model")
@click.option("--out", required=True, metavar="FILE.onnx", help="The file to write.")
@click.option(
    "--size", metavar="HxW", callback=size_in_pixels, help="Fix the frames' size, e.g. 512x1024. Default: any size."
)
@click.option(
    "--output",
    default="labels",
    show_default=True,
    type=click.Choice(["labels", "logits"]),
    help="labels: train ids and confidence; logits: of every class, for those who want the probabilities.",
)
@click.option(
    "--tolerance",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Largest difference of the confidence (of logits: over the largest one); above it no file is written.",
)
@json_option
def export(
    model: str,
    out: str,
    size: tuple[int, int] | None,
    output: Literal["labels", "logits"],
    tolerance: float,
    as_json: bool,
) -> None:
    """Write a segmenter as an ONNX file.

    MODEL is a model folder, or RUN_DIR:MODEL_NAME of a finished run. The graph takes frames as they are, uint8 RGB
    [batch, height, width, 3], and does the rest: resizing, normalisation, padding, upsampling. Classes, palette, mean
    and std stand in its metadata. Before it is written it runs in onnxruntime, at several sizes, beside PyTorch.

    \b
    nightseg export runs/demo:self_trained --out night.onnx
    """
    from nightseg.interop.onnx import export_onnx
    from nightseg.pipeline.results import model_folder

    with libraries_on_stderr():
        made = export_onnx(model_folder(model), Location.of(out), size=size, output=output, tolerance=tolerance)
    if as_json:
        print_json(made)
        return
    rows = [
        [
            f"{check['batch']} x {check['height']} x {check['width']}",
            f"{check['max_abs_difference']:.2g}",
            f"{100 * check['label_agreement']:.3f}",
            f"{100 * check['segmenter_agreement']:.3f}",
        ]
        for check in made.pop("checks")
    ]
    columns = ["frames", "max difference from PyTorch", "labels equal, %", "equal to nightseg predict, %"]
    print_table("checked in onnxruntime", columns, rows)
    answer(made, as_json=False)
