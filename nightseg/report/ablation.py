"""What helped: each model beside its control of equal steps, by seed and by class, and what its teachers saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nightseg.metrics.bootstrap import FrameSpread
from nightseg.metrics.seeds import Difference, difference
from nightseg.report import formatting, gallery
from nightseg.report.charts import Chart, DotAxis, Dots, share_curve
from nightseg.report.comparison import control_of, gain, headline
from nightseg.report.frame_spread import gain_spread
from nightseg.report.run import Run

GROUPS = (
    "Labelled day frames alone",
    "Labelled frames under night light",
    "Other labelled frames",
    "Self-training, in rounds",
    "Self-training, online",
    "Selection of frames",
    "Thresholds and guards",
)
GUARD_RANGE = (0.5, 1.5)  # of a class's share at the start; the recipe may have another for online self-training
LEAST_RANKED = 4  # models; a rank correlation of fewer says nothing
_LEAST_SHARE = 0.001  # classes that a teacher sees on fewer pixels have no curve
_DURATION = ("epochs", "steps_per_epoch", "warmup_steps", "checkpoint_every", "validate_every", "preset")
_GUARDING = (("threshold",), ("never_below",), ("online", "guard"))
_NUM_CHANGES = 4

Path = tuple[str, ...]
Change = tuple[Path, Any, Any]  # where, before, after


class Row(NamedTuple):
    """One model on the main test set; scores are fractions."""

    name: str
    about: str
    adds: str  # over which model, what
    steps: int
    num_seeds: int
    miou: float
    std: float | None
    control: str | None
    gain: Difference | None
    spread: FrameSpread | None  # of the gain, over the test frames
    is_best: bool
    dots: Dots
    classes: list[tuple[str, float | None]]  # change over the control


def ablation(run: Run, samples: int) -> dict[str, Any] | None:
    """None for a run with fewer than two models on the main test set, or of a version that counted no steps."""
    test = run.main_test
    models = run.scored(test) if test is not None else []
    if test is None or len(models) < 2 or not all("steps_in_all" in run.results["models"][name] for name in models):
        return None
    axis = DotAxis([100 * value for name in models for value in run.by_seed(name, test).values()])
    groups: dict[str, list[Row]] = {name: [] for name in GROUPS}
    for place, name in enumerate(models):
        before, changes = _nearest(run, name, models[:place])
        groups[_group(run, name, before, changes)].append(_row(run, name, test, axis, before, changes))
    found = headline(run)
    assert found is not None, test
    return {
        "test": test,
        "axis": axis,
        "groups": [(name, rows) for name, rows in groups.items() if rows],
        "has_control": any(row.control for rows in groups.values() for row in rows),
        "classes": list(zip(run.classes.classes, run.classes.palette, strict=True)),
        "best": found.best,
        "control": found.control,
        "by_class": [] if found.control is None else _by_class(run, found.best, found.control, test),
        "worst": gallery.worst_frames(run, test, [*filter(None, [found.control]), found.best], min(samples, 3)),
        "consistency": _consistency(run, test),
        "shares": [*_online_shares(run), *_shares_by_round(run)],
    }


def _row(run: Run, name: str, test: str, axis: DotAxis, before: str | None, changes: Sequence[Change]) -> Row:
    facts, by_seed = run.results["models"][name], run.by_seed(name, test)
    control = control_of(run, name, test)
    ours, theirs = run.mean(name, test)["iou"], {} if control is None else run.mean(control, test)["iou"]
    return Row(
        name,
        facts.get("about", ""),
        "" if before is None else f"over {before}: {_in_words(changes)}",
        facts["steps_in_all"],
        len(by_seed),
        run.miou(name, test),
        run.std(name, test),
        control,
        None if control is None else gain(run, name, control, test),
        None if control is None else gain_spread(run, name, control, test),
        name == run.best(test),
        axis.row([100 * v for v in by_seed.values()], None if control is None else 100 * run.miou(control, test)),
        [(label, _minus(ours.get(label), theirs.get(label))) for label in run.classes.classes],
    )


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def _by_class(run: Run, best: str, control: str, test: str) -> list[dict[str, Any]]:
    """IoU of each class before and after, and the change with its spread."""
    before, after = run.mean(control, test)["iou"], run.mean(best, test)["iou"]
    rows = []
    for name, colour in zip(run.classes.classes, run.classes.palette, strict=True):
        if before.get(name) is None or after.get(name) is None:
            continue
        change = difference(run.class_by_seed(best, test, name), run.class_by_seed(control, test, name))
        rows.append({"name": name, "colour": colour, "before": before[name], "after": after[name], "change": change})
    return rows


def _consistency(run: Run, test: str) -> dict[str, Any] | None:
    """Scores that need no labels beside mIoU, from the best model to the worst, and how well each ranks them."""
    found = (run.results.get("consistency") or {}).get("ranks", {}).get(test)
    if found is None or found["models"] < LEAST_RANKED:
        return None
    rated = [name for name in run.scored(test) if run.results["models"][name].get("consistency")]
    ranked = sorted(rated, key=lambda name: -run.miou(name, test))
    rows = [(name, run.miou(name, test), run.results["models"][name]["consistency"]) for name in ranked]
    return {"dataset": run.results["consistency"]["dataset"], "spearman": found["spearman"], "rows": rows}


# -- what a model adds -----------------------------------------------------------------------------------------------


def _settings(run: Run, name: str) -> dict[str, Any]:
    """What models may differ in, but for how long they are trained and what they start from."""
    facts = run.results["models"][name]
    weights = facts.get("weights") or dict.fromkeys(facts["train"], 1.0)
    training = {key: value for key, value in facts["training"].items() if key not in _DURATION}
    learning = facts["self_training"]
    return {
        "train": {name: weights[name] for name in facts["train"]},
        "self_training": learning and {key: value for key, value in learning.items() if key != "teacher"},
        "network": facts["network"],
        "loss": facts["loss"],
        "training": training,
    }


def _nearest(run: Run, name: str, earlier: Sequence[str]) -> tuple[str | None, list[Change]]:
    """The earlier model that differs least, and in what. Of equals one that it starts from, else the first."""
    line, ours = run.results["models"][name]["line"], _settings(run, name)
    best: tuple[str | None, list[Change]] = (None, [])
    order = sorted(earlier, key=lambda other: (other not in line, -line.index(other) if other in line else 0))
    for other in order:
        changes = list(_changes(_settings(run, other), ours, ()))
        if best[0] is None or _size(changes) < _size(best[1]):
            best = other, changes
    return best


def _changes(before: Any, after: Any, path: Path) -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in (*before, *(key for key in after if key not in before)):
            yield from _changes(before.get(key), after.get(key), (*path, key))
    elif before != after:
        yield path, before, after


def _size(changes: Sequence[Change]) -> int:
    """How many settings differ; a whole part that one of the two lacks counts with all that is in it."""

    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, Mapping) else 1

    return sum(max(leaves(before), leaves(after)) for _, before, after in changes)


def _in_words(changes: Sequence[Change]) -> str:
    """`+ day_at_night, threshold: fixed -> class_balanced`; what is left out is counted."""
    words = [_change_in_words(*change) for change in changes[:_NUM_CHANGES]]
    more = [f"{len(changes) - _NUM_CHANGES} more"] if len(changes) > _NUM_CHANGES else []
    return ", ".join([*words, *more]) or "trained for longer"


def _change_in_words(path: Path, before: Any, after: Any) -> str:
    name = path[-1]
    if path == ("self_training",):
        learning = before or after
        how = f"self-training on {learning['pool']} ({learning.get('mode', 'offline')})"
        return f"+ {how}" if after else f"\N{MINUS SIGN} {how}"
    if path[0] == "train" and None in (before, after):
        return f"+ {name}" if before is None else f"\N{MINUS SIGN} {name}"
    where = path[1:] if path[0] in ("self_training", "train") else path
    return f"{' '.join(where)}: {_value(before)} \N{RIGHTWARDS ARROW} {_value(after)}"


def _value(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "on" if value else "off"
        case float():
            return f"{value:g}"
        case Mapping():
            return str(next((value[key] for key in ("method", "kind", "mode") if key in value), "on"))
        case list() | tuple():
            return " to ".join(map(_value, value))
        case _:
            return str(value)


def _group(run: Run, name: str, before: str | None, changes: Sequence[Change]) -> str:
    """By what a model adds, where it adds to self-training of the same mode; else by what it learns from."""
    facts = run.results["models"][name]
    learned, learning = facts["learned"], facts["self_training"]
    if learned["day_only"]:
        return GROUPS[0]
    if not learning:
        return GROUPS[1] if learned["translated"] or set(learned["domains"]) - {"day", "unknown"} else GROUPS[2]
    paths = [path[1:] for path, _, _ in changes if path[0] == "self_training"]
    if before is not None and paths and len(paths) == len(changes):
        if all(path[:1] in (("select",), ("pool",)) for path in paths):
            return GROUPS[5]
        if all(any(path[: len(part)] == part for part in _GUARDING) for path in paths):
            return GROUPS[6]
    return GROUPS[4] if learning.get("mode") == "online" else GROUPS[3]


# -- what teachers saw -----------------------------------------------------------------------------------------------


def _online_shares(run: Run) -> list[dict[str, Any]]:
    """Of models that were taught online: the share of each class on the pool, by epoch, as the teacher saw it."""
    found = []
    for name in run.models:
        commit = run.commit(run.results["models"][name]["model"])
        if commit is None or not commit.has("history.json"):
            continue
        records = [(record["epoch"], _taught(record)) for record in commit.json("history.json")]
        seen = [(epoch, taught["shares"]) for epoch, taught in records if "shares" in taught]
        if len(seen) < 2:
            continue
        learning = run.results["models"][name]["self_training"] or {}
        limits = (learning.get("online") or {}).get("guard", {}).get("range", GUARD_RANGE)
        part = {"title": name, "about": "the teacher's view of the pool, by epoch", "unit": "epoch"}
        found.append({**part, "warnings": _warnings_online(run, name), **_share_charts(run, seen, limits)})
    return found


def _warnings_online(run: Run, model: str) -> list[str]:
    """What was said of the teachers of all seeds; those of the others than the first are named."""
    found = []
    for name, node in run.trainings(model).items():
        commit = run.commit(node)
        records = commit.json("history.json") if commit is not None and commit.has("history.json") else []
        warnings = dict.fromkeys(text for record in records for text in _taught(record).get("warnings", []))
        found += [text if name == model else f"{name}: {text}" for text in warnings]
    return found


def _taught(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a record of an epoch tells of the teacher; nothing before it taught."""
    found: Mapping[str, Any] = record.get("teacher") or (record if "shares" in record else {})
    return found


def _shares_by_round(run: Run) -> list[dict[str, Any]]:
    """Of self-training in rounds, each taught by the model of the one before: the share of each class by round."""
    evidence = {model: entry["evidence"] for model, entry in run.of_models("pseudo_labels")}
    taught = {entry["teacher"]["name"] for entry in evidence.values()}
    found = []
    for last in (model for model in evidence if model not in taught):
        chain = [last]
        while (before := evidence[chain[0]]["teacher"]["name"]) in evidence:
            chain.insert(0, before)
        if len(chain) < 2:
            continue
        seen = []
        for number, model in enumerate(chain, 1):
            predicted = {name: facts["predicted"] for name, facts in evidence[model]["by_class"].items()}
            total = max(sum(predicted.values()), 1)
            seen.append((number, {name: count / total for name, count in predicted.items()}))
        part = {"title": last, "about": f"what the teachers of {', '.join(chain)} saw, by round", "unit": "round"}
        found.append({**part, "warnings": [], **_share_charts(run, seen, GUARD_RANGE)})
    return found


def _share_charts(run: Run, seen: Sequence[tuple[int, Mapping[str, float]]], limits: Sequence[float]) -> dict[str, Any]:
    """A chart a class over the band of its share at the start; those that a teacher hardly sees have none."""
    charts: list[tuple[str, Any, Chart, bool]] = []
    rare = []
    for name, colour in zip(run.classes.classes, run.classes.palette, strict=True):
        shares = [values.get(name, 0.0) for _, values in seen]
        if max(shares) < _LEAST_SHARE:
            rare.append(name)
            continue
        low, high = (limit * shares[0] for limit in limits)
        is_outside = any(not low <= share <= high for share in shares)
        described = f"Share of {name} from {formatting.percent(shares[0])} to {formatting.percent(shares[-1])} %"
        chart = share_curve([place for place, _ in seen], shares, (low, high), description=described)
        charts.append((name, colour, chart, is_outside))
    return {"charts": charts, "rare": rare, "limits": limits}
