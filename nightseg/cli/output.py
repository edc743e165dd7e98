"""How the command line shows answers and errors. Exit code 0: done, 1: the work failed, 2: the request was wrong."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from nightseg.cli.boards import words_of
from nightseg.cli.greeting import greeting_of
from nightseg.errors import closest
from nightseg.networks.downloads import allow_downloads
from nightseg.progress import printable
from nightseg.storage import Location, UserError
from nightseg.storage.credentials import hide_credentials
from nightseg.storage.stores import fault_of_store

if TYPE_CHECKING:
    from nightseg.cluster.submit import Job
    from nightseg.pipeline.check import Checked
    from nightseg.pipeline.plan import Planned
    from nightseg.pipeline.run import Adapted
    from nightseg.pipeline.search import Found
    from nightseg.recipe.starter import Starter
    from nightseg.report.life import Life

METRICS = {"miou": "mIoU", "pa": "PA", "ca": "CA", "fwiou": "FWIoU"}
STATES = {"committed": "green", "runs": "yellow", "continues": "cyan", "waits": ""}
EVERYWHERE = ("--debug", "--allow-download")  # options that are understood wherever they stand
OTHER_NAMES = {  # what other programs call it -> the verb here
    "train": "run", "trian": "run", "fit": "run", "start": "run", "demo": "run", "val": "evaluate", "eval": "evaluate",
    "test": "evaluate", "score": "evaluate", "infer": "predict", "inference": "predict", "segment": "predict",
    "tune": "search", "sort": "split", "ls": "status", "info": "status", "onnx": "export", "new": "init",
    "create": "init", "validate": "check", "lint": "check", "config": "recipe", "install": "doctor", "remote": "submit",
    "why": "explain", "trace": "explain", "inspect": "explain", "frame": "explain", "provenance": "explain",
}  # fmt: skip
PIPE_WIDTH = 160  # of a table that no terminal limits


class Verbs(click.Group):
    """A word that is no verb is answered with the verb that was probably meant."""

    def resolve_command(self, context: click.Context, words: list[str]) -> Any:
        name = words[0]
        if self.get_command(context, name) is None and not name.startswith("-"):
            hint = closest(name.lower(), self.list_commands(context)) or _meant_by(self, name)
            known = ", ".join(self.list_commands(context))
            context.fail(f"No such command {name!r}{hint or f'; known: {known}'}")
        return super().resolve_command(context, words)


def _meant_by(group: click.Group, name: str) -> str:
    """What somebody wants who names a recipe, or what other programs call a verb of this one."""
    if name.lower().endswith((".yaml", ".yml")):
        verb = "run"
        name = f"run {name}"
    else:
        verb = name = OTHER_NAMES.get(name.lower(), "")
    return f", did you mean {name!r}?" if verb in group.commands else ""


class Failures(Verbs):
    """Turns exceptions into one readable message and an exit code; --debug adds the traceback."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        greeting: threading.Timer = extra.pop("greeting", None) or greeting_of(words)
        if args is None and greeting.ident is None:  # a command, not a test
            greeting.start()
        if args is None:
            signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: batch systems and `timeout` stop programs so
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # `nohup` has it ignored
                signal.signal(signal.SIGHUP, _hang_up)
        debug = "--debug" in words
        if "--allow-download" in words:
            allow_downloads()
        words = [word for word in words if word not in EVERYWHERE]
        try:
            return super().main(words, **(extra | {"standalone_mode": False}))
        except click.ClickException as error:
            vars(error)["message"] = hide_credentials(error.message)
            error.show()
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            if args is None:  # called from Python, the process goes on
                _end_at_once_when_asked_again()
            say("nightseg: stopped; the same command continues where this one ended.")
            sys.exit(1)
        except BrokenPipeError:  # `nightseg status ... | head`: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
            sys.exit(1)
        except Exception as error:
            if debug:
                traceback.print_exc()
            code, message = explained(error)
            say(f"nightseg: {message}" + ("" if code == 2 or debug else "\n(--debug shows where)"))
            sys.exit(code)
        finally:
            greeting.cancel()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _hang_up(*_: Any) -> None:
    """The terminal is gone. A shell passes that on to its jobs, which the system has told already: once is enough."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_at_once_when_asked_again() -> None:
    """The work has stopped, what is left is to clear up: another Ctrl-C ends that, too, and prints nothing.

    Python would show a traceback of wherever it is by then: a thread that is waited for, a function of `atexit`.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: os._exit(1))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nobody asks: only the terminal is gone


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and message. What the user may not read, or what is no folder, is as wrong a request as any other."""
    if isinstance(error, UserError):
        return 2, hide_credentials(str(error))
    if isinstance(error, OSError) and (told := fault_of_store(error)) is not None:
        return 2, str(told)
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}. Cure: another path, or the rights to read it."
    if isinstance(error, ExceptionGroup):
        return 1, error.message
    return 1, f"{type(error).__name__}: {error}"


def say(message: str) -> None:
    """To standard error, without control characters that a file's name may hold, and without credentials."""
    click.echo("\n".join(map(printable, hide_credentials(message).split("\n"))), err=True)


def pass_on(log: str) -> None:
    """A part of a log of another machine to standard error, as it is but for control characters."""
    click.echo("\n".join(map(printable, log.split("\n"))), nl=False, err=True)


class Answer(NamedTuple):
    """What a verb answers: the object of --json, how people see it (None: a line a key), the exit code, and what went
    wrong all the same."""

    content: Mapping[str, Any]
    show: Callable[[], None] | None = None
    code: int = 0
    errors: ExceptionGroup[Exception] | None = None


def answers(command: Callable[..., Answer | dict[str, Any]]) -> Callable[..., None]:
    """Gives a verb that returns its answer the option --json.

    Standard output carries the answer and nothing else: what a library prints meanwhile goes to standard error.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
    @functools.wraps(command)
    def verb(*, as_json: bool, **options: Any) -> None:
        with redirect_stdout(sys.stderr):
            found = command(**options)
        content, show, code, errors = found if isinstance(found, Answer) else Answer(found)
        if as_json:
            click.echo(json.dumps(content, allow_nan=False))
        else:
            show() if show else print_lines(content)
        if errors is not None:
            raise errors
        if code:
            sys.exit(code)

    return verb


def print_lines(answer: Mapping[str, Any]) -> None:
    for key, value in answer.items():
        click.echo(printable(f"{key}: {_words(value)}"))


def _words(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.6g}"
        case Mapping():
            return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "-"
        case list() | tuple():
            return ", ".join(map(_words, value)) or "-"
        case _:
            return str(value)


def print_starter(starter: Starter) -> None:
    click.echo(f"wrote {', '.join(map(printable, starter.files))}")
    for title, lines in (("assumed", starter.assumed), ("to check", starter.to_check)):
        if lines:
            click.echo(f"{title}:")
            click.echo("\n".join(printable(f"  - {line}") for line in lines))
    click.echo(f"next: nightseg check {printable(shlex.quote(starter.recipe))}")


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def print_check(found: Checked, page: str | None) -> None:
    for sentence in found.sentences():
        click.echo(printable(sentence))
    for warning in found.warnings:
        click.echo(printable(f"look at this: {warning}"))
    if page:
        click.echo(printable(f"frames with their labels: {page}"))
    click.echo("nothing is in the way of a run")


def print_life(life: Life, page: Location | None) -> None:
    from nightseg.report.life_page import lines

    told = lines(life)
    width = max(len(what) for what, _ in told)
    before = ""
    for what, text in told:
        click.echo(printable(f"{'' if what == before else what:<{width}}  {text}"))
        before = what
    if page is not None:
        click.echo(f"page: {page}")


def print_job(job: Job, work: str) -> None:
    tries = f" in try {job.tries}" if job.tries > 1 else ""
    reason = f" ({job.message})" if job.status == "FAILED" and job.message else ""
    click.echo(printable(f"job {job.id}: {job.status}{tries}{reason}; its run: {work}"))
    if job.status in ("PENDING", "RUNNING"):
        where = f"--address {shlex.quote(job.address)}"
        click.echo("it goes on without this command; the same command follows it again. Or:")
        click.echo(f"  RAY_AUTH_MODE=token ray job logs --follow {where} {job.id}")
        click.echo(f"  RAY_AUTH_MODE=token ray job stop {where} {job.id}")


def print_plan(
    folder: Location,
    lines: Sequence[Planned],
    warnings: Sequence[str] = (),
    published: Sequence[Mapping[str, Any]] = (),
) -> None:
    from rich.text import Text

    for warning in warnings:
        click.echo(printable(f"look at this: {warning}"))

    rows = [
        [
            line.node,
            Text("runs later" if line.state == "waits" else line.state, STATES[line.state]),
            "?" if line.rows is None else line.rows,
            line.resources,
            ", ".join(line.changed),
        ]
        for line in lines
    ]
    print_table(
        f"run folder {folder}", ["stage", "state", "frames", "resources", "changed since the last commit"], rows
    )
    if published:
        columns = ["row", "model", "test set", "after", "frames to learn from", "published mIoU"]
        print_table("published rows that it reproduces", columns, [_published(row) for row in published])


def _published(row: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {'?' if count is None else f'{count:,}'}" for name, count in row["frames"].items())
    miou = row["published_miou"]
    return [row["row"], row["model"], row["test"], ", ".join(row["parents"]), sizes, "" if miou is None else f"{miou}"]


def print_outcome(adapted: Adapted) -> None:
    from nightseg.report import Run, headline, model_to_use

    outcome = adapted.outcome
    run = Run(adapted.folder, outcome.results)
    print_scores(outcome.results)
    if found := headline(run):
        click.echo(printable(str(found)))
    click.echo(
        f"{outcome.done} stages done, {outcome.skipped} already committed, {outcome.seconds:.0f} s. "
        f"Report: {adapted.report}"
    )
    if outcome.results["models"]:
        _print_use(adapted, model_to_use(run))


def _print_use(adapted: Adapted, model: str) -> None:
    """Commands as they can be given, from here."""
    run = str(adapted.folder).removeprefix(f"{os.getcwd()}/")
    place, curves = f"{run}:{model}", f"{run}/{'tensorboard' if adapted.folder.is_local else 'stages'}"
    for what, how in {
        "Segment your frames": f"nightseg predict {shlex.quote(place)} IMAGES --out masks --save mask,overlay",
        "In Python": f'nightseg.load_model("{place}")',
        "Weights and card": f"{run}/models/{model}, beside masks, chosen frames and tables",
        "Curves": f"tensorboard --logdir {shlex.quote(curves)}",
    }.items():
        click.echo(printable(f"{what + ':':21}{how}"))


def print_scores(results: Mapping[str, Any]) -> None:
    rows = [
        [model, facts.get("steps_in_all", ""), test, *(_score(scores, key) for key in METRICS),
         "" if scores["published_miou"] is None else f"{scores['published_miou']:.1f}"]
        for model, facts in results["models"].items()
        for test, scores in facts["tests"].items()
    ]  # fmt: skip
    if rows:
        seeds = max(
            len(scores.get("seeds", [])) for facts in results["models"].values() for scores in facts["tests"].values()
        )
        title = f"percent, mean \N{PLUS-MINUS SIGN} standard deviation of {seeds} seeds" if seeds > 1 else "percent"
        print_table(title, ["model", "steps in all", "test set", *METRICS.values(), "published mIoU"], rows)
    translated = [
        [name, found["kind"], f"{found['fid']['translated']:.2f}", f"{1000 * found['kid']['translated']:.2f}",
         percent(found["survival"]), percent(found["agreement"]["pixels"]), f"{found['edges']:.2f}"]
        for name, found in results.get("translations", {}).items()
    ]  # fmt: skip
    if translated:
        columns = ["translation", "kind", "FID", "KID x 1000", "labels survive", "pixels agree", "edges"]
        print_table("translations; percent, but for distances and edges", columns, translated)


def _score(scores: Mapping[str, Any], key: str) -> str:
    """The mean over the seeds, with its deviation where there are several."""
    std = scores.get("std", {}).get(key)
    return percent(scores.get("mean", scores)[key]) + ("" if std is None else f" \N{PLUS-MINUS SIGN} {percent(std)}")


def print_split(done: Mapping[str, Any], margin: float) -> None:
    counts = done["domains"]
    total = sum(counts.values())
    for name, count in counts.items():
        click.echo(f"{name}: {count} frames, {100 * count / total:.1f} % of {total}")
    lines = [
        "score (-1 to 1): how light is spread over the frame, sky and street; 1 as by day, -1 as by night",
        "margin (0 to 1): how clear that is; 0 = as near to day as to night, or twilight",
        f"twilight: nearest to dusk, or a margin below {margin:g}; unknown: without colour, as of an infrared camera",
    ]
    click.echo("\n".join(lines))
    if done["quarantined"]:
        click.echo(f"{done['quarantined']} frames could not be read: they stand in the .quarantine.parquet beside it")
    click.echo(printable(f"frame table: {done['frames']} (look at borderline frames in its .evidence.json)"))


def print_selection(done: Mapping[str, Any]) -> None:
    fid = done["fid"]
    click.echo(f"{done['chosen']} of {done['pool']} frames, by the method {done['method']}")
    if fid["selection"] is not None:
        click.echo("distances (FID) to the reference; smaller = more alike, 0 = the same:")
        click.echo(f"  {fid['selection']:.4g}  the chosen frames")
        spread = f"{fid['random_mean']:.4g} \N{PLUS-MINUS SIGN} {fid['random_sd']:.2g}"
        click.echo(f"  {spread}  as many frames at random, {fid['random_draws']} times: what a choice has to beat")
        if fid["random_sd"] > 0:
            ahead = (fid["random_mean"] - fid["selection"]) / fid["random_sd"]
            click.echo(f"  so the choice is {abs(ahead):.1f} standard deviations {'better' if ahead > 0 else 'worse'}")
    if fid["pool"] is not None:
        why = "" if fid["selection"] is None else "; few frames have a larger FID than many, so it is no yardstick"
        click.echo(f"  {fid['pool']:.4g}  the whole pool{why}")
    if fid["lower_bound"] is not None:
        click.echo(
            f"  no choice of this size can have less than {fid['lower_bound']:.4g}, and this one has "
            f"{fid['selection_biased']:.4g} (both with the covariance divided by the number of frames)"
        )
    if fid["selection"] is None and fid["pool"] is None:
        click.echo("no distances: there was no reference")
    click.echo(printable(f"{done['out']}: frames.parquet (best first), scores.parquet (the whole pool), evidence.json"))


def print_folder_scores(scores: Mapping[str, Any]) -> None:
    bands = scores.get("boundary", {"iou": {}})
    rows = [[name, percent(iou), percent(bands["iou"].get(name))] for name, iou in scores["iou"].items()]
    rows += [[name, percent(scores[key]), percent(bands.get(key))] for key, name in METRICS.items()]
    columns = ["class", "IoU", "boundary IoU"][: 3 if "boundary" in scores else 2]
    print_table(
        f"{scores['frames']} frames, percent; labels read as {scores['label_encoding']}",
        columns,
        [row[: len(columns)] for row in rows],
    )


def print_trials(found: Found) -> None:
    from nightseg.report.formatting import plain, plural, short_names

    short = short_names(found.trials[0]["values"])
    kind, _, name = found.metric.partition(".")
    rows = [
        [
            trial["trial"],
            *(plain(trial["values"][key]) for key in short),
            _score({kind: trial[found.metric], "std": {kind: trial.get("std")}}, kind),
            trial["epochs"],
            trial["end"],
        ]
        for trial in found.trials
    ]
    score = f"IoU of {name}" if name else METRICS[kind]
    print_table(str(found.folder), ["trial", *short.values(), score, "epochs", "end"], rows)
    for trial in found.trials:
        if trial["error"]:
            say(f"trial {trial['trial']} failed: {trial['error']}")
    click.echo(f"{plural(found.trainings, 'training')}, {plural(found.reused, 'stage')} re-used")
    click.echo(f"best recipe: {found.best_recipe}\ntrials: {shlex.join(words_of(found.folder))}")
    if found.page is not None:
        click.echo(f"page: {found.page}")


def print_export(made: Mapping[str, Any]) -> None:
    rows = [
        [
            f"{check['batch']} x {check['height']} x {check['width']}",
            f"{check['max_abs_difference']:.2g}",
            f"{100 * check['label_agreement']:.3f}",
            f"{100 * check['segmenter_agreement']:.3f}",
        ]
        for check in made["checks"]
    ]
    columns = ["frames", "max difference from PyTorch", "labels equal, %", "equal to nightseg predict, %"]
    print_table("checked in onnxruntime", columns, rows)
    print_lines({key: value for key, value in made.items() if key != "checks"})


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Cells are shown as they are: a name with square brackets or control characters changes nothing around it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    click.echo(printable(title))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
