"""Run a recipe, all rounds, on a Ray cluster.

    ray job submit --working-dir . -- python jobs/self_train.py configs/demo.yaml --run-dir s3://bucket/runs/demo

The driver runs inside the job, so a relative run folder would vanish with the job's working directory: without
--run-dir the run goes to ~/nightseg-runs/<recipe name> on the head node. Submitted again, the job continues.
"""

import argparse
import os
import sys
from pathlib import Path

from nightseg.pipeline.run import adapt
from nightseg.progress import progress_for
from nightseg.storage import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--run-dir", metavar="DIR")
    parser.add_argument("--only", metavar="MODEL")
    args = parser.parse_args()
    os.environ.setdefault("NIGHTSEG_RUNS", str(Path.home() / "nightseg-runs"))
    try:
        done = adapt(args.recipe, args.overrides, run_dir=args.run_dir, only=args.only, progress=progress_for())
    except UserError as error:
        print(f"nightseg: {error}", file=sys.stderr)
        return 2
    print(f"{done.folder}: {done.outcome.done} stages done, {done.outcome.skipped} already committed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
