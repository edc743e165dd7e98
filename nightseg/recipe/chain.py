"""`rounds` of a recipe, written out."""

from __future__ import annotations

from collections.abc import Mapping

from nightseg.recipe.types import Model


def expand_rounds(models: Mapping[str, Model]) -> dict[str, Model]:
    """`rounds: 3` as the chain it stands for: m.1, m.2, m, each starting from and taught by the one before."""
    chain: dict[str, Model] = {}
    for name, model in models.items():
        learning = model.self_training
        if model.rounds == 1 or learning is None:
            chain[name] = model
            continue
        previous = ""
        for number in range(1, model.rounds + 1):
            last = number == model.rounds
            step = model.model_copy(update={"rounds": 1} if last else {"rounds": 1, "test": model.test})
            if previous:
                taught = learning.model_copy(update={"teacher": previous})
                step = step.model_copy(update={"start": previous, "self_training": taught})
            previous = name if last else f"{name}.{number}"
            chain[previous] = step
    return chain
