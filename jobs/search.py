"""Search loss and selection with Ray Tune on a Ray cluster.

    ray job submit --working-dir . -- python jobs/search.py configs/search.yaml --run-dir s3://bucket/runs/search

TensorBoard shows the trials: tensorboard --logdir <run-dir>/tune. Without --run-dir the search goes to
~/nightseg-runs/<its name> on the head node. Submitted again, the job continues.
"""

import argparse
import os
import sys
from pathlib import Path

from nightseg.pipeline.search import search
from nightseg.progress import progress_for
from nightseg.storage import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--run-dir", metavar="DIR")
    args = parser.parse_args()
    os.environ.setdefault("NIGHTSEG_RUNS", str(Path.home() / "nightseg-runs"))
    try:
        found = search(args.search, args.overrides, run_dir=args.run_dir, progress=progress_for())
    except UserError as error:
        print(f"nightseg: {error}", file=sys.stderr)
        return 2
    print(f"best of {len(found.trials)}: {found.best}; recipe: {found.best_recipe}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
