"""Run a recipe, all rounds, to its report, on a Ray cluster.

    nightseg submit configs/demo.yaml --run-dir s3://bucket/runs/demo
    ray job submit --working-dir . -- python jobs/self_train.py configs/demo.yaml --run-dir s3://bucket/runs/demo

Submitted again, the job continues.
"""

import argparse
import sys

from nightseg.cli.jobs import job
from nightseg.pipeline.run import adapt
from nightseg.progress import progress_for


def work(asked: argparse.Namespace) -> str:
    done = adapt(asked.recipe, asked.overrides, run_dir=asked.run_dir, only=asked.only, progress=progress_for())
    told = f"{done.folder}: {done.outcome.done} stages done, {done.outcome.skipped} already committed"
    if done.failure is not None:
        print(told)
        raise done.failure
    return told


def main() -> int:
    return job(__doc__, work)


if __name__ == "__main__":
    sys.exit(main())
