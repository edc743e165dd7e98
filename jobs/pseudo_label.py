"""Label the chosen frames of a recipe with its teachers, on a Ray cluster.

    nightseg submit configs/demo.yaml --until pseudo_label --run-dir s3://bucket/runs/demo
    ray job submit --working-dir . -- python jobs/pseudo_label.py configs/demo.yaml --run-dir s3://bucket/runs/demo

What it needs is done first, what is committed is skipped; jobs/self_train.py goes on from there.
"""

import sys

from nightseg.cli.jobs import stage_job


def main() -> int:
    return stage_job(__doc__, "pseudo_label")


if __name__ == "__main__":
    sys.exit(main())
