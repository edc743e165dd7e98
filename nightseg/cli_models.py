"""The verbs of `nightseg` that turn a model into something else."""

from __future__ import annotations

from typing import Literal

import click

from nightseg.cli_steps import size_in_pixels
from nightseg.console import answer, json_option, libraries_on_stderr, print_json, print_table
from nightseg.storage import Location


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
    from nightseg.learning.export import export_onnx
    from nightseg.results import model_folder

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
