"""Run the benchmarks, print a Markdown table, keep everything measured as JSON in benchmarks/results/.

    python -m benchmarks                        all of them
    python -m benchmarks --only frechet --full  one, at the size that hurts (minutes)

Some peers are optional (pip install -e '.[peers]'); without them their contests are skipped.
Close other programs first: times by turns are fair, but not small, on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import (
    classify,
    confusion,
    decoding,
    extraction,
    frechet,
    labels,
    loss,
    moments,
    ray_pass,
    ray_step,
    reading,
    spatial,
    subset,
    training_step,
    translate_pass,
    unit_step,
    unit_workers,
)
from benchmarks.contest import Contest, Outcome, PeerMissing, Size, hold
from nightseg.errors import closest

BENCHMARKS: dict[str, Callable[[Size], Contest]] = {
    "frechet_even": frechet.even,
    "frechet_decaying": frechet.decaying,
    "frechet_ill": frechet.ill_conditioned,
    "frechet_few": frechet.few,
    "extraction_exact": extraction.exact,
    "extraction_fast": extraction.fast,
    "spatial": spatial.contest,
    "spatial_share": spatial.share_of_extraction,
    "moments": moments.contest,
    "subset_matched": subset.matched,
    "subset_biased": subset.biased,
    "subset_mixture": subset.mixture,
    "ray_pass": ray_pass.contest,
    "ray_actors": ray_pass.actors,
    "unit_step": unit_step.contest,
    "unit_workers": unit_workers.contest,
    "translate_pass": translate_pass.contest,
    "label_pass": labels.contest,
    "label_thresholds": labels.thresholds,
    "confusion": confusion.contest,
    "confusion_histc": confusion.against_histc,
    "confusion_torchmetrics": confusion.against_torchmetrics,
    "confusion_one_hot": confusion.against_one_hot,
    "decode_jpeg": decoding.jpeg,
    "decode_png": decoding.png,
    "decode_label": decoding.label,
    "decode_webp": decoding.webp,
    "decode_tiff": decoding.tiff,
    "input_first_epoch": reading.first_epoch,
    "input_later_epochs": reading.later_epochs,
    "loss": loss.contest,
    "loss_chunks": loss.chunks,
    "focal": loss.focal,
    "training_step": training_step.contest,
    "ray_step": ray_step.contest,
    "classify_whole": classify.whole,
    "classify_many": classify.many,
}
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("nightseg", "numpy", "scipy", "torch", "pytorch-fid")
TELLING_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", action="append", help=f"one of {', '.join(BENCHMARKS)}; repeatable")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds, 5 or more to be believed (7)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", dest="size", action="store_const", const="full", help="the sizes of real use")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="to try the harness, not to time")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}{closest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    outcomes, skipped, disagreed = [], dict[str, str](), False
    for name in options.only or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            outcomes.append(hold(BENCHMARKS[name](options.size or "default"), options.rounds))
        except PeerMissing as missing:
            print(f"{name}: skipped: {missing}", file=sys.stderr, flush=True)
            skipped[name] = str(missing)
        except AssertionError as difference:  # of this one; what the others measured is not lost
            print(f"{name}: the answers differ, so nothing was timed: {difference}", file=sys.stderr, flush=True)
            disagreed = True
    file = write(outcomes, skipped, options.size or "default", options.out)
    print(table(outcomes))
    print(f"all runs: {file}", file=sys.stderr)
    return 1 if disagreed else 0


def table(outcomes: Sequence[Outcome]) -> str:
    """Medians in Markdown; a ratio is our share of what the peer takes."""
    lines = [
        "| work | peer | wall: ours | peer | ratio | CPU: ours | peer | ratio | memory: ours | peer | ratio |"
        " agreement |",
        f"|---|---|{'---:|' * 9}---|",
    ]
    for outcome in outcomes:
        cells = [outcome.contest.work, outcome.contest.peer]
        for clock in ("wall", "cpu"):
            if clock == "cpu" and outcome.contest.elsewhere:
                cells += [""] * 3
                continue
            cells += [_seconds(outcome.median("ours", clock)), _seconds(outcome.median("peer", clock))]
            cells.append(f"{outcome.ratio(clock):.2g}")
        if outcome.peaks:
            ours, peer = outcome.peaks
            cells += [f"{ours / 1e6:.0f} MB", f"{peer / 1e6:.0f} MB", f"{ours / peer:.2g}"]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join([*cells, outcome.agreement])} |")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def write(outcomes: Sequence[Outcome], skipped: Mapping[str, str], size: Size, folder: Path) -> Path:
    """Everything that was measured, and on what; and which contests had no peer."""
    moment = datetime.now(UTC)
    content = {
        "created": moment.isoformat(timespec="seconds"),
        "size": size,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "contests": [
            {
                "name": outcome.contest.name,
                "work": outcome.contest.work,
                "peer": outcome.contest.peer,
                "rounds": len(outcome.ours),
                "ours": [seconds._asdict() for seconds in outcome.ours],
                "theirs": [seconds._asdict() for seconds in outcome.peer],
                "median": {
                    f"{side}_{clock}": outcome.median(side, clock)
                    for side in ("ours", "peer")
                    for clock in ("wall", "cpu")
                },
                "agreement": outcome.agreement,
                "peak_bytes": outcome.peaks,
                "ratio": {clock: outcome.ratio(clock) for clock in ("wall", "cpu")},
            }
            for outcome in outcomes
        ],
        "skipped": dict(skipped),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{moment:%Y%m%dT%H%M%S%f}.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    return file


def machine() -> dict[str, Any]:
    """What the numbers depend on. The load says how busy the machine was with other things at the end."""
    import torch

    facts = cpu_facts(Path("/proc/cpuinfo"))
    return facts | {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
    }


def cpu_facts(cpuinfo: Path) -> dict[str, Any]:
    """Model and telling flags of the processor, where Linux says them."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (pairs.get("flags") or pairs.get("features") or "").split()
    return {"processor": pairs.get("model name", ""), "flags": [flag for flag in TELLING_FLAGS if flag in flags]}


if __name__ == "__main__":
    sys.exit(main())
