"""What a gain is worth: a model beside its control, which learned from labelled day frames alone, for as many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nightseg.metrics.bootstrap import FrameSpread
from nightseg.metrics.seeds import Difference, difference, least_gain
from nightseg.report import formatting
from nightseg.report.frame_spread import gain_spread, miou_spread
from nightseg.report.run import Run

TOLERANCE = 0.02  # a control may have so much fewer steps, a share of the model's


def control_of(run: Run, model: str, test: str) -> str | None:
    """The model that a gain on a test set is measured against; None if there is none, or the model could be one.

    It learned from labelled day frames alone, from the same start, with the same network, for at least as many steps
    and frames in all (less TOLERANCE). Of several the one with the nearest number of steps; of equals the best.
    """
    ours = run.results["models"][model]
    if _is_day_only(run, model):
        return None
    found = [
        other
        for other in run.scored(test)
        if other != model and _is_day_only(run, other) and _is_as_long(run.results["models"][other], ours)
    ]

    def distance(other: str) -> tuple[int, float]:
        steps = run.results["models"][other]["steps_in_all"]
        return abs(steps - ours["steps_in_all"]), -run.miou(other, test)

    return min(found, key=distance, default=None)


def _is_day_only(run: Run, model: str) -> bool:
    return bool(run.results["models"][model].get("learned", {}).get("day_only"))


def _is_as_long(control: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    if "steps_in_all" not in ours or control["network"] != ours["network"] or _root(control) != _root(ours):
        return False
    return all(control[key] >= (1 - TOLERANCE) * ours[key] for key in ("steps_in_all", "frames_in_all"))


def _root(facts: Mapping[str, Any]) -> str:
    """What the first training of a line began with: ImageNet, nothing, or a model folder."""
    return str(facts["root"])


def beside(run: Run, model: str, test: str) -> dict[str, list[str]]:
    """Models that a model is compared with on a test set -> what they are to it: start, teacher, control."""
    facts, found = run.results["models"][model], dict[str, list[str]]()
    others = {"start": facts["start"], "teacher": (facts["self_training"] or {}).get("teacher")}
    others["control"] = control_of(run, model, test)
    for what, other in others.items():
        if other in run.results["models"] and run.score(other, test):
            found.setdefault(other, []).append(what)
    return found


def differences(run: Run) -> list[dict[str, Any]]:
    """Of every model over what it is compared with, on every test set: what results.json holds. Fractions of mIoU."""
    return [
        {"model": model, "over": other, "is": kinds, "test": test, **measured(run, model, other, test)}
        for test in run.tests
        for model in run.scored(test)
        for other, kinds in beside(run, model, test).items()
    ]


def measured(run: Run, model: str, other: str, test: str) -> dict[str, Any]:
    """The difference of two models: over the seeds mean, standard deviation and number of pairs, and the interval over
    the frames of the test set, or over its drives (null: too few). `least`: what it must exceed, by the seeds."""
    found, spread = gain(run, model, other, test), gain_spread(run, model, other, test)
    ours, theirs = run.by_seed(model, test), run.by_seed(other, test)
    inside = None if spread is None else {**spread.interval._asdict(), "units": spread.units, "of": spread.of}
    seeds = {"seeds": min(len(ours), len(theirs)), "least": least_gain(ours, theirs)}
    return {**found._asdict(), **seeds, "interval": inside}


def verdict(found: Mapping[str, Any] | None) -> str:
    """Whether the first of two models is the better one, by `measured`: "holds" where its whole interval over the
    frames is above 0 and the mean is larger than `least`, as far as that is known; "does not hold" where the same is
    true the other way round; else "not decided"."""
    if found is None or found["interval"] is None:
        return "not decided"
    least = found["least"] or 0.0
    if found["interval"]["low"] > 0 and found["mean"] > least:
        return "holds"
    if found["interval"]["high"] < 0 and -found["mean"] > least:
        return "does not hold"
    return "not decided"


def claims(run: Run, said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a recipe says of its models, held against the results. A claim holds if each of its pairs does; it does not
    if one of them does not; else it is not decided, as where a model was not measured."""
    found = {}
    for name, claim in said.items():
        pairs = []
        for model, other in claim["pairs"]:
            is_known = all(one in run.results["models"] and run.score(one, claim["test"]) for one in (model, other))
            values = measured(run, model, other, claim["test"]) if is_known else None
            pairs.append({"model": model, "over": other, "verdict": verdict(values), **(values or {})})
        verdicts = {pair["verdict"] for pair in pairs}
        of_all = next((one for one in ("does not hold", "not decided") if one in verdicts), "holds")
        found[name] = {"says": claim["says"], "test": claim["test"], "verdict": of_all, "pairs": pairs}
    return found


def gain(run: Run, model: str, control: str, test: str) -> Difference:
    """Of mIoU on a test set, a fraction."""
    return difference(run.by_seed(model, test), run.by_seed(control, test))


class Headline(NamedTuple):
    """The best model on the main test set beside its control; fractions. `note` says why there is no gain, if so."""

    test: str
    best: str
    miou: float
    std: float | None  # over the seeds
    num_seeds: int
    control: str | None
    gain: Difference | None
    note: str
    spread: FrameSpread | None = None  # over the test frames, of mIoU
    gain_spread: FrameSpread | None = None

    def __str__(self) -> str:
        spread = f"; {formatting.interval(self.spread)}" if self.spread else ""
        seeds = f" ({formatting.plural(self.num_seeds, 'seed')}{spread})"
        reached = f"{self.best} reaches {formatting.with_spread(self.miou, self.std)} % mIoU on {self.test}{seeds}"
        if self.gain is None:
            return f"{reached}; {self.note}"
        of_gain = f" ({formatting.interval(self.gain_spread, signed=True)})" if self.gain_spread else ""
        return f"{reached}, {formatting.gain(self.gain)} points{of_gain} over {self.control}, {self.note}"


def model_to_use(run: Run) -> str:
    """The best on the main test set. Without a test at night, where a model of day alone is best by day: the last of
    the recipe that learned from more, for who runs this wants a model for the night."""
    found = headline(run)
    if found is not None and (run.night_test or not _is_day_only(run, found.best)):
        return found.best
    names = list(run.models)
    return next((name for name in reversed(names) if not _is_day_only(run, name)), names[-1])


def headline(run: Run) -> Headline | None:
    """None for a run without an evaluated model. No gain is claimed without a control of equal steps."""
    test = run.main_test
    if test is None:
        return None
    best = _best_without_night_labels(run, test)
    facts = run.results["models"][best]
    control = control_of(run, best, test)
    if control is not None:
        steps = [run.results["models"][name]["steps_in_all"] for name in (best, control)]
        note = f"its control of equal steps: labelled day frames alone ({steps[1]} steps in all, {best}: {steps[0]})"
    elif _is_day_only(run, best):
        note = "it learned from labelled day frames alone"
        if len(run.scored(test)) > 1:
            note += ", and no other model of this run is better there"
    else:
        cure = _without_domain(run, best, test) or f"add {_missing(run, facts, test)}"
        note = f"no control of equal steps: what of it is longer training is not known; {cure}"
    return Headline(
        test,
        best,
        run.miou(best, test),
        run.std(best, test),
        len(run.by_seed(best, test)),
        control,
        None if control is None else gain(run, best, control, test),
        note,
        miou_spread(run, best, test),
        None if control is None else gain_spread(run, best, control, test),
    )


def _without_domain(run: Run, best: str, test: str) -> str:
    """A model that would be the control if its frames were known to be of day, and what to say in the recipe."""
    for name in run.scored(test):
        facts = run.results["models"][name]
        learned = facts.get("learned", {})
        domains = set(learned.get("domains", []))
        is_plain = "unknown" in domains <= {"day", "unknown"} and not learned["translated"] and not learned["pool"]
        if name != best and is_plain and _is_as_long(facts, run.results["models"][best]):
            return f"if {name} learned from day frames alone, give its datasets `domain: day`"
    return ""


def _best_without_night_labels(run: Run, test: str) -> str:
    """An oracle, which learned from labelled night frames, is no answer to how far one gets without them."""
    fair = [name for name in run.scored(test) if not run.results["models"][name].get("learned", {}).get("night_labels")]
    return max(fair or run.scored(test), key=lambda name: run.miou(name, test))


def _missing(run: Run, facts: Mapping[str, Any], test: str) -> str:
    """The control that the recipe lacks, as a line of it."""
    models = run.results["models"]
    short = [name for name in run.scored(test) if _is_day_only(run, name) and _root(models[name]) == _root(facts)]
    if not short:
        return "a model day_only_longer that learns from the labelled day frames alone (domain: day) for as many steps"
    longest = max(short, key=lambda name: int(models[name]["steps_in_all"]))
    lacking = facts["steps_in_all"] - models[longest]["steps_in_all"]
    train = ", ".join(models[longest]["train"])
    how_long = f" with {lacking} steps" if lacking > 0 else " with the same network and batch"
    return f"a model day_only_longer: {{train: [{train}], start: {longest}, training: ...}}{how_long}"
