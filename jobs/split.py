"""Sort the frames of a recipe's pools into day, night and twilight, on a Ray cluster.

    nightseg submit configs/demo.yaml --until split --run-dir s3://bucket/runs/demo
    ray job submit --working-dir . -- python jobs/split.py configs/demo.yaml --run-dir s3://bucket/runs/demo

What it needs is done first, what is committed is skipped; jobs/self_train.py goes on from there.
"""

import sys

from nightseg.cli.jobs import stage_job


def main() -> int:
    return stage_job(__doc__, "split")


if __name__ == "__main__":
    sys.exit(main())
