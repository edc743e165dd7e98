"""A finished run as the report sees it: results.json, and the committed tables that it points at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.stored_labels import KEPT_NAME
from nightseg.data.taxonomy import IGNORE, TRAIN_IDS, Taxonomy
from nightseg.storage import Location
from nightseg.storage.commits import Commit, check_contents, read_commit, table_paths

EARLIER = "earlier"  # folder of a run folder: results of other recipes that were run there before

Row = dict[str, Any]


def root_of(folder: Location) -> Location:
    """Where `stages` lies, of the results in a folder."""
    return folder.parent.parent if folder.parent.name == EARLIER else folder


class Run:
    """Results and commits of one run folder. A commit that is not there any more is no error: its pictures are."""

    def __init__(self, folder: Location, results: Mapping[str, Any]) -> None:
        self.folder = folder
        self.root = root_of(folder)
        self.results = results
        self._commits: dict[str, Commit | None] = {}

    @cached_property
    def classes(self) -> Taxonomy:
        """The class list, with the encodings by which raw ids of label files are mapped."""
        part = self.results["taxonomy"]
        names, palette = tuple(part["classes"]), tuple((red, green, blue) for red, green, blue in part["palette"])
        encodings: dict[str, dict[int, int]] = {TRAIN_IDS: {raw: raw for raw in (*range(len(names)), IGNORE)}}
        for encoding, ids in part["encodings"].items():
            encodings[encoding] = {int(raw): train_id for raw, train_id in ids.items()}
        return Taxonomy(part["name"], names, palette, encodings)

    @cached_property
    def order(self) -> list[str]:
        """`stage/name` of every commit in the order of the work: results.json sorts its keys."""
        commits = self.results["commits"]

        def place(node: str) -> tuple[int, str, str]:  # no clock decides; earlier versions have nothing else
            return commits[node].get("order", 0), commits[node].get("created", ""), node

        return sorted(commits, key=place)

    @cached_property
    def models(self) -> list[str]:
        """Names of the models in the order in which they were trained."""
        return self._by_age(
            self.results["models"],
            lambda name: [self.results["models"][name].get("model") or f"train_segmenter/{name}"],
        )

    @cached_property
    def tests(self) -> list[str]:
        """Names of the test sets in the order in which they were first evaluated."""
        nodes: dict[str, list[str]] = {}
        for facts in self.results["models"].values():
            for test, scores in facts["tests"].items():
                nodes.setdefault(test, []).append(scores.get("node", ""))
        return self._by_age(nodes, nodes.__getitem__)

    def _by_age(self, names: Iterable[str], nodes: Any) -> list[str]:
        places = {node: place for place, node in enumerate(self.order)}

        def age(name: str) -> tuple[int, str]:
            return min((places.get(node, len(places)) for node in nodes(name)), default=len(places)), name

        return sorted(names, key=age)

    def of_models(self, section: str) -> list[tuple[str, dict[str, Any]]]:
        """(model, its entry) of those that have one in a section of the results, in the order of their training."""
        entries = self.results[section]
        return [(model, entries[model]) for model in self.models if model in entries]

    def score(self, model: str, test: str) -> Mapping[str, Any] | None:
        """The record of one model on one test set, if it was evaluated there."""
        found: Mapping[str, Any] | None = self.results["models"][model]["tests"].get(test)
        return found

    def miou(self, model: str, test: str) -> float:
        """Mean IoU of a model that was evaluated on a test set, a fraction; the mean of its seeds."""
        return float(self.mean(model, test)["miou"])

    def mean(self, model: str, test: str) -> Mapping[str, Any]:
        """Metrics and class IoU, means over the seeds."""
        scores: Mapping[str, Any] = self.results["models"][model]["tests"][test]
        found: Mapping[str, Any] = scores.get("mean", scores)  # results of an earlier version have one seed
        return found

    def std(self, model: str, test: str) -> float | None:
        """Sample standard deviation of the mean IoU over the seeds; None for one seed."""
        found: float | None = self.results["models"][model]["tests"][test].get("std", {}).get("miou")
        return found

    def by_seed(self, model: str, test: str) -> dict[str, float]:
        """Mean IoU by seed, in the order of the seeds."""
        scores = self.results["models"][model]["tests"][test]
        return dict(sorted(scores.get("seeds", {"0": scores["miou"]}).items(), key=lambda item: int(item[0])))

    def trainings(self, model: str, stage: str = "model") -> dict[str, str]:
        """Training -> its node: "model", or "pseudo_label" of those that have one; that of the first seed first."""
        facts = self.results["models"][model]
        found = facts.get("trainings") or {model: facts}
        order = sorted(found, key=lambda name: (name != model, found[name].get("seed", 0)))
        return {name: found[name][stage] for name in order if found[name].get(stage)}

    def evaluations(self, model: str) -> dict[str, str]:
        """Training -> the node of its evaluation, of those that have one."""
        facts = self.results["models"][model]
        found = facts.get("trainings") or {model: facts}
        nodes = {name: next((s.get("node", "") for s in one["tests"].values()), "") for name, one in found.items()}
        return {name: node for name, node in nodes.items() if node}

    def history(self, node: str) -> list[dict[str, Any]]:
        """One record an epoch of a training; none where it is not there."""
        commit = self.commit(node)
        found: list[dict[str, Any]] = []
        if commit is not None and commit.has("history.json"):
            found = commit.json("history.json")
        return found

    def epochs(self, node: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(steps of the training by then, record) of each epoch."""
        step = 0
        for record in self.history(node):
            step += record.get("steps", 0)
            yield step, record

    def class_by_seed(self, model: str, test: str, name: str) -> dict[str, float]:
        """IoU of a class by seed, without seeds where it has none."""
        facts = self.results["models"][model]
        records = {str(one["seed"]): one["tests"][test] for one in facts.get("trainings", {}).values()}
        found = (records or {"0": facts["tests"][test]}).items()
        return {seed: record["iou"][name] for seed, record in found if record["iou"].get(name) is not None}

    def scored(self, test: str) -> list[str]:
        """Models that were evaluated on a test set."""
        return [model for model in self.models if self.score(model, test)]

    def best(self, test: str) -> str:
        """The model with the highest mIoU on a test set, the earliest of equals."""
        return max(self.scored(test), key=lambda model: self.miou(model, test))

    @cached_property
    def night_test(self) -> str | None:
        """The first test set of night frames, if there is one."""
        for test in self.tests:
            rows = self.predictions(self.scored(test)[0], test, limit=64)
            domains = Counter(row[frame.DOMAIN] for row in rows)
            if domains and domains.most_common(1)[0][0] == "night":
                return test
        return next((test for test in self.tests if "night" in test), None)

    @property
    def main_test(self) -> str | None:
        """The test set that the headline speaks of: the first one of night frames, else the first."""
        return self.night_test or next(iter(self.tests), None)

    def predictions(self, model: str, test: str, limit: int | None = None) -> list[Row]:
        """The predictions of a model on a test set; all uris absolute. One commit has those of all test sets."""
        rows = self.rows((self.score(model, test) or {}).get("node", ""), "predictions")
        return [row for row in rows if test in row["test_sets"]][:limit]

    def nodes(self, stage: str) -> list[str]:
        """`stage/name` of every commit of a stage, in the order in which they were made."""
        return [node for node in self.order if node.partition("/")[0] == stage]

    def commit(self, node: str) -> Commit | None:
        """The commit of `stage/name`: in this run folder, which may have been moved, or where it was borrowed from."""
        if node not in self._commits and node in self.results["commits"]:
            facts = self.results["commits"][node]
            recorded = Location.of(facts["folder"]).parent
            found = map(read_commit, (self.root / f"stages/{node}/{recorded.name}", recorded))
            fitting = next((commit for commit in found if commit is not None and commit.key == facts["key"]), None)
            if fitting is not None:
                check_contents(fitting)
            self._commits[node] = fitting
        return self._commits.get(node)

    def rows(self, node: str, table: str, limit: int | None = None, drop: Sequence[str] = ()) -> list[Row]:
        """Rows of a committed table, uris made absolute; no more parts are read than `limit` needs."""
        commit = self.commit(node)
        found: list[Row] = []
        if commit is None:
            return found
        for path in table_paths(commit.outputs, table):
            part = commit.part(path)
            found += _absolute(part.drop_columns([name for name in drop if name in part.column_names]), commit.folder)
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    def rows_of(self, node: str, table: str, frame_ids: Collection[str]) -> dict[str, Row]:
        """Those rows of a committed table that are of these frames, by id, uris made absolute."""
        commit, found = self.commit(node), dict[str, Row]()
        for path in table_paths(commit.outputs, table) if commit is not None else ():
            assert commit is not None
            part = commit.part(path)
            asked = pc.is_in(part[frame.FRAME_ID], pa.array(list(frame_ids), pa.string()))
            found |= {row[frame.FRAME_ID]: row for row in _absolute(part.filter(asked), commit.folder)}
        return found


def _absolute(table: pa.Table, folder: Location) -> list[Row]:
    rows: list[Row] = frame.resolve(table, folder).to_pylist()
    known = (frame.URI, frame.LABEL_URI)
    for row in rows:
        for name, value in row.items():
            if name.endswith("_uri") and name not in known and value is not None:
                row[name] = (folder / value).uri
    return rows


def taught(run: Run, entry: Mapping[str, Any], limit: int) -> list[tuple[Row, Row]]:
    """Frames with the labels of their teacher as a model learns them, and what is kept of each; of the results'
    `pseudo_labels`."""
    frames, facts = run.rows(entry["evidence"]["labels"], "frames", limit), run.rows(entry["node"], "labels", limit)
    return list(zip(as_kept(run, entry["node"], frames), facts, strict=False))


def as_kept(run: Run, node: str, rows: Iterable[Row]) -> list[Row]:
    """Rows of frames with the labels of a teacher, and what these pseudo-labels keep of them."""
    commit = run.commit(node)
    kept = None if commit is None else commit.file(KEPT_NAME).read_bytes().decode()
    return [] if kept is None else [{**row, frame.LABEL_KEPT: kept} for row in rows]


def source_of(run: Run, row: Row) -> Row | None:
    """The frame that a translated frame was made from; its id is that of the source behind the data set's name."""
    wanted = source_id(row)
    dataset = wanted.partition("/")[0]
    found = (other for other in run.rows(f"collect/{dataset}", "frames") if other[frame.FRAME_ID] == wanted)
    return next(found, None)


def by_accuracy(predictions: list[Row]) -> list[Row]:
    """Predictions from the worst frame to the best, by pixel accuracy; frames without a labelled pixel are left out."""
    return sorted(
        (row for row in predictions if any(row["confusion"])), key=lambda row: (accuracy(row), row["frame_id"])
    )


def accuracy(prediction: Row) -> float:
    """Pixel accuracy of one frame, a fraction."""
    counts = np.asarray(prediction["confusion"], dtype=np.int64)
    side = int(len(counts) ** 0.5)
    return float(np.trace(counts.reshape(side, side)) / counts.sum())


def spread(rows: list[Any], samples: int) -> list[Any]:
    """At most `samples` rows, evenly over the list, first and last included."""
    if len(rows) <= samples:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, samples).round().astype(int)]


def source_id(row: Row) -> str:
    """Id of the frame that a translated frame was made from."""
    return str(row[frame.FRAME_ID]).removeprefix(f"{row[frame.DATASET]}/")
