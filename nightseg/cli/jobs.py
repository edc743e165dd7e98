"""What the files of jobs/ share. Each calls the function of its verb of the command line, as the driver on a cluster.

The driver runs inside the job, so a relative run folder would vanish with the job's working directory: without
--run-dir the run goes to ~/nightseg-runs/<its name> on the head node.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# `python jobs/x.py` puts jobs/ before the standard library, whose `select` is not jobs/select.py.
if (Path(sys.path[0]) / "pseudo_label.py").is_file():
    del sys.path[0]

from nightseg.cli.output import explained
from nightseg.pipeline import run
from nightseg.progress import progress_for


def job(doc: str | None, work: Callable[[argparse.Namespace], str], *, of_models: bool = True) -> int:
    """The exit code of a job: 0, or 2 and the reason if the request is wrong; other errors are raised.

    `work` is given the words of the command line, and returns what is printed at the end.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--run-dir", metavar="DIR")
    if of_models:
        parser.add_argument("--only", metavar="MODEL")
    asked = parser.parse_args()
    os.environ.setdefault("NIGHTSEG_RUNS", str(Path.home() / "nightseg-runs"))
    try:
        print(work(asked))
    except Exception as error:
        code, message = explained(error)
        if code != 2:
            raise
        print(f"nightseg: {message}", file=sys.stderr)
        return code
    return 0


def words_of_job(run_dir: str | None, only: str | None) -> list[str]:
    """How a job is told its run folder and model."""
    return [*(["--run-dir", run_dir] if run_dir else []), *(["--only", only] if only else [])]


def stage_job(doc: str | None, stage: str) -> int:
    """The job of one stage of a recipe, and of what it needs."""

    def work(asked: argparse.Namespace) -> str:
        words = {"run_dir": asked.run_dir, "only": asked.only, "progress": progress_for()}
        folder, outcome = run.work_until(asked.recipe, asked.overrides, stage=stage, **words)
        return f"{folder}: {outcome.done} stages done, {outcome.skipped} already committed"

    return job(doc, work)
