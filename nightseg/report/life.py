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
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.errors import UserError, closest, first_of
from nightseg.metrics.confusion import scores
from nightseg.report import formatting
from nightseg.report.formatting import percent
from nightseg.report.pictures import (
    Picture,
    confidence,
    label_map_uri,
    label_of,
    label_pixels,
    photo,
    there,
    tinted_photo,
)
from nightseg.report.run import Row, Run, as_kept
from nightseg.report.selections import is_ranking
from nightseg.report.templates import template
from nightseg.selection.limits import Limits
from nightseg.selection.settings import Selection
from nightseg.storage import Location, sha256_of

PAGES: Final = "explained"  # folder of a run folder
_REFERENCE: Final = "reference of this selection"
_WIDTH: Final = 640  # pixels of the pictures


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

    def lines(self) -> list[tuple[str, str]]:
        """(what, in words), in the order of a frame's life."""
        return [(title, text) for title, texts in _sections(self) for text in texts]


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

    def _is_of_asked(self, name: str) -> bool:
        """Seeds share the selection, and often the pseudo-labels, of their model."""
        return self._is_asked(name) or name == str(self.model).partition(".seed")[0]

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
            if not self._is_of_asked(model):
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
            if not rows or commit is None or not self._is_of_asked(model):
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
            if self._is_asked(entry["model"]) or (entry["how"] == _REFERENCE and self._is_of_asked(entry["model"]))
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


# -- in words ---------------------------------------------------------------------------------------------------------


def _sections(life: Life) -> Iterator[tuple[str, list[str]]]:
    source = life.source
    yield "frame", [life.frame_id]
    yield "file", [", ".join(_file(source))]
    if source.get(frame.SHA256):
        yield "sha256", [source[frame.SHA256]]
    if source.get(frame.DATASET):
        keys = {frame.DOMAIN: "domain", frame.SEQUENCE: "sequence", frame.SPLIT: "split"}
        facts = [f"{word} {source[key]}" for key, word in keys.items() if source.get(key)]
        yield "dataset", [", ".join([source[frame.DATASET], *facts])]
    if source.get(frame.LABEL_URI):
        yield "label", [f"{source[frame.LABEL_URI]}, read as {source[frame.LABEL_ENCODING]}"]
    if life.made_from is not None:
        yield "made from", [f"{life.made_from['frame_id']}, by {life.made_from['translator']}"]
    yield "quarantine", [f"{row['node']}: {row['reason']} {row['detail'] or ''}".strip() for row in life.quarantine]
    yield "split", [_split(row) for row in life.splits]
    yield "translation", [_translation(row) for row in life.translations]
    yield "selection", [_selection(row) for row in life.selections] or ["a candidate of none"]
    yield "pseudo-label", [text for row in life.pseudo_labels for text in _pseudo_label(row)] or ["none"]
    yield "learned by", _learned(life) or ["no model"]
    yield (
        "prediction",
        [_prediction(row, life) for row in life.predictions]
        or ["none is committed: nightseg predict RUN_DIR:MODEL FILE"],
    )
    yield "not there", [f"{node}: its commit is gone, so what it knew is left out" for node in life.missing]


def _file(source: Row) -> Iterator[str]:
    yield str(source[frame.URI])
    if source.get(frame.BYTES) is not None:
        yield f"{formatting.count(source[frame.BYTES])} bytes"
    if source.get(frame.WIDTH):
        yield f"{source[frame.WIDTH]} x {source[frame.HEIGHT]} pixels"
    yield {
        "there": "still there",
        "unchanged": "as it was collected",
        "changed": "changed since it was collected",
        "gone": "gone since it was collected",
        "unreadable": "not readable now",
    }[source["file"]]


def _split(row: Row) -> str:
    side = "above" if row["distance"] >= 0 else "below"
    return (
        f"{row['domain']} by {row['node']}: score {row['score']:.3f} (-1 night, 1 day), margin {row['margin']:.3f}, "
        f"{abs(row['distance']):.3f} {side} the limit of {row['limit']:g}"
    )


def _translation(row: Row) -> str:
    facts = [f"{word} {percent(row[key])} %" for key, word in
             {"edges": "edges agree", "agreement": "pixels agree"}.items() if key in row]  # fmt: skip
    return ", ".join([f"{row['frame_id']}, by {row['translator']}", *facts])


def _selection(row: Row) -> str:
    start = f"{row['model']} (the {row['count']} of method {row['method']})"
    if not row["is_candidate"]:
        return f"{start}: no candidate, {row['why_not']}"
    score = "" if row["score"] is None else f", score {row['score']:.4g} (place {row['place']} of {row['candidates']})"
    if row["chosen"]:
        return f"{start}: chosen, rank {row['rank']} of {row['count']}{score}"
    return f"{start}: not chosen{score}: {row['why_not']}"


def _pseudo_label(row: Row) -> Iterator[str]:
    sure = "" if row["mean_confidence"] is None else f", mean confidence {percent(row['mean_confidence'])} %"
    rule = formatting.threshold(row["threshold"])
    yield f"{row['model']}, by {row['teacher']}: {percent(row['kept'])} % of the pixels kept{sure}; {rule}"
    shares = sorted(row["by_class"].items(), key=lambda item: -item[1]["share"])
    if shares:
        yield "kept of " + ", ".join(
            f"{name} {percent(facts['kept'], 0)} % (of {percent(facts['share'], 0)} % of the frame)"
            for name, facts in shares
        )


def _learned(life: Life) -> list[str]:
    """Models that learned it alike in one line."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in life.learned_by:
        of = "" if row["frame_id"] == life.frame_id else f", as {row['frame_id']}"
        models.setdefault((row["how"], of), []).append(row["model"])
    return [f"{', '.join(dict.fromkeys(names))}: {how}{of}" for (how, of), names in models.items()]


def _prediction(row: Row, life: Life) -> str:
    sets = row["test_sets"] or [row["node"].partition("/")[2]]
    where = f" on {', '.join(sets)}"
    of = "" if row["frame_id"] == life.frame_id else f" of {row['frame_id']}"
    facts = []
    if row["pa"] is not None:
        facts.append(f"{percent(row['pa'])} % of the pixels right, mIoU {percent(row['miou'])} %")
    if row["mean_confidence"] is not None:
        facts.append(f"mean confidence {percent(row['mean_confidence'])} %")
    return f"{row['model']}{where}{of}: {', '.join(facts) or 'without a label'}"


# -- as a page --------------------------------------------------------------------------------------------------------


def life_page(folder: Location, results: Mapping[str, Any], life: Life) -> Location:
    """Write the page of a frame into the run folder: its life in words and in pictures. One file, no network."""
    run = Run(folder, results)
    page = template("life.html.j2").render(life=life, lines=life.lines(), groups=_pictures(run, life), run=run)
    place = folder / PAGES / frame.file_name(life.frame_id, ".html")
    place.write_bytes(page.encode())
    return place


def _pictures(run: Run, life: Life) -> list[tuple[str, list[Picture]]]:
    """Title -> pictures side by side."""
    source, uri = life.source, life.source[frame.URI]
    label = label_pixels(source.get(frame.LABEL_URI), source.get(frame.LABEL_ENCODING), run.classes)
    frames = there(
        photo(uri, "frame", life.frame_id, _WIDTH),
        None if label is None else Picture(label_map_uri(label, run.classes, _WIDTH), "label", "", True),
        *(photo(row["uri"], "translation", f"by {row['translator']}", _WIDTH) for row in life.translations),
    )
    uris = {life.frame_id: uri} | {row["frame_id"]: row["uri"] for row in life.translations}
    taught = [
        picture
        for row in life.pseudo_labels
        for known in as_kept(run, row["node"], run.rows_of(row["labels"], "frames", [row["frame_id"]]).values())
        for picture in there(
            tinted_photo(uris[row["frame_id"]], label_of(known, run.classes), run.classes,
                         f"pseudo-label for {row['model']}",
                         f"{percent(row['kept'], 0)} % kept; grey: ignored", _WIDTH),
            confidence(known, f"confidence of {row['teacher']}", _WIDTH),
        )
    ]  # fmt: skip
    seen = [
        picture
        for row in life.predictions
        for picture in there(
            _mask(run, row),
            tinted_photo(
                uris[row["frame_id"]],
                label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes),
                run.classes,
                "over the frame",
                "",
                _WIDTH,
            ),
        )
    ]
    return [group for group in (("Frame", frames), ("Pseudo-labels", taught), ("Predictions", seen)) if group[1]]


def _mask(run: Run, row: Row) -> Picture | None:
    label = label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes)
    if label is None:
        return None
    right = "" if row["pa"] is None else f"{percent(row['pa'])} % of its pixels right"
    return Picture(label_map_uri(label, run.classes, _WIDTH), f"{row['model']} sees", right, True)
