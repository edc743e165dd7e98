"""`nightseg VERB`: parse, validate, call ONE function, show what it returned.

Standard output carries the answer (with --json one JSON object), standard error the progress. How answers and errors
look is `output.py`. Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from nightseg.cli import commands
from nightseg.cli.output import (
    Answer,
    Failures,
    answers,
    pass_on,
    print_check,
    print_job,
    print_life,
    print_outcome,
    print_plan,
    print_table,
    print_trials,
    say,
)
from nightseg.progress import printable, progress_for
from nightseg.storage import Location, UserError, Workspace

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=Failures, context_settings=CONTEXT)
@click.version_option(package_name="nightseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--allow-download", is_flag=True, help="Fetch weights that are not on this machine; else it is an error.")
def main(debug: bool, allow_download: bool) -> None:
    """Semantic segmentation that learns to see at night without night labels.

    \b
    nightseg init DAY NIGHT --out mine.yaml     a recipe for your own frames, with what it assumed
    nightseg run configs/demo.yaml              the whole chain on made-up scenes, in minutes
    nightseg run configs/camvid.yaml --dry-run  what a recipe would do
    nightseg predict runs/demo:adapted IMAGES --out masks

    Exit code 0: done, 1: the work failed, 2: the request was wrong. Every verb has --help.
    """


_set_option = click.option("--set", "overrides", multiple=True, metavar="a.b=c", help="Override one key; repeatable.")
_page_option = click.option("--out", metavar="FILE", help="Write the page here  [default: in RUN_DIR].")


def _page(write: Callable[..., Location], out: str | None) -> Location:
    """The page that was written, where it was asked for."""
    try:
        return write(place=None if out is None else Location.of(out))
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        cure = "give the page another place with --out FILE, such as --out /tmp/page.html"
        raise UserError(error.what, cure=cure) from error


@main.command()
@click.argument("recipe", type=click.Path())
@_set_option
@click.option("--run-dir", metavar="DIR", help="Where the run lies (default: runs/<recipe name>); also s3://, gs://.")
@click.option("--only", metavar="MODEL", help="Only this model, and what it needs.")
@click.option("--until", metavar="STAGE", help="Only this stage and what it needs, such as score; without a report.")
@click.option("--log", multiple=True, metavar="TRACKER", help="mlflow or wandb gets the finished run; repeatable.")
@click.option("--dry-run", is_flag=True, help="Check, and print the graph: what would run, frames, resources.")
@answers
def run(
    recipe: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    only: str | None,
    until: str | None,
    log: tuple[str, ...],
    dry_run: bool,
) -> Answer:
    """Run a recipe to its report.

    What is committed is skipped, what was interrupted continues. A model that fails stops only those that need it: the
    others are in the report, and the exit code is 1.

    \b
    nightseg run configs/demo.yaml
    nightseg run configs/camvid.yaml --set roots.camvid=/data/camvid --dry-run
    nightseg run configs/demo.yaml --set training.batch=4      of every model that does not say its own
    nightseg run configs/demo.yaml --until score   features of frames, and what they need
    nightseg run configs/translators.yaml     ways from day to night, measured side by side
    """
    from nightseg.pipeline.check import check
    from nightseg.pipeline.plan import plan
    from nightseg.pipeline.results import planned_rows
    from nightseg.pipeline.run import adapt, run_folder, work_until
    from nightseg.recipe import load_recipe, told_of

    if dry_run:
        loaded = load_recipe(recipe, overrides)
        folder = run_folder(loaded.name, run_dir)
        with told_of(recipe, overrides):
            found = check(loaded, folder, only=only, is_measured=False, progress=progress_for())
            lines, warnings = plan(loaded, folder, only=only, until=until, built=found.graph), found.warnings
            rows = [] if until else planned_rows(loaded, found.graph)
        stages = [line._asdict() | {"node": str(line.node)} for line in lines]
        content = {"run_dir": folder.uri, "stages": stages, "rows": rows, "warnings": warnings}
        return Answer(content, partial(print_plan, folder, lines, warnings, rows))
    if until:
        if log:
            raise UserError("run: --log gets a finished run, and --until ends before", cure="give one of the two")
        place, outcome = work_until(recipe, overrides, stage=until, run_dir=run_dir, only=only, progress=progress_for())
        return Answer({"run_dir": place.uri, "done": outcome.done, "skipped": outcome.skipped})
    adapted = adapt(recipe, overrides, run_dir=run_dir, only=only, log=log, progress=progress_for())
    return Answer(adapted.outcome.results, partial(print_outcome, adapted), errors=adapted.failure)


@main.command(name="check")
@click.argument("recipe", type=click.Path())
@_set_option
@click.option("--run-dir", metavar="DIR", help="Where the run will lie (default: runs/<recipe name>).")
@click.option("--only", metavar="MODEL", help="Only this model, and what it needs.")
@click.option("--frames", default=24, type=click.IntRange(min=1), help="Read at most so many frames of each folder.")
@click.option("--page", metavar="FILE.html", help="Write a page with what was found, and eight frames with labels.")
@answers
def check_recipe(
    recipe: str, overrides: tuple[str, ...], run_dir: str | None, only: str | None, frames: int, page: str | None
) -> Answer:
    """Check a recipe and its folders.

    Some frames of each folder are read; nothing is written but the page. Exit code 2 with all that a run would refuse.

    \b
    nightseg check configs/demo.yaml
    nightseg check configs/camvid.yaml --set roots.camvid=/data/camvid --page check.html
    """
    from nightseg.data.class_list import taxonomy
    from nightseg.pipeline.check import check
    from nightseg.pipeline.run import run_folder
    from nightseg.recipe import load_recipe, told_of
    from nightseg.report.check_page import check_page

    loaded = load_recipe(recipe, overrides)
    with told_of(recipe, overrides):
        found = check(loaded, run_folder(loaded.name, run_dir), only=only, most=frames, progress=progress_for())
    if page is not None:
        shown = (found.sentences(), found.warnings, found.overlays, taxonomy(loaded.taxonomy))
        Location.of(page).write_bytes(check_page(f"Check of {recipe}", *shown).encode())
    content = found._asdict() | {"page": page}
    del content["overlays"], content["graph"]
    return Answer(content, partial(print_check, found, page))


@main.command(name="recipe")
@click.argument("recipe_file", metavar="[RECIPE]", required=False)
@_set_option
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes instead, for editors.")
@answers
def show_recipe(recipe_file: str | None, overrides: tuple[str, ...], schema: bool) -> Answer:
    """Print a recipe with all that it does not say.

    It is shown as it is after base, presets, --set, what models inherit, and defaults.

    Without RECIPE: every key, with its type, default, unit and meaning.

    \b
    nightseg recipe configs/demo.yaml --set training.epochs=3
    nightseg recipe | grep epochs
    nightseg recipe --schema > recipe.schema.json

    An editor with a YAML language server checks a recipe beside that file which begins with the line
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    from nightseg.recipe import load_recipe, reference
    from nightseg.recipe.load import as_it_is, as_yaml

    if (recipe_file or overrides) and (schema or not recipe_file):
        raise UserError(
            "recipe: --schema and the list of keys are of all recipes", cure="give RECIPE and --set, or none"
        )
    if schema:
        content = reference.editor_schema()
        return Answer(content, lambda: click.echo(json.dumps(content, indent=1)))
    if recipe_file:
        content = as_it_is(load_recipe(recipe_file, overrides))
        return Answer(content, lambda: click.echo(as_yaml(content), nl=False))
    keys = reference.all_keys()

    def show() -> None:
        for key in keys:
            type_and_default = f" ({key.type}; default {key.default})" if key.default else ""
            click.echo(f"{key.key}{type_and_default.replace('default required', 'required')}: {key.description}")

    return Answer({"keys": [key._asdict() for key in keys]}, show)


def _existing_run(run_dir: str) -> Location:
    folder = Location.of(run_dir)
    if not folder.is_folder():
        raise UserError(f"{run_dir}: there is no such run folder", cure="give the folder that `nightseg run` wrote")
    if not (folder / "stages").is_folder() and not (folder / "recipe.yaml").exists():
        raise UserError(f"{run_dir}: not a run folder, it has neither stages nor recipe.yaml", cure="give RUN_DIR")
    return folder


@main.command()
@click.argument("run_dir")
@answers
def status(run_dir: str) -> Answer:
    """Show what a run has committed, and who works on it.

    The last column says which results a stage is part of: those of the last recipe (results.json), or earlier ones.

    \b
    nightseg status runs/demo
    """
    from nightseg.pipeline.folder import owners
    from nightseg.pipeline.results import last_failures, told

    folder = _existing_run(run_dir)
    commits, holder, known = Workspace(folder).commits(), Workspace(folder).holder(), owners(folder)
    keys = ("stage", "name", "key", "created", "seconds", "rows_in", "rows_out", "quarantined")
    parts = [known.get((f"{commit.stage}/{commit.name}", commit.key), []) for commit in commits]
    rows = [{key: getattr(c, key) for key in keys} | {"results": of} for c, of in zip(commits, parts, strict=True)]
    failed = last_failures(folder)

    def show() -> None:
        print_table(
            f"{folder}: {'being worked on by ' + holder if holder else 'no driver at work'}",
            ["stage", "committed", "frames in", "out", "quarantined", "seconds", "part of"],
            [
                [
                    f"{c.stage}/{c.name}",
                    c.created[:19],
                    c.rows_in,
                    c.rows_out,
                    c.quarantined,
                    f"{c.seconds:.1f}",
                    ", ".join(of) or "nothing finished",
                ]
                for c, of in zip(commits, parts, strict=True)
            ],
        )
        for sentence in told(failed):
            click.echo(printable(sentence))

    return Answer({"run_dir": folder.uri, "holder": holder, "commits": rows, "failed": failed}, show)


@main.command()
@click.argument("run_dir")
@answers
def verify(run_dir: str) -> Answer:
    """Find damaged files of a run.

    Reads every committed file again, the results and the copy of the recipe, and compares their sha256. Exit code 1 if
    one is damaged; `nightseg run` makes it again.

    \b
    nightseg verify runs/demo
    """
    from nightseg.pipeline.verify import verify as read_all

    folder = _existing_run(run_dir)
    found = read_all(folder, progress=progress_for())
    damaged = [damage._asdict() for damage in found.damaged]
    content = found._asdict() | {"run_dir": folder.uri, "good": not damaged, "damaged": damaged}

    def show() -> None:
        if damaged:
            rows = [[damage.path, damage.expected, damage.seen] for damage in found.damaged]
            print_table(f"{folder}: damaged files", ["file", "expected", "seen"], rows)
        click.echo(f"{found.files} files of {found.commits} commits read, {found.bytes} bytes: {len(damaged)} damaged")

    return Answer(content, show, code=1 if damaged else 0)


@main.command()
@click.argument("run_dir")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@_page_option
def report(run_dir: str, show: bool, out: str | None) -> None:
    """Write the report of a finished run again.

    It is made from RUN_DIR/results.json and the committed stages alone.

    \b
    nightseg report runs/demo --open
    nightseg report /mnt/read-only/demo --out demo.html
    """
    from nightseg.pipeline.results import read_results
    from nightseg.report import write_report

    folder = Location.of(run_dir)
    results = read_results(folder)
    page = _page(partial(write_report, folder, results), out)
    click.echo(page.uri)
    if show and page.is_local:
        webbrowser.open(Path(page.uri).as_uri())


@main.command()
@click.argument("run_dir")
@click.argument("frame", metavar="[FRAME_ID]", required=False)
@click.option("--model", metavar="MODEL", help="Only what this model has to do with it.")
@click.option("--open", "show", is_flag=True, help="Write a page with pictures, and open it in the browser.")
@_page_option
@answers
def explain(run_dir: str, frame: str | None, model: str | None, show: bool, out: str | None) -> Answer:
    """Tell the life of a frame.

    Where it came from, how it was split, scored, chosen and labelled, which models learned from it, what they see in
    it. FRAME_ID is an id, a file or the end of either. Without it: the ids of all frames of the run.

    \b
    nightseg explain runs/demo pool/001234
    nightseg explain runs/demo night_test/005000 --model adapted --open
    nightseg explain runs/demo | grep pool
    """
    from nightseg.pipeline.results import results_so_far
    from nightseg.report.life import frame_ids, life_of
    from nightseg.report.life_page import life_page

    folder = _existing_run(run_dir)
    results = results_so_far(folder)
    if frame is None:
        if model is not None or show or out is not None:
            raise UserError("explain: --model, --open and --out are of one frame", cure="give FRAME_ID")
        ids = frame_ids(folder, results)
        return Answer({"run_dir": folder.uri, "frames": ids}, lambda: click.echo("\n".join(map(printable, ids))))
    life = life_of(folder, results, frame, model)
    page = None
    if show or out is not None:
        page = _page(partial(life_page, folder, results, life), out)
    if show and page is not None and page.is_local:
        webbrowser.open(Path(page.uri).as_uri())
    content = {"run_dir": folder.uri, **life._asdict(), "page": None if page is None else page.uri}
    return Answer(content, partial(print_life, life, page))


@main.command()
@click.argument("search_file", metavar="SEARCH")
@_set_option
@click.option("--run-dir", metavar="DIR", help="Where the search lies (default: runs/<its name>).")
@click.option("--log", multiple=True, metavar="TRACKER", help="mlflow or wandb gets the finished search; repeatable.")
@click.option("--open", "is_open", is_flag=True, help="TensorBoard on this machine meanwhile, and the page at the end.")
@answers
def search(
    search_file: str, overrides: tuple[str, ...], run_dir: str | None, log: tuple[str, ...], is_open: bool
) -> Answer:
    """Search loss and selection of a recipe (Ray Tune).

    Trials are compared on a validation set; the best recipe is written to best.yaml, what was learned to search.html.
    Given again, the search continues.

    \b
    nightseg search configs/search.yaml --set trials=16 --open
    tensorboard --logdir runs/search/tensorboard
    """
    from nightseg.cli.boards import boards
    from nightseg.pipeline.search import search as tune

    with boards(is_open, say) as watched:
        found = tune(search_file, overrides, run_dir=run_dir, log=log, progress=progress_for(), watched=watched)
    if is_open and found.page is not None and found.page.is_local:
        webbrowser.open(Path(found.page.uri).as_uri())
    content = {"best": found.best, "trials": found.trials, "recipe": found.best_recipe.uri}
    numbers = {"trainings": found.trainings, "reused": found.reused}
    page = {} if found.page is None else {"page": found.page.uri}
    return Answer(content | numbers | page, partial(print_trials, found))


@main.command()
@click.argument("recipe", type=click.Path())
@_set_option
@click.option("--run-dir", metavar="DIR", help="Where the run lies, as all nodes see it: s3://, gs://, or on NFS.")
@click.option("--only", metavar="MODEL", help="Only this model, and what it needs.")
@click.option("--until", metavar="STAGE", help="Only this stage and what it needs: jobs/STAGE.py.")
@click.option("--address", metavar="URL", help="Of the cluster's dashboard.  [default: http://127.0.0.1:8265]")
@click.option("--no-wait", is_flag=True, help="Do not follow the log.")
@click.option("--max-tries", default=1, type=click.IntRange(1), help="Submit it again, up to so often, if it dies.")
@answers
def submit(recipe: str, no_wait: bool, max_tries: int, **asked: Any) -> Answer:
    """Run a recipe or a search as a job of a Ray cluster.

    This code, the recipe and the files that it names are uploaded; frames lie on shared storage. The log is followed:
    Ctrl-C leaves the job at work. Given again, the command follows it, or continues where the last one ended. The token
    is that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    \b
    nightseg submit configs/demo.yaml --run-dir s3://BUCKET/runs/demo
    nightseg submit configs/demo.yaml --until score --run-dir s3://BUCKET/runs/demo
    nightseg submit configs/search.yaml --run-dir s3://BUCKET/runs/search --max-tries 3
    """
    from nightseg.cli.jobs import words_of_job
    from nightseg.pipeline.submit import submit as start

    if no_wait and max_tries > 1:
        raise UserError("submit: --max-tries follows the job, and --no-wait does not", cure="give one of the two")
    job, work = start(
        recipe, wait=not no_wait, max_tries=max_tries, words=words_of_job, say=say, write=pass_on, **asked
    )
    code = 0 if job.status == "SUCCEEDED" or no_wait else job.exit_code if job.exit_code in (1, 2) else 1
    return Answer(job._asdict() | {"run_dir": work}, partial(print_job, job, work), code)


@main.command()
@click.option("--cluster", metavar="FILE", help="Also check a cluster.yaml for open doors and unfilled places.")
@answers
def doctor(cluster: str | None) -> Answer:
    """Check this machine, and a cluster file.

    Versions, processor, disk, weights, Ray's token. Exit code 1 if something should be mended.

    \b
    nightseg doctor --cluster cluster.yaml
    """
    from nightseg.cli.doctor import examine

    findings = examine(cluster)
    good = all(finding.good for finding in findings)

    def show() -> None:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.good else 'FIX '} {finding.what}: {finding.detail}")

    content = {"good": good, "findings": [finding._asdict() for finding in findings]}
    return Answer(content, show, code=0 if good else 1)


for verb in ("init", "split", "fid", "select", "evaluate", "predict", "convert", "export"):
    main.add_command(getattr(commands, verb))


if __name__ == "__main__":
    main()
