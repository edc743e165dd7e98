"""Score the models of a recipe on its test sets, on a Ray cluster.

    nightseg submit configs/demo.yaml --until evaluate --run-dir s3://bucket/runs/demo
    ray job submit --working-dir . -- python jobs/evaluate.py configs/demo.yaml --run-dir s3://bucket/runs/demo

What it needs is done first, what is committed is skipped; jobs/self_train.py goes on from there.
"""

import sys

from nightseg.cli.jobs import stage_job


def main() -> int:
    return stage_job(__doc__, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
