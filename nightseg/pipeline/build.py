"""The order of things: a recipe as a graph of stages. No other module knows which stage follows which.

`build_graph` walks down from the recipe's models to the folders and gives every stage one node, however many models
share it: the model that four students start from is trained once, a pool is scored once for all selections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, Literal

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data import layouts
from nightseg.data.class_list import taxonomy
from nightseg.data.settings import FolderDataset, JoinedDataset, ScenesDataset, SplitDataset, TranslatedDataset
from nightseg.data.sources import Video
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError, closest
from nightseg.pipeline.graph import (
    CPU_STAGES,
    TABLE_STAGES,
    Frames,
    Given,
    Graph,
    ModelNodes,
    Node,
    NodeId,
    Source,
    Use,
    View,
    Views,
    Watched,
)
from nightseg.recipe.checks import way_missing
from nightseg.recipe.types import (
    Compute,
    Evaluation,
    Model,
    Recipe,
    SelfTraining,
    TestRow,
    TranslationEvaluation,
    expand_seeds,
    is_ready,
)
from nightseg.segmenter.settings import AdaptNorms, Guard, Inference, Online, Teaching
from nightseg.segmenter.start import start_identity, weights_identity
from nightseg.selection.settings import METHODS, Extraction, Selection
from nightseg.stages import (
    adapt_norms,
    collect,
    consistency,
    evaluate,
    evaluate_translation,
    label,
    predict,
    pseudo_label,
    score,
    select,
    split,
    train_segmenter,
    train_translator,
    translate,
)
from nightseg.storage import hash_of
from nightseg.translators.settings import ColourTranslator, CommandTranslator, FourierTranslator, PhotometricTranslator
from nightseg.unit.settings import Translator
from nightseg.unit.start import start_sha256

NOTHING: Final[Mapping[str, Any]] = {}
PSEUDO_LABELS: Final = "(pseudo-labels)"  # no dataset can have this name
DEFAULT_EXTRACTOR: Final = "efficientnet_lite0"  # its weights come with a package: nothing has to be fetched


def build_graph(recipe: Recipe, only: str | None = None) -> Graph:
    """The whole recipe as nodes; with `only`, what that model needs and its own evaluations."""
    builder = Builder(recipe)
    names = list(dict.fromkeys(trained.of for trained in builder.trained.values()))
    if only is not None and only not in names:
        raise UserError(
            f"{recipe.name}: the recipe has no such model: {only!r}{closest(only, names)}",
            cure=f"one of its models: {', '.join(names) or 'none'}",
        )
    first = [name for name in names if only in (None, name)]
    if only is None:
        for name, dataset in recipe.datasets.items():
            if not (isinstance(dataset, TranslatedDataset) and dataset.fresh):  # trainings translate them as they go
                builder.dataset(name)
        for name, settings in recipe.translators.items():
            if isinstance(settings, Translator):
                builder.train_translator(name)
    for name in first:
        builder.model(name)
    for name in first:
        builder.evaluate(name)
    for name, prediction in recipe.predictions.items():
        if only in (None, prediction.model):
            frames = builder.dataset(prediction.dataset)
            node = builder.predict(name, frames, builder.model(prediction.model), inference=recipe.inference)
            builder.graph.predictions[name] = (node, prediction)
    for name in recipe.translations if only is None else ():
        builder.evaluate_translation(name)
    for name, trained in builder.trained.items():  # A first answer comes early: the other seeds follow it.
        if name != trained.of and trained.of in first:
            builder.model(name)
            builder.evaluate(name)
    for name in first:  # all seeds of a model learn from the same frames
        builder.watch(name)
    builder.graph.order()
    return builder.graph


# -- without a recipe -------------------------------------------------------------------------------------------------

POOL, REFERENCE = "pool", "reference"  # names of the sets of frames


def split_graph(images: str, margin: float, compute: MapCompute, max_bad_fraction: float = 1.0) -> Graph:
    """A folder of images collected and split."""
    builder = _without_recipe({POOL: images}, compute, max_bad_fraction=max_bad_fraction)
    builder.split(POOL, margin)
    return builder.graph


def selection_graph(
    places: Mapping[str, str | Given],
    selection: Selection,
    seed: int,
    compute: MapCompute,
    max_bad_fraction: float = 1.0,
) -> Graph:
    """Frames of POOL chosen by their features, close to those of REFERENCE if there is one."""
    builder = _without_recipe(places, compute, seed, max_bad_fraction)
    builder.select(POOL, selection, POOL, [REFERENCE] if REFERENCE in places else [])
    builder.graph.order()
    return builder.graph


def distance_graph(
    sets: Mapping[str, Given], extraction: Extraction, compute: MapCompute, max_bad_fraction: float
) -> Graph:
    """Each set scored, if there is any. Without its bad frames it is another set, so few should be allowed."""
    if not sets:
        return Graph()
    builder = _without_recipe(sets, compute, max_bad_fraction=max_bad_fraction)
    for name in sets:
        builder.score([name], extraction)
    return builder.graph


def _without_recipe(
    places: Mapping[str, str | Given], compute: MapCompute, seed: int = 0, max_bad_fraction: float = 1.0
) -> Builder:
    """Image folders and frame tables as datasets. Of frames from the road some are always broken: they are listed."""
    folders: dict[str, Any] = {
        name: FolderDataset.of_images("" if isinstance(place, Given) else place) for name, place in places.items()
    }
    computing = Compute(map=compute)
    builder = Builder(
        Recipe(name="single", seed=seed, datasets=folders, max_bad_fraction=max_bad_fraction, compute=computing)
    )
    builder.graph.datasets |= {name: (place,) for name, place in places.items() if isinstance(place, Given)}
    return builder


def prediction_graph(
    images: Given | None,
    videos: Sequence[Video],
    source: str,
    settings: Mapping[str, Any],
    overlay_video: bool,
    unhashed: Mapping[str, Any],
    model_sha256: str,
    compute: MapCompute,
) -> Graph:
    """A model folder on images and videos: a node for all images, and one a video. `source` identifies the files."""
    graph = Graph()
    # The batch is part of it: a network may round differently with another one.
    known = {"model": model_sha256, "batch": compute.batch, "shard_rows": compute.shard_rows}
    rest = {**unhashed, "compute": compute}
    if images is not None:
        node, inputs = NodeId("predict", "images"), {"frames": Frames((images,))}
        graph.nodes[node] = Node(
            node, predict.VERSION, predict.predict, compute, inputs,
            {**settings, "max_bad_fraction": 1.0}, {**rest, "name": "images"}, known,
        )  # fmt: skip
    for number, video in enumerate(videos):
        node = NodeId("predict", f"video-{number}")
        graph.nodes[node] = Node(
            node, predict.VERSION, predict.predict_video, compute, NOTHING,
            {**settings, "overlay_video": overlay_video, "name": video.name},
            {**rest, "video": video.file}, {**known, "source": source},
        )  # fmt: skip
    return graph


def evaluation_graph(
    pairs: Given,
    taxonomy: str,
    label_encoding: str | None,
    evaluation: Evaluation,
    compute: MapCompute,
    max_bad_fraction: float,
) -> Graph:
    """The scores of predictions that lie in a folder."""
    node = NodeId("evaluate", "folders")
    settings = {
        "taxonomy": taxonomy,
        "label_encoding": label_encoding,
        "evaluation": evaluation,
        "max_bad_fraction": max_bad_fraction,
    }
    call, facts = evaluate.evaluate_folders, {"shard_rows": compute.shard_rows}
    inputs, resources = {"pairs": Frames((pairs,))}, compute.on_cpus
    unhashed = {"compute": resources}
    return Graph({node: Node(node, evaluate.VERSION, call, resources, inputs, settings, unhashed, facts)})


# -- of a recipe ------------------------------------------------------------------------------------------------------


class Builder:
    """Collects nodes; every method returns where the thing it was asked for will be, making it first if need be."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.trained = expand_seeds(recipe)
        self.models = {name: trained.model for name, trained in self.trained.items()}
        self.graph = Graph()
        self.classes = {"taxonomy": _told(taxonomy(recipe.taxonomy))}

    def _named(self, name: str) -> dict[str, Any]:
        """What stages that read or write labels are given, and their results do not follow from: `classes` says it."""
        return {"name": name, "taxonomy": self.recipe.taxonomy}

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
                return (View(self.collect(name, source)),)
            case SplitDataset(split=pool, keep=keep, margin=margin):
                return (View(self.split(pool, margin), keep),)
            case JoinedDataset(join=names):
                return self.datasets(names)
            case TranslatedDataset() as dataset:
                return (View(self.translate(name, dataset)),)
        raise AssertionError(name)

    def collect(self, name: str, dataset: FolderDataset | ScenesDataset) -> NodeId:
        facts: dict[str, Any] = {"taxonomy": hash_of(self.classes | _colors(taxonomy(self.recipe.taxonomy)))}
        if isinstance(dataset, ScenesDataset):
            expected = dataset.count
        else:
            facts |= {"listing": layouts.fingerprint(dataset)}
            if dataset.taxonomy is not None:
                theirs = taxonomy(dataset.taxonomy)
                facts["own taxonomy"] = hash_of(_told(theirs) | _colors(theirs))
            expected = layouts.count(dataset)
        settings = {"dataset": dataset}
        return self._add(collect, name, {}, settings, unhashed=self._named(name), facts=facts, expected_rows=expected)

    def split(self, pool: str, margin: float) -> NodeId:
        name = pool if margin == SplitDataset.model_fields["margin"].default else f"{pool}.margin-{margin:g}"
        return self._add(split, name, {"pool": Frames(self.dataset(pool))}, {"margin": margin})

    # -- translators -------------------------------------------------------------------------------------------------

    def train_translator(self, name: str) -> NodeId:
        settings = self.recipe.translators[name]
        assert isinstance(settings, Translator), name  # the other kinds learn nothing
        inputs: dict[str, Source] = {
            "day": Frames(self.dataset(settings.day)),
            "night": Frames(self.dataset(settings.night)),
        }
        facts = {"start": start_sha256(settings.start)}
        return self._add(train_translator, name, inputs, {"settings": settings}, facts=facts, counted=("day", "night"))

    def translate(self, name: str, dataset: TranslatedDataset) -> NodeId:
        settings = self.recipe.translators[dataset.by]
        source: dict[str, Source] = {"source": Frames(self.dataset(dataset.translate))}
        common, unhashed = {"to": dataset.to}, self._named(name)
        if isinstance(settings, Translator):
            inputs = {**source, "translator": self.train_translator(dataset.by)}
            return self._add(translate, name, inputs, {**common, "tile": settings.tile}, unhashed=unhashed)
        style = _style_images(settings, dataset.to)
        return self._add(
            translate,
            name,
            {**source, "style_images": Frames(self.dataset(style)) if style else None},
            {**common, "translator": settings},
            unhashed={**unhashed, "style_dataset": style},
            facts=self.classes if isinstance(settings, PhotometricTranslator | CommandTranslator) else {},
            seed=self.recipe.seed,
            on_cpus=not isinstance(settings, CommandTranslator),  # a program of the user may have use for a GPU
        )

    # -- models ------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> NodeId:
        if name in self.graph.models:
            return self.graph.models[name].train
        (model, of, seed), recipe = self.trained[name], self.recipe
        ready = is_ready(model.start)
        start = None if ready else self.model(model.start)
        if model.adapt_norms is not None:
            return self._adapt_norms(name, model, model.adapt_norms, start)
        validate = self.datasets(model.validate_on)
        train = {dataset: Frames(self._trained_on(dataset)) for dataset in model.train_sets}
        weights = dict(model.train) if isinstance(model.train, dict) else None
        chosen, pseudo, learning = None, None, model.self_training
        network, loss, training = recipe.network_of(model), recipe.loss_of(model), recipe.training_of(model)
        train_segmenter.check_network(network, name)
        workers, fresh = recipe.compute.train.workers, self._fresh(model) or None
        inputs: dict[str, Source] = {"train": train, "validate": Frames(validate) if validate else None}
        online: dict[str, Any] = {}
        told = self._named(name) | ({"start": model.start} if ready else {})
        if learning is not None and learning.mode == "online":
            chosen, pool = self._pool(name, model, learning)
            inputs["pool"], online["teaching"] = Frames(pool), _teaching(learning)
            train_segmenter.check_online(name, online["teaching"].online, training, workers)
            told["warnings"] = self._warnings_of_teacher(name)
        elif learning is not None:
            chosen, labels, pseudo = self._pseudo_label(name, of, model, learning)
            train[PSEUDO_LABELS], inputs["kept"] = Frames((View(labels),)), {PSEUDO_LABELS: pseudo}
            if weights is not None:
                weights[PSEUDO_LABELS] = learning.weight
        facts = {
            **self.classes,
            "parts": list(train),  # in this order frames are drawn
            "start": start_identity(model.start) if ready else str(start),
            "encoder_weights": weights_identity(network.encoder_weights, model.start),
            # Each batch norm sees a worker's share of the batch only.
            "workers": workers if network.norm == "batch" and not training.freeze_batch_norm else 1,
        }
        node = self._add(
            train_segmenter,
            name,
            inputs if start is None else {**inputs, "start": start},
            {"network": network, "loss": loss, "training": training, "weights": weights, "fresh": fresh, **online},
            unhashed=told,
            facts=facts,
            counted=("train", "validate", "pool") if online else ("train", "validate"),
            seed=recipe.seed + seed,
        )
        shown = self._shown(model) | {"train": model.train_sets, "weights": weights}
        self.graph.models[name] = ModelNodes(node, chosen, pseudo, shown, of, seed)
        return node

    def _adapt_norms(self, name: str, model: Model, norms: AdaptNorms, start: NodeId | None) -> NodeId:
        _, of, seed = self.trained[name]
        node = self._add(
            adapt_norms,
            name,
            {"frames": Frames(self.dataset(norms.pool)), "start": start},
            {"norms": norms},
            unhashed={"name": name} | ({"start": model.start} if start is None else {}),
            facts={"start": start_identity(model.start) if start is None else str(start)},
            seed=self.recipe.seed + seed,
        )
        of_start = {} if start is None else self.graph.models[model.start].facts
        kept = {key: of_start[key] for key in ("network", "loss", "training") if key in of_start}
        shown = {**self._shown(model), **kept, "train": [], "weights": None}
        self.graph.models[name] = ModelNodes(node, None, None, shown, of, seed)
        return node

    def _shown(self, model: Model) -> dict[str, Any]:
        """What the results say of a model."""
        recipe = self.recipe
        return {
            "about": model.about,
            "start": model.start,
            "validate_on": model.validate_on,
            "parents": [] if is_ready(model.start) else [model.start],
            "network": recipe.network_of(model).model_dump(mode="json"),
            "loss": recipe.loss_of(model).model_dump(mode="json"),
            "training": recipe.training_of(model).model_dump(mode="json"),
            "self_training": model.self_training.model_dump(mode="json") if model.self_training else None,
            "adapt_norms": model.adapt_norms.model_dump(mode="json") if model.adapt_norms else None,
        }

    def _trained_on(self, name: str) -> Views:
        """The frames that a training reads: of a dataset that it translates itself, those to translate."""
        dataset = self.recipe.datasets[name]
        if isinstance(dataset, TranslatedDataset) and dataset.fresh:
            return self.dataset(dataset.translate)
        return self.dataset(name)

    def _fresh(self, model: Model) -> dict[str, PhotometricTranslator]:
        """Train sets that a training translates itself, with their translators."""
        found = {}
        for name in model.train_sets:
            dataset = self.recipe.datasets[name]
            if isinstance(dataset, TranslatedDataset) and dataset.fresh:
                translator = self.recipe.translators[dataset.by]
                assert isinstance(translator, PhotometricTranslator), name  # the recipe was checked
                found[name] = translator
        return found

    def _pool(self, name: str, model: Model, learning: SelfTraining) -> tuple[NodeId | None, Views]:
        """The unlabelled frames to learn from, and the node that chose them: once for all seeds, where no chance is in
        the choice."""
        if learning.select is None:
            return None, self.dataset(learning.pool)
        translated = [name for name in model.train_sets if isinstance(self.recipe.datasets[name], TranslatedDataset)]
        near = [learning.select.reference] if learning.select.reference else translated
        _, of, seed = self.trained[name]
        by_seed = (name, seed) if METHODS[learning.select.method].is_drawn else (of, 0)
        chosen = self.select(by_seed[0], learning.select, learning.pool, near, by_seed[1])
        return chosen, (View(chosen),)

    def _warnings_of_teacher(self, name: str) -> tuple[str, ...]:
        """Nothing is learned of dark skies from a teacher that takes them for something else."""
        line = list(self._line(name, {}))
        if any(self._is_night(dataset) for model in line for dataset in self.models[model].train_sets):
            return ()
        if folders := [start for model in line if "/" in (start := self.models[model].start)]:
            return (f"whether its teacher ever saw a labelled frame under night light is not known: {folders[0]}",)
        return (
            f"no train set of {' or '.join(line)} has labelled frames under night light: the teacher may take a dark "
            "sky for a road or a building, and teach it; train on day frames that are translated to night first, or "
            "say the domain of the datasets",
        )

    def _is_night(self, name: str) -> bool:
        """Whether a dataset of labelled frames has some under night light, as far as the recipe tells."""
        match self.recipe.datasets[name]:
            case TranslatedDataset(to=domain) | SplitDataset(keep=domain):
                return domain in ("night", "twilight")
            case FolderDataset(domain=domain, layout=layout):
                return domain in ("night", "twilight") or layout == "nighttime_driving"
            case ScenesDataset(mix=mix):
                return mix.get("night", 0) + mix.get("twilight", 0) > 0
            case JoinedDataset(join=names):
                return any(map(self._is_night, names))
        raise AssertionError(name)

    def _pseudo_label(
        self, name: str, of: str, model: Model, learning: SelfTraining
    ) -> tuple[NodeId | None, NodeId, NodeId]:
        """The selection, the labels of the teacher, and what of them is kept. Seeds that have the same frames and one
        teacher share its labels, too."""
        by = learning.teacher or model.start
        first = self.models[of].self_training
        assert first is not None, of
        teacher = self.model(by)
        chosen, frames = self._pool(name, model, learning)
        of_pool = f"{learning.pool}.{chosen.name}" if chosen else learning.pool
        labels = self.label(teacher, frames, of_pool, learning.inference)
        inputs: dict[str, Source] = {"labels": labels}
        settings = {"threshold": learning.threshold, "never_below": learning.never_below}
        if learning.never_below:
            inputs["labelled"] = Frames(tuple(view for name in model.train_sets for view in self._trained_on(name)))
        if (round_before := self._first_round(by, learning.pool)) is not None:
            inputs["first_round"], settings["guard"] = round_before, learning.guard or Guard(act="warn")
        is_shared = by == (first.teacher or self.models[of].start) and (chosen is None or chosen.name == of)
        kept = of if is_shared else name
        told = {**self._named(kept), "known_warnings": self._warnings_of_teacher(by)}
        return chosen, labels, self._add(pseudo_label, kept, inputs, settings, unhashed=told, facts=self.classes)

    def label(self, teacher: NodeId, frames: Views, of: str, inference: Inference | None) -> NodeId:
        """What a teacher says of frames: once for all that ask for the same, whatever they keep of it."""
        usual = self.recipe.inference
        own = "" if inference in (None, usual) else f".{hash_of(inference.model_dump(mode='json'))[:6]}"
        return self._add(
            label,
            f"{teacher.name}.{of}{own}",
            {"frames": Frames(frames), "teacher": teacher},
            {"inference": inference or usual},
            unhashed={"taxonomy": self.recipe.taxonomy},
            facts=self.classes,
        )

    def _first_round(self, teacher: str, pool: str) -> NodeId | None:
        """The labels of the first teacher of this pool that led to this one."""
        found = None
        for name in self._line(teacher, {}):  # the last one first
            learning, nodes = self.models[name].self_training, self.graph.models[name]
            if learning is not None and learning.pool == pool and nodes.pseudo_label is not None:
                found = self.graph.nodes[nodes.pseudo_label].inputs["labels"]
        assert found is None or isinstance(found, NodeId)
        return found

    # -- selections --------------------------------------------------------------------------------------------------

    def select(self, name: str, selection: Selection, pool: str, near: list[str], seed: int = 0) -> NodeId:
        """Frames of a pool that are close to those of the datasets `near`; `seed` of the training that they are for."""
        extraction, spatial = selection.extractor, selection.needs_positions and bool(near)
        reference = self.score(near, extraction, positions=spatial) if near else None
        return self._add(
            select,
            name,
            {
                "pool_frames": Frames(self.dataset(pool)),
                "pool_scores": self.score([pool], extraction, spatial_reference=reference if spatial else None),
                "reference_scores": reference,
            },
            {"selection": selection},
            unhashed={"seed": self.recipe.seed + seed},
            seed=self.recipe.seed + seed,
            most_rows=selection.count,
        )

    def score(
        self,
        names: list[str],
        extraction: Extraction,
        positions: bool = False,
        spatial_reference: NodeId | None = None,
    ) -> NodeId:
        """Features of some datasets together; the same for all that ask for the same."""
        near = f".near-{spatial_reference.name}" if spatial_reference else ".positions" if positions else ""
        return self._add(
            score,
            f"{'+'.join(names)}.{extraction.label}{near}",
            {"frames": Frames(self.datasets(names)), "spatial_reference": spatial_reference},
            {"positions": positions},
            unhashed={"extraction": extraction},
            facts=score.facts(extraction),
        )

    # -- leaks -------------------------------------------------------------------------------------------------------

    def watch(self, name: str) -> None:
        """What a model may not share: all that it, its translators, teachers and starts learned from, and its tests."""
        learned: dict[tuple[str, Views], Use] = {}
        line = list(self._line(name, {}))
        for model in line:
            for use in self._learned(model):
                known = learned.setdefault((use.dataset, use.views), use)
                learned[use.dataset, use.views] = known if known.is_training else use
        nodes = self.graph.models[name]
        folders = tuple(dict.fromkeys(start for model in line if "/" in (start := self.models[model].start)))
        validated = [
            use
            for dataset in self.models[name].validate_on
            for use in self._uses(dataset, f"the validation set {dataset}", with_translators=False)
        ]
        tests = [
            use
            for test in nodes.tests
            for use in self._uses(self.recipe.test_sets[test], f"the test set {test}", with_translators=False)
        ]
        self.graph.watched[name] = Watched(tuple(learned.values()), tuple(validated), tuple(tests), folders)

    def _line(self, name: str, found: dict[str, None]) -> Iterable[str]:
        """A model, and those that it starts from or is taught by."""
        if name in found or name not in self.models:
            return found
        found[name] = None
        model = self.models[name]
        for before in (model.start, model.self_training.teacher if model.self_training else None):
            self._line(before or "", found)
        return found

    def _learned(self, name: str) -> Iterator[Use]:
        model = self.models[name]
        for dataset in model.train_sets:
            yield from self._uses(dataset, "trained on", is_training=True)
        if model.adapt_norms is not None:
            yield from self._uses(model.adapt_norms.pool, "the pool that its batch norms were adapted to")
        if model.self_training is not None:
            yield from self._uses(model.self_training.pool, "trained on as a pool")
            if model.self_training.select is not None and model.self_training.select.reference:
                yield from self._uses(model.self_training.select.reference, "the reference of a selection")
        if self.recipe.training_of(model).keep == "best":
            for dataset in model.validate_on:
                yield from self._uses(dataset, "its best weights were chosen on", with_translators=False)

    def _uses(self, name: str, what: str, is_training: bool = False, with_translators: bool = True) -> Iterator[Use]:
        """The frames of a dataset, or those that its translations were made from and the translator's own."""
        match self.recipe.datasets[name]:
            case TranslatedDataset() as dataset:
                yield from self._uses(dataset.translate, f"{what}, translated", is_training, with_translators)
                settings = self.recipe.translators[dataset.by]
                if with_translators and isinstance(settings, Translator):
                    for side in (settings.day, settings.night):
                        yield from self._uses(side, f"the translator {dataset.by} trained on")
                elif with_translators and (style := _style_images(settings, dataset.to)):
                    yield from self._uses(style, f"style images of the translator {dataset.by}")
            case JoinedDataset(join=parts):
                for part in parts:
                    yield from self._uses(part, what, is_training, with_translators)
            case _:
                yield Use(what, name, self.dataset(name), is_training)

    # -- evidence ----------------------------------------------------------------------------------------------------

    def evaluate(self, name: str) -> None:
        """A model on its test sets, all of the recipe's unless it names its own: one pass over all of their frames; and
        on frames without labels, if the recipe asks for it."""
        nodes, own = self.graph.models[name], self.models[name].test
        nodes.tests = own if own is not None else {test: TestRow() for test in self.recipe.test_sets}
        if nodes.tests:
            tests = {test: Frames(self.dataset(self.recipe.test_sets[test])) for test in nodes.tests}
            nodes.evaluate = self._add(
                evaluate,
                name,
                {"tests": tests, "model": nodes.train},
                {"evaluation": self.recipe.evaluation, "inference": self.recipe.inference},
                unhashed=self._named(name),
                facts=self.classes,
            )
        if (wanted := self.recipe.consistency) is not None:
            nodes.consistency = self._add(
                consistency,
                name,
                {"frames": Frames(self.dataset(wanted.dataset)), "model": nodes.train},
                {"count": wanted.count, "inference": self.recipe.inference},
                unhashed={"name": name},
                most_rows=wanted.count,
            )

    def predict(self, name: str, frames: Views, model: NodeId, **settings: Any) -> NodeId:
        inputs: dict[str, Source] = {"frames": Frames(frames), "model": model}
        return self._add(predict, name, inputs, settings, unhashed={"name": name})

    def evaluate_translation(self, name: str) -> None:
        recipe, wanted = self.recipe, self.recipe.translations[name]
        dataset = recipe.datasets[name]
        assert isinstance(dataset, TranslatedDataset), name
        model = wanted.segmenter or next(iter(recipe.models))
        real = wanted.real or getattr(recipe.translators[dataset.by], dataset.to)
        extraction, trained = self._extraction(wanted), self.model(model)
        translated, source = self.dataset(name), self.dataset(dataset.translate)
        back = self._way_back(name, dataset)
        seen: dict[str, tuple[str, Views]] = {"translated": (name, translated), "source": (dataset.translate, source)}
        if back is not None:
            seen["back"] = (back.name, (View(back),))
        features = {"translated": name, "source": dataset.translate, "real": real}
        node = self._add(
            evaluate_translation,
            name,
            {
                "translated": Frames(translated),
                "source": Frames(source),
                "masks": {
                    what: self.predict(f"{model}.{of}", views, trained, save=("mask",))
                    for what, (of, views) in seen.items()
                },
                "features": {what: self.score([of], extraction) for what, of in features.items()},
            },
            {},
            unhashed=self._named(name),
            facts=self.classes,
        )
        facts: dict[str, Any] = {
            "translator": dataset.by,
            "kind": recipe.translators[dataset.by].kind,
            "to": dataset.to,
            "source": dataset.translate,
            "segmenter": model,
            "real": real,
        }
        self.graph.translations[name] = (node, facts)

    def _extraction(self, wanted: TranslationEvaluation) -> Extraction:
        """What is asked for, else what the recipe selects by, so that the same features serve both."""
        if wanted.extractor is not None:
            return wanted.extractor
        for model in self.models.values():
            if model.self_training is not None and model.self_training.select is not None:
                return model.self_training.select.extractor
        return Extraction(name=DEFAULT_EXTRACTOR)

    def _way_back(self, name: str, dataset: TranslatedDataset) -> NodeId | None:
        """The translations translated back by the same translator, if it has a way back."""
        home: Literal["day", "night"] = "day" if dataset.to == "night" else "night"
        if way_missing(self.recipe.translators[dataset.by].model_dump(), home):
            return None
        back = f"{name}{evaluate_translation.BACK_SUFFIX}"
        return self.translate(back, TranslatedDataset(translate=name, by=dataset.by, to=home))

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _add(
        self,
        stage: ModuleType,
        name: str,
        inputs: Mapping[str, Source],
        settings: Mapping[str, Any],
        *,
        unhashed: Mapping[str, Any] = NOTHING,
        facts: Mapping[str, Any] = NOTHING,
        counted: tuple[str, ...] | None = None,
        on_cpus: bool = False,
        **more: Any,
    ) -> NodeId:
        """The node of a stage, made if there is none of that name: a training, what reads tables, or else a pass.

        `on_cpus`: the pass has no use for a GPU, also where other calls of its stage have.
        """
        kind, recipe = stage.__name__.rpartition(".")[2], self.recipe
        node, train, pass_ = NodeId(kind, name), recipe.compute.train, recipe.compute.map
        pass_ = pass_.on_cpus if on_cpus or kind in CPU_STAGES else pass_
        if node in self.graph.nodes:
            return node
        resources: MapCompute | TrainCompute = pass_
        if kind.startswith("train_"):
            more.setdefault("seed", recipe.seed)
            resources, unhashed = train, {**unhashed, "compute": train, "seed": more["seed"]}
        elif kind not in TABLE_STAGES:  # Shards are files, so their size counts; too many bad frames are an error.
            settings = {**settings, "max_bad_fraction": recipe.max_bad_fraction}
            unhashed, facts = {**unhashed, "compute": pass_}, {**facts, "shard_rows": pass_.shard_rows}
        counted = tuple(inputs)[:1] if counted is None else counted
        call = getattr(stage, kind)
        self.graph.nodes[node] = Node(
            node, stage.VERSION, call, resources, inputs, settings, unhashed, facts, counted=counted, **more
        )
        return node


def _told(classes: Taxonomy) -> dict[str, Any]:
    """What a class list says of ids, as JSON."""
    encodings = {name: {str(raw): ids[raw] for raw in sorted(ids)} for name, ids in classes.encodings.items()}
    return {"classes": list(classes.classes), "encodings": encodings}


def _colors(classes: Taxonomy) -> dict[str, Any]:
    """What it says of labels in colours, which are read once."""
    return {"colors": {str(raw): classes.colors[raw] for raw in sorted(classes.colors)}}


def _teaching(learning: SelfTraining) -> Teaching:
    online = learning.online or Online()
    return Teaching(online=online, threshold=learning.threshold, never_below=learning.never_below)


def _style_images(settings: Any, to: str) -> str:
    """The dataset of the style images of a translator to a domain; "" for a kind without them."""
    if not isinstance(settings, FourierTranslator | ColourTranslator):
        return ""
    name = settings.night if to == "night" else settings.day
    assert name is not None, f"no style images of {to}"  # the recipe was checked
    return name
