"""The order of things: a recipe as a graph of stages. No other module knows which stage follows which.

`build_graph` walks down from the recipe's models to the folders and gives every stage one node, however many models
share it: the model that four students start from is trained once, a pool is scored once for all selections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data import layouts
from nightseg.data.settings import FolderDataset, JoinedDataset, ScenesDataset, SplitDataset, TranslatedDataset
from nightseg.data.taxonomy import taxonomy
from nightseg.pipeline.build_translation import evaluate_translation_of, score_frames, translate_untrained
from nightseg.pipeline.graph import Graph, Inputs, ModelNodes, Node, NodeId, TestNode, View, Views, Work
from nightseg.progress import Progress
from nightseg.recipe.chain import expand_rounds
from nightseg.recipe.names import is_ready
from nightseg.recipe.types import Model, Recipe, SelfTraining, TestRow
from nightseg.segmenter import inference as modes
from nightseg.segmenter.settings import Inference
from nightseg.segmenter.starting import start_identity, weights_identity
from nightseg.stages import (
    collect,
    evaluate,
    predict,
    pseudo_label,
    score,
    select,
    split,
    train_segmenter,
    train_translator,
    translate,
)
from nightseg.storage import Attempt, Commit, Location, UserError, hash_of
from nightseg.unit.settings import Translator
from nightseg.unit.start import start_sha256


def build_graph(recipe: Recipe, only: str | None = None) -> Graph:
    """The whole recipe as nodes; with `only`, what that model needs and its own evaluations."""
    builder = _Builder(recipe)
    if only is not None and only not in builder.models:
        raise UserError(f"--only {only}: the recipe has no such model; known: {', '.join(builder.models) or 'none'}")
    if only is None:
        for name in recipe.datasets:
            builder.dataset(name)
        for name, settings in recipe.translators.items():
            if isinstance(settings, Translator):
                builder.translator(name)
    for name in builder.models if only is None else [only]:
        builder.model(name)
    for name in builder.models if only is None else [only]:
        builder.tests(name)
    for name, prediction in recipe.predictions.items():
        if only in (None, prediction.model):
            builder.prediction(name)
    for name in recipe.translations if only is None else ():
        evaluate_translation_of(builder, name)
    return builder.graph


class _Builder:
    """Collects nodes; every method returns where the thing it was asked for will be, making it first if need be."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.models = expand_rounds(recipe.models)
        self.graph = Graph()
        classes = taxonomy(recipe.taxonomy)
        self.taxonomy = {
            "classes": list(classes.classes),
            "encodings": {
                name: {str(raw): train for raw, train in sorted(ids.items())} for name, ids in classes.encodings.items()
            },
        }

    # -- frames ------------------------------------------------------------------------------------------------------

    def dataset(self, name: str) -> Views:
        if name not in self.graph.datasets:
            self.graph.datasets[name] = self._views(name)
        return self.graph.datasets[name]

    def datasets(self, names: Iterable[str]) -> Views:
        return tuple(view for name in names for view in self.dataset(name))

    def _views(self, name: str) -> Views:
        match self.recipe.datasets[name]:
            case FolderDataset() | ScenesDataset() as source:
                return (View(self._collect(name, source)),)
            case SplitDataset(split=pool, keep=keep, margin=margin):
                return (View(self._split(pool, margin), keep),)
            case JoinedDataset(join=names):
                return self.datasets(names)
            case TranslatedDataset() as dataset:
                return (View(self._translate(name, dataset)),)
        raise AssertionError(name)

    def _collect(self, name: str, dataset: FolderDataset | ScenesDataset) -> NodeId:
        recipe, part = self.recipe, dataset.model_dump(mode="json")
        expected = dataset.count if isinstance(dataset, ScenesDataset) else None
        if isinstance(dataset, FolderDataset):
            layout, root = dataset.layout, Location.of(dataset.root)
            of: dict[str, Any] = {"split": dataset.split, "labelled": dataset.labelled, "limit": dataset.limit}
            part["listing"] = layouts.fingerprint(layout, root, **of)
            expected = layouts.count(layout, root, **of)

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return collect.collect(
                dataset,
                name=name,
                taxonomy=recipe.taxonomy,
                **self._spread(attempt, progress),
            )

        part |= self._frame_pass() | {"taxonomy": hash_of(self.taxonomy)}
        return self._add("collect", name, collect.VERSION, part, (), work, expected_rows=expected)

    def _split(self, pool: str, margin: float) -> NodeId:
        views = self.dataset(pool)

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return split.split(
                inputs.frames(views),
                margin=margin,
                **self._spread(attempt, progress),
            )

        name = pool if margin == SplitDataset.model_fields["margin"].default else f"{pool}.margin-{margin:g}"
        return self._add("split", name, split.VERSION, {"margin": margin, **self._frame_pass()}, views, work)

    # -- translators -------------------------------------------------------------------------------------------------

    def translator(self, name: str) -> NodeId:
        settings = self.recipe.translators[name]
        assert isinstance(settings, Translator), name  # the other kinds learn nothing
        day, night = self.dataset(settings.day), self.dataset(settings.night)

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return train_translator.train_translator(
                settings,
                day=inputs.frames(day),
                night=inputs.frames(night),
                seed=attempt.seed,
                attempt=attempt,
                compute=self.recipe.compute.train,
                progress=progress,
            )

        not_learned = {"kind", "day", "night", "preset", "tile", "collapse_after"}
        part = settings.model_dump(mode="json", exclude=not_learned) | {"start": start_sha256(settings.start)}
        part |= {"day": [str(view) for view in day], "night": [str(view) for view in night]}
        return self._add(
            "train_translator", name, train_translator.VERSION, part, day + night, work, seed=self.recipe.seed
        )

    def _translate(self, name: str, dataset: TranslatedDataset) -> NodeId:
        settings = self.recipe.translators[dataset.by]
        if not isinstance(settings, Translator):
            return translate_untrained(self, name, dataset)
        views, translator, tile = self.dataset(dataset.translate), self.translator(dataset.by), settings.tile

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return translate.translate(
                inputs.frames(views),
                inputs[translator],
                name=name,
                to=dataset.to,
                tile=tile,
                **self._spread(attempt, progress),
            )

        part = {"to": dataset.to, "of": [str(view) for view in views], **self._frame_pass()}
        part |= {"tile": list(tile)} if tile else {}
        return self._add("translate", name, translate.VERSION, part, (*views, translator), work)

    # -- models ------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> NodeId:
        if name in self.graph.models:
            return self.graph.models[name].train
        model, recipe = self.models[name], self.recipe
        start = model.start if is_ready(model.start) else self.model(model.start)
        train, validate = self.datasets(model.train), self.datasets(model.validate_on)
        chosen, pseudo = None, None
        if model.self_training is not None:
            chosen, pseudo = self._pseudo_label(name, model, model.self_training)
            train = (*train, View(pseudo))
        network, loss, training = recipe.network_of(model), recipe.loss_of(model), recipe.training_of(model)
        train_segmenter.check_network(network, name)

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return train_segmenter.train_segmenter(
                inputs.frames(train),
                inputs.frames(validate) if validate else None,
                name=name,
                network=network,
                loss=loss,
                training=training,
                start=start if isinstance(start, str) else inputs[start],
                taxonomy=recipe.taxonomy,
                seed=attempt.seed,
                attempt=attempt,
                compute=recipe.compute.train,
                progress=progress,
            )

        part: dict[str, Any] = {
            "network": network.identity() | {"encoder_weights": weights_identity(network.encoder_weights, str(start))},
            "loss": loss.model_dump(mode="json"),
            "training": training.model_dump(mode="json", exclude={"preset", "checkpoint_every"}),
            "train": [str(view) for view in train],
            "validate_on": [str(view) for view in validate],
            "start": start_identity(start) if isinstance(start, str) else str(start),
            "taxonomy": self.taxonomy,
        }
        if recipe.compute.train.workers > 1 and network.norm == "batch" and not training.freeze_batch_norm:
            part["workers"] = recipe.compute.train.workers  # each norm sees a worker's share of the batch only
        needs: list[View | NodeId] = [*train, *validate, *([] if isinstance(start, str) else [start])]
        node = self._add(
            "train_segmenter", name, train_segmenter.VERSION, part, needs, work, recipe.compute.train, recipe.seed
        )
        facts = {
            "start": model.start,
            "parents": [] if isinstance(start, str) else [model.start],
            "train": model.train,
            "loss": loss.model_dump(mode="json"),
            "self_training": model.self_training.model_dump(mode="json") if model.self_training else None,
        }
        self.graph.models[name] = ModelNodes(node, chosen, pseudo, facts, {})
        return node

    def _pseudo_label(self, name: str, model: Model, learning: SelfTraining) -> tuple[NodeId | None, NodeId]:
        teacher, looks = self.model(learning.teacher or model.start), learning.inference or self.recipe.inference
        chosen = self._select(name, model, learning)
        views = self.dataset(learning.pool) if chosen is None else (View(chosen),)

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return pseudo_label.pseudo_label(
                inputs.frames(views),
                inputs[teacher],
                name=name,
                threshold=learning.threshold,
                taxonomy=self.recipe.taxonomy,
                **self._spread(attempt, progress, looks),
            )

        part = learning.threshold.model_dump(mode="json") | self._frame_pass(looks)
        part |= {"of": [str(view) for view in views], "teacher": str(teacher), "taxonomy": self.taxonomy}
        return chosen, self._add("pseudo_label", name, pseudo_label.VERSION, part, (*views, teacher), work)

    def _select(self, name: str, model: Model, learning: SelfTraining) -> NodeId | None:
        choice = learning.select
        if choice is None:
            return None
        pool = self.dataset(learning.pool)
        translated = [name for name in model.train if isinstance(self.recipe.datasets[name], TranslatedDataset)]
        near = [choice.reference] if choice.reference else translated
        spatial = choice.method == "spatial" and bool(near)
        extraction = score.Extraction.of(choice)
        reference = score_frames(self, near, extraction, positions=spatial) if near else None
        scored = score_frames(self, [learning.pool], extraction, spatial_reference=reference if spatial else None)
        sources = self._sources(near)
        tests = {test: self._sources([dataset]) for test, dataset in self.recipe.test_sets.items()}

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return select.select(
                inputs.frames(pool),
                inputs[scored],
                inputs[reference] if reference else None,
                method=choice.method,
                count=choice.count,
                rules=select.Rules(choice.quota, choice.gap, choice.duplicates),
                seed=attempt.seed,
                reference_frames=inputs.frames(sources) if sources else None,
                test_frames={test: inputs.frames(views) for test, views in tests.items()},
                attempt=attempt,
                progress=progress,
            )

        part = choice.model_dump(mode="json") | {"pool": [str(view) for view in pool], "reference": near}
        needs: list[View | NodeId] = [*pool, scored, *([reference] if reference else []), *sources]
        needs += [view for views in tests.values() for view in views]
        sizes: dict[str, Any] = {"takes": pool, "most_rows": choice.count}
        return self._add("select", name, select.VERSION, part, needs, work, seed=self.recipe.seed, **sizes)

    def _sources(self, names: Iterable[str]) -> Views:
        """The views that the frames of these datasets were made from: where a leak of test frames can be seen."""
        found: list[View] = []
        for name in names:
            match self.recipe.datasets[name]:
                case TranslatedDataset(translate=source):
                    found += self._sources([source])
                case JoinedDataset(join=parts):
                    found += self._sources(parts)
                case _:
                    found += self.dataset(name)
        return tuple(dict.fromkeys(found))

    # -- evidence ----------------------------------------------------------------------------------------------------

    def tests(self, name: str) -> None:
        """Evaluate a model on its test sets, all of the recipe's unless it names its own."""
        settings = self.models[name].test
        rows = settings if settings is not None else {test: TestRow() for test in self.recipe.test_sets}
        nodes = self.graph.models[name]
        tests = {
            test: TestNode(self._evaluate(name, test, nodes.train), row.row, row.published_miou)
            for test, row in rows.items()
        }
        self.graph.models[name] = ModelNodes(nodes.train, nodes.select, nodes.pseudo_label, nodes.facts, tests)

    def _evaluate(self, model: str, test: str, trained: NodeId) -> NodeId:
        views, looks = self.dataset(self.recipe.test_sets[test]), self.recipe.inference
        boundary = self.recipe.evaluation.boundary

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return evaluate.evaluate(
                inputs.frames(views),
                inputs[trained],
                name=f"{model}.{test}",
                taxonomy=self.recipe.taxonomy,
                boundary=boundary,
                **self._spread(attempt, progress, looks),
            )

        part = {"of": [str(view) for view in views], "taxonomy": self.taxonomy, **self._frame_pass(looks)}
        part |= {} if boundary is None else {"boundary": boundary}
        return self._add("evaluate", f"{model}.{test}", evaluate.VERSION, part, (*views, trained), work)

    def prediction(self, name: str) -> None:
        wanted = self.recipe.predictions[name]
        views, trained, looks = self.dataset(wanted.dataset), self.model(wanted.model), self.recipe.inference

        def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
            return predict.predict(
                inputs.frames(views),
                inputs[trained],
                name=name,
                **self._spread(attempt, progress, looks),
            )

        part = {"of": [str(view) for view in views], **self._frame_pass(looks)}
        node = self._add("predict", name, predict.VERSION, part, (*views, trained), work)
        self.graph.predictions[name] = (node, wanted)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _spread(self, attempt: Attempt, progress: Progress, looks: Inference | None = None) -> dict[str, Any]:
        """The arguments that every pass over frames takes, and how a pass with a segmenter looks at them."""
        compute, bad = self.recipe.compute.map, self.recipe.max_bad_fraction
        seen = {"inference": modes.Inference(**looks.model_dump())} if looks else {}
        return {"attempt": attempt, "progress": progress, "compute": compute, "max_bad_fraction": bad, **seen}

    def _frame_pass(self, looks: Inference | None = None) -> dict[str, Any]:
        """What shapes the output of a pass over frames: shards are files, and too many bad frames are an error."""
        part = {"shard_rows": self.recipe.compute.map.shard_rows, "max_bad_fraction": self.recipe.max_bad_fraction}
        # Whole frames leave no trace, so what was made before there were other ways to look is not made again.
        return part if looks is None or looks == Inference() else part | {"inference": looks.model_dump(mode="json")}

    def _add(
        self,
        stage: str,
        name: str,
        version: int,
        part: Mapping[str, Any],
        needs: Sequence[View | NodeId],
        work: Work,
        compute: MapCompute | TrainCompute | None = None,
        seed: int = 0,
        expected_rows: int | None = None,
        takes: Views | None = None,
        most_rows: int | None = None,
    ) -> NodeId:
        node = NodeId(stage, name)
        if node not in self.graph.nodes:
            inputs = dict.fromkeys(need.node if isinstance(need, View) else need for need in needs)
            views = takes if takes is not None else [need for need in needs if isinstance(need, View)]
            taken = tuple(dict.fromkeys(view.node for view in views))
            where = compute or (self.recipe.compute.train if stage.startswith("train") else self.recipe.compute.map)
            self.graph.nodes[node] = Node(
                node, version, part, tuple(inputs), taken, where, work, seed, expected_rows, most_rows
            )
        return node
