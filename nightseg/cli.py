"""`nightseg VERB`: parse, validate, call ONE function, show what it returned.

Standard output carries the answer (with --json one JSON object), standard error the progress. How answers and errors
look is `console.py`. Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from nightseg.console import METRICS, Failures, answer, percent, print_plan, print_scores, print_table
from nightseg.storage import Location, UserError


@click.group(cls=Failures, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="nightseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Semantic segmentation that learns to see at night without night labels.

    \b
    nightseg run configs/demo.yaml              the whole chain on made-up scenes, in minutes
    nightseg run configs/camvid.yaml --dry-run  what a recipe would do
    nightseg predict runs/demo/... IMAGES --out DIR
    """


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(command)


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--run-dir", metavar="DIR", help="Where the run lies (default: runs/<recipe name>); also s3://, gs://."
    )(command)
    command = click.option(
        "--set", "overrides", multiple=True, metavar="a.b=c", help="Override one key of the recipe; repeatable."
    )(command)
    return click.argument("recipe", type=click.Path())(command)


@main.command()
@_recipe_options
@click.option("--only", metavar="MODEL", help="Only this model, and what it needs.")
@click.option("--dry-run", is_flag=True, help="Print the graph: what would run, what is committed, frames, resources.")
@_json_option
def run(
    recipe: str, overrides: tuple[str, ...], run_dir: str | None, only: str | None, dry_run: bool, as_json: bool
) -> None:
    """Run RECIPE to its report; what is committed is skipped, what was interrupted continues.

    \b
    nightseg run configs/demo.yaml
    nightseg run configs/camvid.yaml --set datasets.day.root=/data/camvid/day --set training.epochs=3
    """
    if dry_run:
        from nightseg.adapt import run_folder
        from nightseg.recipe import load_recipe
        from nightseg.runner import plan

        loaded = load_recipe(recipe, overrides)
        folder = run_folder(loaded, run_dir)
        lines = plan(loaded, folder, only=only)
        if as_json:
            rows = [line._asdict() | {"node": str(line.node)} for line in lines]
            click.echo(json.dumps({"run_dir": folder.uri, "stages": rows}))
        else:
            print_plan(folder, lines)
        return
    from nightseg.adapt import adapt
    from nightseg.progress import progress_for

    adapted = adapt(recipe, overrides, run_dir=run_dir, only=only, progress=progress_for())
    if as_json:
        click.echo(json.dumps(adapted.outcome.results))
        return
    print_scores(adapted.outcome.results)
    click.echo(
        f"{adapted.outcome.done} stages done, {adapted.outcome.skipped} already committed, "
        f"{adapted.outcome.seconds:.0f} s. Report: {adapted.report.uri}"
    )


@main.command()
@click.argument("run_dir")
@_json_option
def status(run_dir: str, as_json: bool) -> None:
    """What is committed in RUN_DIR, since when, and who works on it."""
    from nightseg.workspace import Workspace

    folder = Location.of(run_dir)
    if not folder.is_folder():
        raise UserError(f"{run_dir}: there is no such run folder. Cure: give the folder that `nightseg run` wrote.")
    workspace = Workspace(folder)
    commits = workspace.commits()
    holder = workspace.holder()
    if as_json:
        rows = [
            {"stage": c.stage, "name": c.name, "key": c.key, "created": c.created, "seconds": c.seconds,
             "rows_in": c.rows_in, "rows_out": c.rows_out, "quarantined": c.quarantined}
            for c in commits
        ]  # fmt: skip
        click.echo(json.dumps({"run_dir": folder.uri, "holder": holder, "commits": rows}))
        return
    print_table(
        f"{folder.uri}: {'being worked on by ' + str(holder) if holder else 'no driver at work'}",
        ["stage", "committed", "frames in", "out", "quarantined", "seconds"],
        [[f"{c.stage}/{c.name}", c.created, c.rows_in, c.rows_out, c.quarantined, f"{c.seconds:.1f}"] for c in commits],
    )


@main.command()
@click.argument("run_dir")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(run_dir: str, show: bool) -> None:
    """Write RUN_DIR/report.html again from results.json and the committed stages."""
    from nightseg.report import write_report

    folder = Location.of(run_dir)
    if not (folder / "results.json").exists():
        raise UserError(f"{run_dir}: no results.json there. Cure: finish the run first (nightseg run RECIPE).")
    page = write_report(folder, (folder / "results.json").read_json())
    click.echo(page.uri)
    if show and page.is_local:
        webbrowser.open(Path(page.uri).as_uri())


def _cores_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--actors", default=2, show_default=True, type=click.IntRange(1), help="Parallel readers, one CPU each."
    )(command)


def _extractor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--weights", metavar="FILE", help="Weights of the extractor, where it needs a file.")(
        command
    )
    return click.option(
        "--extractor",
        default="inception",
        show_default=True,
        type=click.Choice(["inception", "efficientnet_lite0"]),
        help="Network whose features are compared. inception: pytorch-fid's; efficientnet_lite0: needs no download.",
    )(command)


@main.command()
@click.argument("images")
@click.option("--out", required=True, metavar="FRAMES.parquet", help="The frame table to write.")
@click.option(
    "--margin", default=0.2, show_default=True, type=click.FloatRange(0, 1), help="Closer calls are twilight."
)
@_cores_option
@_json_option
def split(images: str, out: str, margin: float, actors: int, as_json: bool) -> None:
    """Separate a folder of IMAGES into day, night and twilight by their luminance histograms."""
    from nightseg.config import MapCompute
    from nightseg.progress import progress_for
    from nightseg.verbs import split_folder

    result = split_folder(images, out, margin=margin, compute=MapCompute(actors=actors), progress=progress_for())
    answer(result, as_json)


@main.command()
@click.argument("a")
@click.argument("b")
@_extractor_options
@_cores_option
@_json_option
def fid(a: str, b: str, extractor: str, weights: str | None, actors: int, as_json: bool) -> None:
    """Frechet distance between A and B: image folders, frame tables (.parquet) or statistics (.npz)."""
    from nightseg.config import MapCompute
    from nightseg.progress import progress_for
    from nightseg.stages.score import fid as distance

    found = distance(
        a, b, extractor=extractor, weights=weights, compute=MapCompute(actors=actors), progress=progress_for()
    )
    answer(found._asdict(), as_json)


@main.command()
@click.argument("pool")
@click.option("--reference", metavar="REF", help="Images or frame table to be close to; random needs none.")
@click.option("--count", required=True, type=click.IntRange(1), help="How many frames to choose.")
@click.option("--method", default="pooled", show_default=True, type=click.Choice(["pooled", "histogram", "random"]))
@click.option("--out", required=True, metavar="DIR", help="Gets frames.parquet, scores.parquet, evidence.json.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@_extractor_options
@_cores_option
@_json_option
def select(
    pool: str,
    reference: str | None,
    count: int,
    method: Literal["pooled", "histogram", "random"],
    out: str,
    seed: int,
    extractor: Literal["inception", "efficientnet_lite0"],
    weights: str | None,
    actors: int,
    as_json: bool,
) -> None:
    """Choose COUNT frames of POOL (image folder or frame table)."""
    from nightseg.config import MapCompute, Selection
    from nightseg.progress import progress_for
    from nightseg.verbs import select_frames

    choice = Selection(method=method, count=count, extractor=extractor, extractor_weights=weights)
    compute = MapCompute(actors=actors)
    result = select_frames(pool, reference, out, choice=choice, seed=seed, compute=compute, progress=progress_for())
    answer(result, as_json)


@main.command()
@click.argument("predictions")
@click.argument("labels")
@click.option("--taxonomy", required=True, help="cityscapes19, camvid11, or a YAML file.")
@click.option(
    "--absent-class",
    default="cityscapes",
    show_default=True,
    type=click.Choice(["cityscapes", "detectron2"]),
    help="A class that is predicted but not in the labels: counts as IoU 0, or is left out.",
)
@_json_option
def evaluate(
    predictions: str, labels: str, taxonomy: str, absent_class: Literal["cityscapes", "detectron2"], as_json: bool
) -> None:
    """Score a folder of PREDICTIONS (train ids as PNG) against a folder of LABELS of the same names."""
    from nightseg.stages.evaluate import evaluate_folders

    scores = evaluate_folders(Location.of(predictions), Location.of(labels), taxonomy, absent_class)
    if as_json:
        click.echo(json.dumps(scores))
        return
    rows = [[name, "-" if iou is None else f"{100 * iou:.1f}"] for name, iou in scores["iou"].items()]
    rows += [[name, f"{100 * scores[key]:.1f}"] for key, name in METRICS.items()]
    print_table(f"{scores['frames']} frames, percent", ["class", "IoU"], rows)


@main.command()
@click.argument("model")
@click.argument("images")
@click.option("--out", required=True, metavar="DIR")
@click.option("--save", default="mask", show_default=True, metavar="LIST", help="Any of mask,color,overlay,confidence.")
@_json_option
def predict(model: str, images: str, out: str, save: str, as_json: bool) -> None:
    """Segment a folder of IMAGES with MODEL: a model folder, or RUN_DIR:MODEL_NAME of a finished run."""
    from nightseg.progress import progress_for
    from nightseg.results import model_folder
    from nightseg.stages.predict import check_pictures, predict_folder

    pictures = check_pictures([word.strip() for word in save.split(",") if word.strip()])
    result = predict_folder(
        model_folder(model), Location.of(images), Location.of(out), save=pictures, progress=progress_for()
    )
    answer(result, as_json)


@main.command()
@click.argument("search_file", metavar="SEARCH")
@click.option("--set", "overrides", multiple=True, metavar="a.b=c", help="Override one key of the search; repeatable.")
@click.option("--run-dir", metavar="DIR", help="Where the search lies (default: runs/<its name>).")
@_json_option
def search(search_file: str, overrides: tuple[str, ...], run_dir: str | None, as_json: bool) -> None:
    """Search loss and selection of a recipe with Ray Tune; writes best.yaml.

    \b
    nightseg search configs/search.yaml --set trials=16
    tensorboard --logdir runs/search/tune
    """
    from nightseg.progress import progress_for
    from nightseg.search import search as tune

    found = tune(search_file, overrides, run_dir=run_dir, progress=progress_for())
    if as_json:
        click.echo(json.dumps({"best": found.best, "trials": found.trials, "recipe": found.best_recipe.uri}))
        return
    keys = list(found.best["values"])
    rows = [
        [trial["trial"], *(f"{trial['values'][key]:.4g}" for key in keys), percent(trial["miou"]), trial["epochs"]]
        for trial in found.trials
    ]
    print_table(found.folder.uri, ["trial", *keys, "validation mIoU", "epochs"], rows)
    click.echo(f"best recipe: {found.best_recipe.uri}\ntrials: tensorboard --logdir {found.folder.uri}/tune")


@main.command()
@click.option("--cluster", metavar="FILE", help="Also check a cluster.yaml for open doors and unfilled places.")
@_json_option
def doctor(cluster: str | None, as_json: bool) -> None:
    """Check this machine: versions, processor, weights, Ray's token; and a cluster file."""
    from nightseg.doctor import examine

    findings = examine(cluster)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.good else 'FIX '} {finding.what}: {finding.detail}")
    if not all(finding.good for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
