"""Search loss and selection with Ray Tune on a Ray cluster.

    nightseg submit configs/search.yaml --run-dir s3://bucket/runs/search
    ray job submit --working-dir . -- python jobs/search.py configs/search.yaml --run-dir s3://bucket/runs/search

TensorBoard shows the trials: tensorboard --logdir <run-dir>/tune. Submitted again, the job continues.
"""

import argparse
import sys

from nightseg.cli.jobs import job
from nightseg.pipeline.search import search
from nightseg.progress import progress_for


def work(asked: argparse.Namespace) -> str:
    found = search(asked.recipe, asked.overrides, run_dir=asked.run_dir, progress=progress_for())
    return f"best of {len(found.trials)}: {found.best}; recipe: {found.best_recipe}"


def main() -> int:
    return job(__doc__, work, of_models=False)


if __name__ == "__main__":
    sys.exit(main())
