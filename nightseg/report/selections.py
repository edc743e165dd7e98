"""Selections: which frames of the pool were chosen, how the choice compares with chance, and what it was worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nightseg.data import table as frame
from nightseg.metrics.bootstrap import FrameSpread
from nightseg.metrics.seeds import Difference
from nightseg.report.charts import Chart, line, scatter, stacked_histogram
from nightseg.report.comparison import TOLERANCE, gain
from nightseg.report.frame_spread import gain_spread
from nightseg.report.gallery import scored
from nightseg.report.pictures import Picture
from nightseg.report.run import Row, Run
from nightseg.selection.settings import METHODS


def selections(run: Run, samples: int) -> list[dict[str, Any]]:
    """In the order in which the models were trained."""
    found = []
    for model, entry in run.of_models("selections"):
        evidence = entry["evidence"]
        worth = list(_worth(run, model))
        found.append(
            {
                "model": model,
                "evidence": evidence,
                "is_random": evidence["method"] == "random",
                "chart": _by_score(evidence) if is_ranking(evidence) else None,
                "curve": _distances_by_count(evidence),
                "plane": _plane(evidence),
                "better": _share_of_gap(evidence["fid"]),
                "bound": _certificate(evidence["fid"]),
                "worth": worth,
                "missing": "" if any(one.kind == "random" for one in worth) else _missing(run, model, evidence),
                "groups": _groups(evidence, samples),
            }
        )
    return found


def is_ranking(evidence: Mapping[str, Any]) -> bool:
    """Whether the first frames by score are the chosen ones: else a score beside a rank would contradict it."""
    method = METHODS.get(evidence["method"])
    return evidence["cut"] is not None and method is not None and method.is_ranking


def _groups(evidence: Mapping[str, Any], samples: int) -> list[tuple[str, list[Picture]]]:
    """Frames at both ends and on both sides of the cut with rank and score, of a ranking; else some of both sides."""
    best, last, first_out, worst = (evidence[key] for key in ("best", "last_chosen", "first_left_out", "worst"))
    if not is_ranking(evidence):
        if evidence["method"] == "random":
            return [("chosen by chance", _plain(best[:samples])), ("left out by chance", _plain(first_out[:samples]))]
        ranked = [("first of the choice", _ranked(best, 1, samples, with_score=False))]
        return [*ranked, ("some that are left out", _plain(first_out[:samples]))]
    total = evidence["pool"] - evidence["duplicates"]
    return [
        ("closest", _ranked(best, 1, samples)),
        ("last chosen", _ranked(last, evidence["count"] - len(last) + 1, samples)),
        ("first left out", _ranked(first_out, evidence["count"] + 1, samples)),
        ("farthest", _ranked(worst, total - len(worst) + 1, samples)),
    ]


def _ranked(rows: list[Row], first: int, samples: int, with_score: bool = True) -> list[Picture]:
    ranks = {row[frame.FRAME_ID]: first + place for place, row in enumerate(rows)}

    def words(row: Row) -> str:
        return f"rank {ranks[row[frame.FRAME_ID]]}" + (f", score {row['score']:.4g}" if with_score else "")

    return scored(rows[:samples], words)


def _plain(rows: list[Row]) -> list[Picture]:
    return scored(rows, lambda row: "")


# -- what a choice was worth -------------------------------------------------------------------------------------------


class Worth(NamedTuple):
    """A model over another that differs in the selection alone, on the main test set; fractions of mIoU."""

    kind: str  # of the other's selection: its method, or "the whole pool"
    other: str
    gain: Difference
    spread: FrameSpread | None


def _worth(run: Run, model: str) -> Iterator[Worth]:
    test, models = run.main_test, run.results["models"]
    if test is None or run.score(model, test) is None:
        return
    ours = models[model]
    for other in run.scored(test):
        theirs = models[other]
        learning = theirs["self_training"]
        if other == model or not learning or _but_selection(theirs) != _but_selection(ours):
            continue
        steps = [facts.get("steps_in_all", 0) for facts in (ours, theirs)]
        chosen, select = ours["self_training"]["select"], learning["select"]
        if min(steps) < (1 - TOLERANCE) * max(steps) or select == chosen:
            continue
        if select is not None and (select["count"] != chosen["count"] or chosen["method"] == "random"):
            continue  # chance is what others are compared with
        kind = "the whole pool" if select is None else select["method"]
        yield Worth(kind, other, gain(run, model, other, test), gain_spread(run, model, other, test))


def _but_selection(facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that two models must share to tell what a selection was worth; names of models on their way do not count."""
    learning = {key: value for key, value in facts["self_training"].items() if key not in ("select", "teacher")}
    teacher = facts["self_training"].get("teacher")
    taught = "itself" if teacher is None or teacher in facts.get("line", ()) else teacher
    rest = {key: facts.get(key) for key in ("train", "weights", "network", "loss", "training", "root")}
    return rest | {"self_training": learning, "teacher": taught, "line": len(facts.get("line", ()))}


def _missing(run: Run, model: str, evidence: Mapping[str, Any]) -> str:
    if evidence["method"] == "random":
        return ""
    return (
        f"What this choice was worth in mIoU is not known: no model of this run differs from {model} in it alone. Add "
        f"one, {model}_random: the same with select: {{method: random, count: {evidence['count']}}}"
    )


# -- its evidence ------------------------------------------------------------------------------------------------------


def _by_score(evidence: Mapping[str, Any]) -> Chart:
    """The pool's histogram; the chosen frames fill each bar from below."""
    scores = evidence["scores"]
    rest = [total - chosen for total, chosen in zip(scores["pool"], scores["chosen"], strict=True)]
    return stacked_histogram(
        scores["edges"],
        {"chosen": scores["chosen"], "pool": rest},
        marks={} if evidence["cut"] is None else {"cut": evidence["cut"]},
        description=f"Frames of the pool by {evidence['method']} score, the chosen ones marked",
    )


def _share_of_gap(fid: Mapping[str, float | None]) -> str:
    """The choice against random choices, in words."""
    chosen, mean, spread = fid["selection"], fid["random_mean"], fid["random_sd"]
    if chosen is None or mean is None:
        return ""
    gap = mean - chosen
    sigmas = f", {abs(gap) / spread:.1f} standard deviations" if spread else ""
    return f"{abs(gap):.2f} {'below' if gap > 0 else 'above'} the mean of random choices of the same size{sigmas}"


def _distances_by_count(evidence: Mapping[str, Any]) -> Chart | None:
    """FID against the number of frames, the chosen number marked."""
    curve = evidence["curve"]
    if len(curve["counts"]) < 2:
        return None
    return line(
        curve["counts"],
        curve["fid"],
        kind="chosen",
        marks={f"{evidence['count']} chosen": evidence["count"]},
        description=f"FID to the reference of the first frames by {evidence['method']}, against their number",
    )


def _plane(evidence: Mapping[str, Any]) -> Chart | None:
    """Pool, choice and reference on their first two principal components."""
    points = evidence["plane"]["points"]
    shown = {kind: points[kind] for kind in ("pool", "reference", "chosen") if points.get(kind)}
    return scatter(shown, description="Features of the frames on their first two principal components")


def _certificate(fid: Mapping[str, float | None]) -> str:
    """How far the choice can be from the best one, in words."""
    found, bound = fid.get("selection_biased"), fid.get("lower_bound")
    if found is None or bound is None:
        return ""
    ratio = f", {found / bound:.3f} times that" if bound > 0 else ""
    return (
        f"No choice of as many frames has an FID below {bound:.4g}; this one has {found:.4g}{ratio}"
        " (covariance divided by the number of frames)"
    )
