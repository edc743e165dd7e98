"""Search loss and selection with Ray Tune on a Ray cluster.

    ray job submit --working-dir . -- python jobs/search.py configs/search.yaml --run-dir s3://bucket/runs/search

TensorBoard shows the trials: tensorboard --logdir <run-dir>/tune. Submitted again, finished stages are reused.
"""

import argparse
import sys
from pathlib import Path

from nightseg.progress import progress_for
from nightseg.search import search
from nightseg.storage import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument("--run-dir", default=str(Path.home() / "nightseg-runs" / "search"))
    arguments = parser.parse_args()
    try:
        found = search(
            arguments.search, tuple(arguments.overrides), run_dir=arguments.run_dir, progress=progress_for()
        )
    except UserError as error:
        print(f"nightseg: {error}", file=sys.stderr)
        return 2
    print(f"best of {len(found.trials)}: {found.best}; recipe: {found.best_recipe.uri}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
