"""The life of a frame: where it came from, what was decided about it, who learned from it, what models see in it.

Everything is read from the commits of a run. Which frames a stage was given stands in its commit as views: the
`stage/name` whose frames it read, with `:domain` behind where these were the frames of one domain.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
from pydantic import ValidationError

from nightseg.data import table as frame
from nightseg.errors import UserError, closest, first_of
from nightseg.metrics.confusion import scores
from nightseg.report import formatting
from nightseg.report.run import Row, Run
from nightseg.report.selections import is_ranking
from nightseg.selection.limits import Limits
from nightseg.selection.settings import Selection
from nightseg.storage import Location, sha256_of

_REFERENCE: Final = "reference of this selection"


class Life(NamedTuple):
    """What a run knows of a frame; every entry names the `node` that committed it.

    Shares, confidences and scores of models are fractions. `frame_id` in an entry: the frame or a translation of it.
    """

    frame_id: str
    source: Row  # of the frame table; `file`: unchanged, changed, gone, unreadable; there: a refused one has no sha256
    made_from: Row | None  # of a translation: the frame, translator
    splits: list[Row]  # domain, score, margin, limit, distance (to the limit; below 0 it is twilight)
    translations: list[Row]
    selections: list[Row]  # was it a candidate; score, rank, place by score, chosen, why not
    pseudo_labels: list[Row]  # teacher, threshold, kept, by_class, mean_confidence
    learned_by: list[Row]  # model, how; `through`: models that start from or are taught by one that learned it
    predictions: list[Row]  # model, test sets, scores where there is a label
    quarantine: list[Row]  # reason, detail
    missing: list[str]  # nodes of the run whose commits are not there any more


def frame_ids(folder: Location, results: Mapping[str, Any]) -> list[str]:
    """Ids of all frames, refused ones and translations, too."""
    return sorted(_frames(Run(folder, results)))


def life_of(folder: Location, results: Mapping[str, Any], frame_id: str, model: str | None = None) -> Life:
    """The life of a frame, named by its id, by a path or name of its file, or by the last parts of these.

    `model`: what selections, pseudo-labels, trainings and predictions of this model say of it, and of no other.
    Raises UserError: there is no such frame or model, or several frames are called so.
    """
    run = Run(folder, results)
    found = _find(run, frame_id)
    return _Reader(run, found, _family(run, found), model).life()


# -- which frame ------------------------------------------------------------------------------------------------------


def _frames(run: Run) -> dict[str, tuple[str, ...]]:
    """Frame id -> the files it stands for; the frames that were collected first."""
    found: dict[str, tuple[str, ...]] = {}
    for node in [*run.nodes("collect"), *run.nodes("translate")]:
        for table in ("frames", "quarantine"):
            for row in run.rows(node, table, drop=[frame.LABEL_PIXELS]):
                files = (row[frame.URI], row.get(frame.LABEL_URI))
                found.setdefault(row[frame.FRAME_ID], tuple(file for file in files if file))
    return found


def _find(run: Run, text: str) -> str:
    known = _frames(run)
    name = unicodedata.normalize("NFC", text)
    if name in known or not known:
        return _the_one(text, [name] if known else [], known)
    with suppress(UserError):
        place = Location.of(text).uri
        if here := [one for one, files in known.items() if place in files]:
            # a translation has the label of its source
            return _the_one(text, [one for one in here if known[one][0] == place] or here[:1], known)
    tail = "/" + name.strip("/")

    def is_called(one: str, files: Sequence[str]) -> bool:
        plain = [str(PurePosixPath(file).with_suffix("")) for file in files[:1]]
        return any(f"/{path}".endswith(tail) for path in (one, *files[:1], *plain))

    called = [one for one, files in known.items() if is_called(one, files)]
    collected = {node.partition("/")[2] for node in run.nodes("collect")}
    return _the_one(text, [one for one in called if one.partition("/")[0] in collected] or called, known)


def _the_one(text: str, found: Sequence[str], known: Iterable[str]) -> str:
    cure = "`nightseg explain RUN_DIR` lists the ids of all frames"
    if len(found) > 1:
        raise UserError(f"{text}: {len(found)} frames are called so: {first_of(found)}", cure=f"give an id; {cure}")
    if not found:
        by_end = {one.rpartition("/")[2]: one for one in known}
        hint = closest(text, known) or closest(by_end.get(_nearest(text, by_end), ""), known)
        raise UserError(f"{text}: the run has no such frame{hint}", cure=cure)
    return found[0]


def _nearest(text: str, names: Iterable[str]) -> str:
    return closest(text.rpartition("/")[2], names).removeprefix(", did you mean '").removesuffix("'?")


def _family(run: Run, frame_id: str) -> dict[str, Row]:
    """The frame and its translations, theirs, too: id -> what made it (node, translator, uri)."""
    found: dict[str, Row] = {frame_id: {}}
    for node in run.nodes("translate"):
        name, commit = node.partition("/")[2], run.commit(node)
        if commit is None:
            continue
        for made, row in run.rows_of(node, "frames", [f"{name}/{one}" for one in found]).items():
            by = commit.identity["recipe"].get("translator")
            kind = by.get("kind") if isinstance(by, Mapping) else None
            uri, of = row[frame.URI], made.removeprefix(f"{name}/")
            found[made] = {
                "frame_id": made,
                "node": node,
                "of": of,
                "translator": kind or commit.summary.get("translator"),
                "to": commit.summary.get("to"),
                "uri": uri,
            }
    return found


# -- what the commits say ---------------------------------------------------------------------------------------------


class _Reader:
    """A frame and its family in the tables of a run."""

    def __init__(self, run: Run, frame_id: str, family: dict[str, Row], model: str | None) -> None:
        self.run, self.frame_id, self.family, self.model = run, frame_id, family, model
        models = [node.partition("/")[2] for stage in ("train_segmenter", "adapt_norms") for node in run.nodes(stage)]
        if model is not None and not any(self._is_asked(name) for name in models):
            raise UserError(
                f"model {model}: the run has none of this name{closest(model, models)}",
                cure=f"one of {', '.join(models) or 'none: it has trained none yet'}",
            )

    def life(self) -> Life:
        learned = self.learned_by()
        return Life(
            self.frame_id,
            self.source(),
            self.made_from(),
            self.splits(),
            self.translations(),
            self.selections(),
            self.pseudo_labels(),
            learned,
            self.predictions(),
            self.quarantine(),
            [node for node in self.run.results["commits"] if self.run.commit(node) is None],
        )

    def _is_asked(self, name: str) -> bool:
        """A model is all of its seeds."""
        return self.model is None or name == self.model or name.startswith(f"{self.model}.seed")

    def _is_of_asked(self, name: str, stage: str) -> bool:
        """Seeds often share the selection and the pseudo-labels of their model."""
        is_shared = f"{stage}/{self.model}" not in self.run.results["commits"]
        return self._is_asked(name) or (is_shared and name == str(self.model).partition(".seed")[0])

    def _nodes(self, *stages: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(node, its name, its part of the recipe) of the commits that are there."""
        for node in [node for stage in stages for node in self.run.nodes(stage)]:
            commit = self.run.commit(node)
            if commit is not None:
                yield node, commit.name, dict(commit.identity["recipe"])

    def _given(self, views: Sequence[str] | None) -> dict[str, Row]:
        """Those of the family that are among the frames of these views."""
        found: dict[str, Row] = {}
        for view in views or ():
            node, _, domain = view.partition(":")
            rows = self.run.rows_of(node, "frames", self.family)
            found |= {name: row for name, row in rows.items() if domain in ("", row[frame.DOMAIN])}
        return found

    def source(self) -> Row:
        for node in [*self.run.nodes("collect"), *self.run.nodes("translate")]:
            for table in ("frames", "quarantine"):
                row = self.run.rows_of(node, table, [self.frame_id]).get(self.frame_id)
                if row is not None:
                    shown = [name for name in (*frame.FRAME_SCHEMA.names, frame.REASON) if name in row]
                    return {name: row[name] for name in shown} | {"node": node, "file": _file_now(row)}
        raise AssertionError(self.frame_id)

    def made_from(self) -> Row | None:
        for node, name, _ in self._nodes("translate"):
            if self.frame_id in self.run.rows_of(node, "frames", [self.frame_id]):
                of = self.frame_id.removeprefix(f"{name}/")
                commit = self.run.commit(node)
                by = None if commit is None else commit.summary.get("translator")
                return {"frame_id": of, "node": node, "translator": by}
        return None

    def splits(self) -> list[Row]:
        found = []
        for node, _, recipe in self._nodes("split"):
            for name, row in self.run.rows_of(node, "frames", self.family).items():
                score, margin, limit = row["score"], row["margin"], recipe["margin"]
                known = {"frame_id": name, "node": node, "domain": row[frame.DOMAIN], "score": score, "margin": margin}
                found.append({**known, "limit": limit, "distance": margin - limit})
        return found

    def translations(self) -> list[Row]:
        found = [dict(made) for name, made in self.family.items() if name != self.frame_id]
        for node, _, _ in self._nodes("evaluate_translation"):
            judged = self.run.rows_of(node, "frame_scores", self.family)
            for made in found:
                row = judged.get(made["frame_id"], {})
                made |= {key: row[key] for key in ("edges", "agreement") if row.get(key) is not None}
        return found

    def selections(self) -> list[Row]:
        found = []
        for node, model, recipe in self._nodes("select"):
            if not self._is_of_asked(model, "select"):
                continue
            selection, commit = recipe.get("selection", {}), self.run.commit(node)
            asked = {"node": node, "model": model, "method": selection.get("method"), "count": selection.get("count")}
            rows = self.run.rows_of(node, "scores", self.family)
            for name in rows or self._wrong_side(recipe.get("pool_frames")):
                row = rows.get(name)
                known = {"frame_id": name, **asked, "is_candidate": row is not None}
                if row is None:
                    found.append({**known, "why_not": self._no_candidate(name, recipe)})
                    continue
                assert commit is not None
                ranks = _Ranks.of(commit.table("scores").select([frame.FRAME_ID, "score", "rank"]).to_pylist())
                evidence = commit.json("evidence.json")
                chosen = {"score": row["score"], "rank": row["rank"], "chosen": row["rank"] is not None}
                why = "" if chosen["chosen"] else self._why_not(name, row, ranks, recipe, evidence)
                found.append({**known, **chosen, "candidates": len(ranks.scores), "place": ranks.place(name),
                              "repeats": row.get("repeats"), "why_not": why or None})  # fmt: skip
        return found

    def _wrong_side(self, views: Sequence[str] | None) -> list[str]:
        """Those that the commits behind these views hold, but not in the domain that was asked for, or unmeasured."""
        return list(self._given([view.partition(":")[0] for view in views or ()]))

    def _no_candidate(self, name: str, recipe: Mapping[str, Any]) -> str:
        if name in self._given(recipe.get("pool_frames")):
            return f"it could not be measured: see the quarantine of {recipe.get('pool_scores')}"
        for view in recipe.get("pool_frames") or ():
            node, _, domain = view.partition(":")
            if row := self.run.rows_of(node, "frames", [name]).get(name):
                return f"the pool is the {domain} frames of {node}, and this one is {row[frame.DOMAIN]}"
        return "it is not in the pool"

    def _why_not(
        self, name: str, row: Row, ranks: _Ranks, recipe: Mapping[str, Any], evidence: Mapping[str, Any]
    ) -> str:
        """Why a candidate was not chosen."""
        if row.get("repeats") is not None:
            return f"it is a near duplicate of {row['repeats']}"
        asked, ranked = recipe["selection"], is_ranking(evidence)
        before = [one for one in ranks.chosen if not ranked or ranks.order(one) < ranks.order(name)]
        if ranked and len(before) == len(ranks.chosen):
            last = max(ranks.scores[one] for one in before)
            return f"{len(before)} frames come before it: the last one that was chosen has the score {last:.4g}"
        if asked.get("quota") is not None or asked.get("gap") is not None:
            with suppress(ValidationError, UserError, KeyError):  # a recipe of another version
                if blocked := self._blocked(name, before, Selection.model_validate(asked), recipe["pool_frames"]):
                    return blocked
        if asked["method"] == "random":
            return "it was not drawn"
        return f"the choice of {asked['method']} is a set, and better without it"

    def _blocked(self, name: str, before: Sequence[str], selection: Selection, views: Sequence[str]) -> str:
        """Which of the chosen frames keep it out by quota or gap."""
        import pyarrow as pa

        commits = [(self.run.commit(view.partition(":")[0]), view.partition(":")[2]) for view in views]
        columns = [frame.FRAME_ID, frame.SEQUENCE, frame.DOMAIN]
        tables = [commit.table("frames").select(columns).to_pylist() for commit, _ in commits if commit is not None]
        domains = [domain for commit, domain in commits if commit is not None]
        rows = [row for rows, domain in zip(tables, domains, strict=True) for row in rows
                if domain in ("", row[frame.DOMAIN])]  # fmt: skip
        limits = Limits.of(selection, [name, *before], pa.Table.from_pylist(rows))
        same = np.flatnonzero(limits.groups[1:] == limits.groups[0]).tolist()
        steps = np.abs(limits.places[1:] - limits.places[0])
        if selection.gap is not None:
            near = [index for index in same if steps[index] < selection.gap]
            if near:
                nearest = min(near, key=lambda index: int(steps[index]))
                away = formatting.plural(int(steps[nearest]), "place")
                return f"{before[nearest]}, {away} away in its sequence, was chosen (gap {selection.gap})"
        if selection.quota is not None and len(same) >= selection.quota:
            return f"its sequence has its quota of {selection.quota}: {first_of([before[index] for index in same])}"
        return ""

    def pseudo_labels(self) -> list[Row]:
        found = []
        for node, model, recipe in self._nodes("pseudo_label"):
            rows = self.run.rows_of(node, "labels", self.family)
            commit = self.run.commit(node)
            if not rows or commit is None or not self._is_of_asked(model, "pseudo_label"):
                continue
            evidence, names = commit.json("evidence.json"), _classes(self.run, recipe)
            for name, row in rows.items():
                seen_K, kept_K = row["counts"], row["kept_counts"]  # logits: the teacher is asked at their stride
                by_class = {
                    of: {
                        "share": seen / sum(seen_K),
                        "kept": kept / seen,
                        "threshold": evidence["by_class"].get(of, {}).get("threshold"),
                    }
                    for of, seen, kept in zip(names, seen_K, kept_K, strict=True)
                    if seen
                }
                found.append(
                    {
                        "frame_id": name,
                        "node": node,
                        "model": model,
                        "teacher": evidence["teacher"]["name"],
                        "threshold": evidence["threshold"],
                        "kept": row["kept"],
                        "mean_confidence": row["mean_confidence"],
                        "by_class": by_class,
                        "labels": evidence["labels"],
                    }
                )
        return found

    def learned_by(self) -> list[Row]:
        found: list[Row] = []

        def add(node: str, model: str, how: str, rows: Iterable[str]) -> None:
            found.extend({"node": node, "model": model, "how": how, "frame_id": name} for name in rows)

        for node, name, recipe in self._nodes("train_translator"):
            for domain in ("day", "night"):
                add(node, name, f"a {domain} frame of this translator", self._given(recipe.get(domain)))
        for node, name, _ in self._nodes("translate"):
            commit = self.run.commit(node)
            if commit is not None and commit.has("style_images.json"):
                add(
                    node, name, "a style image", [one for one in commit.json("style_images.json") if one in self.family]
                )
        scored = {node: recipe for node, _, recipe in self._nodes("score")}
        for node, name, recipe in self._nodes("select"):
            near = scored.get(recipe.get("reference_scores") or "", {})
            add(node, name, _REFERENCE, self._given(near.get("frames")))
        for node, name, recipe in self._nodes("adapt_norms"):
            add(node, name, "batch norms were adapted to it", self._given(recipe.get("frames")))
        for node, name, recipe in self._nodes("train_segmenter"):
            for part, views in (recipe.get("train") or {}).items():
                for view in views:
                    add(node, name, _how(view, part in (recipe.get("fresh") or {})), self._given([view]))
            add(node, name, "pool of online self-training", self._given(recipe.get("pool")))
            add(node, name, "validation", self._given(recipe.get("validate")))
        found = [
            entry
            for entry in found
            if self._is_asked(entry["model"])
            or (entry["how"] == _REFERENCE and self._is_of_asked(entry["model"], "select"))
        ]
        return found + self._heirs({entry["node"] for entry in found if entry["how"] != "validation"})

    def _heirs(self, learned: set[str]) -> list[Row]:
        """Models that start from one that learned it, or have the labels of one."""
        before: dict[str, list[str]] = {}
        for node, _, recipe in self._nodes("label"):
            before[node] = [str(recipe.get("teacher"))]
        for node, _, recipe in self._nodes("train_segmenter", "adapt_norms"):
            views = [view.partition(":")[0] for part in (recipe.get("train") or {}).values() for view in part]
            before[node] = [str(recipe.get("start")), *views]
        reached = set(learned)
        while more := {node for node, needs in before.items() if node not in reached and reached.intersection(needs)}:
            reached |= more
        names = [node for node in before if node in reached - learned and not node.startswith("label/")]
        heirs = [(node, node.partition("/")[2]) for node in names]
        return [
            {"node": node, "model": name, "how": "through a model that it starts from or is taught by",
             "frame_id": self.frame_id}
            for node, name in heirs if self._is_asked(name)
        ]  # fmt: skip

    def predictions(self) -> list[Row]:
        found = []
        for node, name, recipe in self._nodes("evaluate", "predict"):
            model = str(recipe.get("model") or name).rpartition("/")[2]
            if not self._is_asked(model):
                continue
            for one, row in self.run.rows_of(node, "predictions", self.family).items():
                known = {
                    "frame_id": one,
                    "node": node,
                    "model": model,
                    "test_sets": row.get("test_sets") or [],
                    "prediction_uri": row["prediction_uri"],
                    "mean_confidence": row.get("mean_confidence"),
                }
                found.append(known | self._scores(row, recipe))
        return found

    def _scores(self, row: Row, recipe: Mapping[str, Any]) -> Row:
        counts = np.asarray(row.get("confusion") or (), dtype=np.int64)
        if not counts.sum():
            return {"pa": None, "miou": None, "iou": {}}
        names = _classes(self.run, recipe)
        matrix = counts.reshape(len(names), -1)
        rule = recipe.get("evaluation", {}).get("absent_class", "cityscapes")
        found = scores(matrix, rule)
        iou = {name: float(value) for name, value in zip(names, found.iou, strict=True) if not np.isnan(value)}
        return {"pa": float(found.pa), "miou": float(found.miou), "iou": iou}

    def quarantine(self) -> list[Row]:
        keys = (frame.FRAME_ID, frame.URI, frame.REASON, frame.DETAIL)
        found = []
        family = [*self.family, *(f"{node.partition('/')[2]}/{self.frame_id}" for node in self.run.nodes("translate"))]
        for node, facts in self.run.results["commits"].items():
            rows = self.run.rows_of(node, "quarantine", family) if facts["quarantined"] else {}
            found += [{"node": node, **{key: row.get(key) for key in keys}} for row in rows.values()]
        return found


class _Ranks(NamedTuple):
    """Scores of a selection: smaller is closer to the reference, equal ones in the order of their ids."""

    scores: dict[str, float]  # without near duplicates
    chosen: list[str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Ranks:
        known = {row[frame.FRAME_ID]: row["score"] for row in rows if row["score"] is not None}
        return cls(known, [row[frame.FRAME_ID] for row in rows if row["rank"] is not None])

    def order(self, name: str) -> tuple[float, str]:
        return self.scores[name], name

    def place(self, name: str) -> int | None:
        """By score, 1 = closest."""
        if name not in self.scores:
            return None
        return 1 + sum(self.order(other) < self.order(name) for other in self.scores)


def _how(view: str, is_fresh: bool) -> str:
    if is_fresh:
        return "translated anew with every sample"
    found = {"label": "with its pseudo-label", "translate": "translated, with the label of its source"}
    return found.get(view.partition("/")[0], "with its label")


def _file_now(row: Row) -> str:
    try:
        now = sha256_of(Location.of(row[frame.URI]).read_bytes())
    except FileNotFoundError:
        return "gone"
    except (OSError, UserError):
        return "unreadable"
    if row.get(frame.SHA256) is None:  # a refused frame, which nobody could hash
        return "there"
    return "unchanged" if row[frame.SHA256] == now else "changed"


def _classes(run: Run, recipe: Mapping[str, Any]) -> Sequence[str]:
    told = recipe.get("taxonomy")
    return list(told["classes"]) if isinstance(told, Mapping) else run.classes.classes
