"""The names and signatures that others rely on: they stay, whatever moves behind them."""

from __future__ import annotations

import inspect
from importlib import import_module

import numpy as np
import pytest

import nightseg
from nightseg.selection.frechet import Moments
from nightseg.selection.subset import Subset, select_subset

NAMES = {
    "nightseg.selection.frechet:frechet_distance": ("mean1", "cov1", "mean2", "cov2"),
    "nightseg.selection.subset:select_subset": ("features", "mean", "cov", "count"),
    "nightseg.metrics.confusion:confusion_matrix": ("label", "prediction", "num_classes"),
    "nightseg.metrics.confusion:scores": ("matrix", "absent_class"),
    "nightseg.segmenter.loss:combined_loss": (
        *("logits_BKHW", "target_BHW", "alpha", "gamma", "focal_weight", "ignore"),
    ),
}
TYPES = {
    "nightseg.segmenter.network:SemanticFPN": ("forward",),
    "nightseg.unit.network:Encoder": ("forward",),
    "nightseg.unit.network:Decoder": ("forward",),
    "nightseg.unit.network:Discriminator": ("forward",),
}


def found(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_functions_take_what_callers_give(name: str) -> None:
    parameters = tuple(inspect.signature(found(name)).parameters)  # type: ignore[arg-type]
    assert parameters[: len(NAMES[name])] == NAMES[name]


@pytest.mark.parametrize("name", TYPES)
def test_types_have_what_callers_use(name: str) -> None:
    assert set(TYPES[name]) <= set(dir(found(name)))


def test_moments_and_subsets_say_what_callers_read() -> None:
    moments = Moments(2)
    moments.update(np.eye(2))
    assert all(hasattr(moments, name) for name in ("update", "merge", "mean", "cov", "count"))
    assert Subset._fields[:3] == ("indices", "fid", "lower_bound")
    assert inspect.signature(select_subset, eval_str=True).return_annotation is Subset
    assert callable(nightseg.load_model)
