"""Search loss and selection with Ray Tune on a Ray cluster.

    nightseg submit configs/search.yaml --run-dir s3://bucket/runs/search
    ray job submit --working-dir . -- python jobs/search.py configs/search.yaml --run-dir s3://bucket/runs/search

TensorBoard shows the trials: tensorboard --logdir <run-dir>/tensorboard. Submitted again, the job continues.
"""

import argparse
import sys

from nightseg.cli.jobs import job
from nightseg.pipeline.search import search
from nightseg.progress import progress_for


def work(asked: argparse.Namespace) -> str:
    found = search(asked.recipe, asked.overrides, run_dir=asked.run_dir, progress=progress_for())
    best = f"{found.best['label']}, {found.metric} {found.best[found.metric]:.4f}"
    done = f"{found.trainings} trainings, {found.reused} stages re-used"
    return f"best of {len(found.trials)}: {best}; {done}; recipe: {found.best_recipe}; page: {found.page}"


def main() -> int:
    return job(__doc__, work, of_models=False)


if __name__ == "__main__":
    sys.exit(main())
