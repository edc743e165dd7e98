"""The recipe: what to learn from what, as frozen and strict types.

A recipe names things and says how they are made from each other: datasets, translators, models, test sets. Every
reference is a name, so the recipe is a graph; `check_graph` refuses unknown names and cycles before anything runs.
Reading YAML, overrides and the wording of errors live in `recipe/`; here are only the types and their rules.
"""

from nightseg.config.compute import Compute, MapCompute, TrainCompute
from nightseg.config.datasets import (
    Dataset,
    FolderDataset,
    JoinedDataset,
    ScenesDataset,
    SplitDataset,
    TranslatedDataset,
)
from nightseg.config.models import (
    EXTRACTORS,
    Inference,
    Model,
    Network,
    Selection,
    SelfTraining,
    TestRow,
    Threshold,
    known_extractor,
)
from nightseg.config.recipe import AnyTranslator, Evaluation, Judgement, Prediction, Recipe, is_name
from nightseg.config.training import Augmentation, Loss, Training
from nightseg.config.unit import Translator, UnitWeights

__all__ = [
    "EXTRACTORS",
    "AnyTranslator",
    "Augmentation",
    "Compute",
    "Dataset",
    "Evaluation",
    "FolderDataset",
    "Inference",
    "JoinedDataset",
    "Judgement",
    "Loss",
    "MapCompute",
    "Model",
    "Network",
    "Prediction",
    "Recipe",
    "ScenesDataset",
    "Selection",
    "SelfTraining",
    "SplitDataset",
    "TestRow",
    "Threshold",
    "TrainCompute",
    "Training",
    "TranslatedDataset",
    "Translator",
    "UnitWeights",
    "is_name",
    "known_extractor",
]
