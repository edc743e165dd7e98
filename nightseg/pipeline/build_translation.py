"""The part of the graph that measures sets of frames, translates without training, and evaluates translations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from nightseg.data.settings import TranslatedDataset
from nightseg.pipeline.graph import EvaluatedTranslation, Inputs, NodeId, View, Views
from nightseg.progress import Progress
from nightseg.recipe.names import way_missing
from nightseg.recipe.types import TranslationEvaluation
from nightseg.stages import evaluate_translation, predict, score, translate
from nightseg.storage import Attempt, Commit
from nightseg.translators.settings import ColourTranslator, CommandTranslator, FourierTranslator, PhotometricTranslator
from nightseg.unit.settings import Translator

if TYPE_CHECKING:
    from nightseg.pipeline.build import _Builder

DEFAULT_EXTRACTOR = "efficientnet_lite0"  # its weights come with a package: nothing has to be fetched


def score_frames(
    builder: _Builder,
    names: list[str],
    extraction: score.Extraction,
    positions: bool = False,
    spatial_reference: NodeId | None = None,
) -> NodeId:
    """Features of some datasets together; the same for all that ask for the same."""
    views = builder.datasets(names)

    def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
        return score.score(
            inputs.frames(views),
            extraction,
            positions=positions,
            spatial_reference=inputs[spatial_reference] if spatial_reference else None,
            **builder._spread(attempt, progress),
        )

    part = {**extraction.facts(), "of": [str(view) for view in views], **builder._frame_pass()}
    part |= {"positions": positions, "spatial_reference": str(spatial_reference)}
    needs: list[View | NodeId] = [*views, *([spatial_reference] if spatial_reference else [])]
    near = f".near-{spatial_reference.name}" if spatial_reference else ".positions" if positions else ""
    return builder._add("score", f"{'+'.join(names)}.{extraction.label}{near}", score.VERSION, part, needs, work)


# -- translators that need no training --------------------------------------------------------------------------------


def translate_untrained(builder: _Builder, name: str, dataset: TranslatedDataset) -> NodeId:
    """A translation without a training before it; the frames that lend their light are its inputs."""
    recipe, settings = builder.recipe, builder.recipe.translators[dataset.by]
    assert not isinstance(settings, Translator), dataset.by
    lender = _lender(settings, dataset.to)
    views, lenders = builder.dataset(dataset.translate), builder.dataset(lender) if lender else ()

    def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
        return translate.translate(
            inputs.frames(views),
            translate.Untrained(settings, inputs.frames(lenders) if lenders else None, lender, recipe.taxonomy),
            name=name,
            to=dataset.to,
            **builder._spread(attempt, progress),
        )

    # Without what names datasets, or says what it could do instead of what it does.
    asked = settings.model_dump(mode="json", exclude={"day", "night", "to", "timeout_seconds"})
    part: dict[str, Any] = {"to": dataset.to, "of": [str(view) for view in views], "translator": asked}
    part |= {"style_images": [str(view) for view in lenders], **builder._frame_pass()}
    if isinstance(settings, PhotometricTranslator | CommandTranslator):  # they look at labels
        part |= {"taxonomy": builder.taxonomy}
    needs = (*views, *lenders)
    return builder._add("translate", name, translate.VERSION, part, needs, work, seed=recipe.seed, takes=views)


def _lender(settings: Any, to: str) -> str:
    """The dataset whose frames lend their light on the way to a domain; "" for a kind without lenders."""
    if not isinstance(settings, FourierTranslator | ColourTranslator):
        return ""
    name = settings.night if to == "night" else settings.day
    assert name is not None, f"no lenders for the way to {to}"  # the recipe was checked
    return name


# -- how good a translation is ----------------------------------------------------------------------------------------


def evaluate_translation_of(builder: _Builder, name: str) -> None:
    """Everything that the evaluation of one translated dataset stands on, and the evaluation."""
    recipe, wanted = builder.recipe, builder.recipe.translations[name]
    dataset = recipe.datasets[name]
    assert isinstance(dataset, TranslatedDataset), name
    model = wanted.segmenter or next(iter(recipe.models))
    real = wanted.real or getattr(recipe.translators[dataset.by], dataset.to)
    extraction, trained = _extraction(builder, wanted), builder.model(model)
    translated, source = builder.dataset(name), builder.dataset(dataset.translate)
    back = _way_back(builder, name, dataset)
    scored = [score_frames(builder, [one], extraction) for one in (name, dataset.translate, real)]
    seen = _masks(builder, model, trained, name, translated)
    seen_source = _masks(builder, model, trained, dataset.translate, source)
    seen_back = _masks(builder, model, trained, back.name, (View(back),)) if back else None

    def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
        return evaluate_translation.evaluate_translation(
            inputs.frames(translated),
            inputs.frames(source),
            name=name,
            masks=evaluate_translation.Masks(
                inputs[seen], inputs[seen_source], inputs[seen_back] if seen_back else None
            ),
            features=evaluate_translation.Features(*(inputs[node] for node in scored)),
            taxonomy=recipe.taxonomy,
            **builder._spread(attempt, progress),
        )

    part: dict[str, Any] = {"translated": [str(view) for view in translated], "source": [str(view) for view in source]}
    part |= {"taxonomy": builder.taxonomy, **builder._frame_pass()}
    needs: list[View | NodeId] = [*translated, *source, *scored, seen, seen_source, *([seen_back] if seen_back else [])]
    node = builder._add("evaluate_translation", name, evaluate_translation.VERSION, part, needs, work, takes=translated)
    facts: dict[str, Any] = {
        "translator": dataset.by,
        "kind": recipe.translators[dataset.by].kind,
        "to": dataset.to,
        "source": dataset.translate,
        "segmenter": model,
        "real": real,
    }
    builder.graph.translations[name] = EvaluatedTranslation(node, facts)


def _extraction(builder: _Builder, wanted: TranslationEvaluation) -> score.Extraction:
    """What is asked for, else what the recipe selects by: then the same features serve both."""
    if wanted.extractor is not None:
        return score.Extraction(wanted.extractor, wanted.extractor_weights)
    for model in builder.models.values():
        if model.self_training is not None and model.self_training.select is not None:
            return score.Extraction.of(model.self_training.select)
    return score.Extraction(DEFAULT_EXTRACTOR)


def _way_back(builder: _Builder, name: str, dataset: TranslatedDataset) -> NodeId | None:
    """The translations translated back by the same translator, if it has a way back."""
    home: Literal["day", "night"] = "day" if dataset.to == "night" else "night"
    if way_missing(builder.recipe.translators[dataset.by].model_dump(), home):
        return None
    back = f"{name}{evaluate_translation.BACK_SUFFIX}"
    return builder._translate(back, TranslatedDataset(translate=name, by=dataset.by, to=home))


def _masks(builder: _Builder, model: str, trained: NodeId, name: str, views: Sequence[View]) -> NodeId:
    """What the segmenter predicts in some frames; the same for all translations of one dataset."""
    of: Views = tuple(views)

    def work(inputs: Inputs, attempt: Attempt, progress: Progress) -> Commit:
        frames, seer = inputs.frames(of), inputs[trained]
        return predict.predict(
            frames, seer, name=f"{model}.{name}", save=("mask",), **builder._spread(attempt, progress)
        )

    part = {"of": [str(view) for view in of], "save": ["mask"], **builder._frame_pass()}
    return builder._add("predict", f"{model}.{name}", predict.VERSION, part, (*of, trained), work)
