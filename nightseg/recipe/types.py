"""The whole recipe: datasets, translators, models, test sets, and what is to be made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.data.settings import AnyTaxonomy, Dataset
from nightseg.segmenter.settings import AdaptNorms, Guard, Inference, Loss, Network, Online, Threshold, Training
from nightseg.selection.settings import Extraction, Selection
from nightseg.settings import NAME_PATTERN, Fraction, Name, Positive, Strict
from nightseg.translators.settings import (
    ColourTranslator,
    CommandTranslator,
    FourierTranslator,
    PhotometricTranslator,
    translator_kind,
)
from nightseg.unit.settings import Translator

STARTS = ("imagenet", "scratch")

AnyTranslator = Annotated[
    Annotated[Translator, Tag("unit")]
    | Annotated[PhotometricTranslator, Tag("photometric")]
    | Annotated[FourierTranslator, Tag("fourier")]
    | Annotated[ColourTranslator, Tag("colour")]
    | Annotated[CommandTranslator, Tag("command")],
    Discriminator(translator_kind),
]


def _different(seeds: list[int]) -> list[int]:
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise ValueError(f"the seeds must differ, {', '.join(map(str, twice))} stands there twice")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**16)]], Field(min_length=1), AfterValidator(_different)]


class Compute(Strict):
    """Resources of the run; they come from here and nowhere else."""

    train: TrainCompute = TrainCompute()
    map: MapCompute = MapCompute()
    concurrent: Positive | None = Field(
        default=None,
        description="stages at a time at most, of models that do not need each other; 1 = one after the other, null = "
        "as many as there are CPUs, GPUs and memory for. The results are the same",
    )
    input_cache_gib: Annotated[float, Field(ge=0)] = Field(
        default=10.0,
        description="of frames and labels in stores (s3://, gs://) up to so many GiB are kept on a disk of each node, "
        "below its temporary folder, so that they are not fetched in every pass and epoch; 0 = none. Files of local "
        "disks and NFS are read where they are",
    )


Weight = Annotated[float, Field(gt=0)]


class SelfTraining(Strict):
    """Pseudo-labels of a teacher on a pool of unlabelled frames, learned beside the train sets."""

    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="a finished model labels the pool first, or the EMA of this one labels it while it learns",
    )
    pool: Name = Field(description="dataset of unlabelled frames")
    teacher: Name | None = Field(default=None, description="offline: null = the model this one starts from")
    select: Selection | None = Field(default=None, description="null = every frame of the pool")
    threshold: Threshold = Threshold()
    never_below: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        default={}, description="class -> classes that it is never below in the image; checked on the labelled frames"
    )
    inference: Inference | None = Field(
        default=None, description="offline: how the teacher predicts; what it does not say is the recipe's"
    )
    weight: Weight = Field(
        default=1.0, description="offline: of the pseudo-labelled frames, where the model's train sets have weights"
    )
    guard: Guard | None = Field(
        default=None,
        description="offline: what the teacher sees of the pool, against the teacher of the first round; stop ends the "
        "run; null = act: warn",
    )
    online: Online | None = Field(default=None, description="mode online; null = its defaults")

    @model_validator(mode="after")
    def _keys_of_its_mode(self) -> SelfTraining:
        if self.mode == "offline" and self.online is not None:
            raise ValueError("online is for mode: online, and the mode is offline")
        if self.mode == "offline" and self.threshold.precision is not None:
            raise ValueError("threshold.precision is measured while a model learns: it is for mode: online")
        if self.mode == "online" and self.teacher is not None:
            raise ValueError("mode online: the model teaches itself, leave teacher out")
        if self.mode == "online" and self.guard is not None:
            raise ValueError("mode online: its guard is online.guard")
        if self.mode == "online" and self.weight != 1:
            raise ValueError("mode online: the weight of the pool is online.weight, of a pixel")
        if self.mode == "online" and self.inference is not None:
            raise ValueError("mode online: the teacher predicts as online.flip and online.scales say, not as inference")
        return self


class TestRow(Strict):
    """One published number that this model and test set reproduce."""

    row: str = Field(default="", description="the name of that row")
    published_miou: Annotated[float, Field(ge=0, le=100)] | None = Field(default=None, description="percent")


class Model(Strict):
    """One segmenter: its data, its start, its teacher and selection, its loss."""

    about: str = Field(default="", description="one line on what is tried here, shown in the report")
    train: list[Name] | dict[Name, Weight] = Field(
        default=[],
        description="datasets to learn from: a list = every frame alike; dataset -> weight = shares of the samples",
    )
    adapt_norms: AdaptNorms | None = Field(
        default=None, description="instead of `train`: the model it starts from, its batch norms adapted to a pool"
    )
    validate_on: list[Name] = Field(default=[], description="datasets for the curve of mIoU in training")
    start: str = Field(
        default="imagenet", description="imagenet, scratch, another model's name, or a model folder (a/path)"
    )
    self_training: SelfTraining | None = Field(default=None, description="null = no pseudo-labels")
    rounds: Positive = Field(default=1, description="repeat the self-training this many times, each from the last")
    seeds: Seeds | None = Field(default=None, description="null = the recipe's")
    network: Network | None = Field(default=None, description="what it does not say is the recipe's")
    loss: Loss | None = Field(default=None, description="what it does not say is the recipe's")
    training: Training | None = Field(default=None, description="what it does not say is the recipe's")
    test: dict[Name, TestRow] | None = Field(default=None, description="test sets; null = all of the recipe")

    @model_validator(mode="after")
    def _learns_somehow(self) -> Model:
        if bool(self.train) == (self.adapt_norms is not None):
            raise ValueError("give train (datasets to learn from), or adapt_norms, and not both")
        if self.adapt_norms is not None and (self.self_training is not None or self.start in STARTS):
            raise ValueError("adapt_norms changes a finished model: give its start, and no self_training")
        unused = [key for key in ("network", "loss", "training") if getattr(self, key) is not None]
        if self.adapt_norms is not None and (unused or self.validate_on):
            raise ValueError(f"adapt_norms trains nothing: leave out {', '.join(unused or ['validate_on'])}")
        return self

    @property
    def train_sets(self) -> list[str]:
        """Names of the datasets that it learns from."""
        return list(self.train)


class Evaluation(Strict):
    """What is measured on the test sets beside PA, CA, mIoU and FWIoU."""

    boundary: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="distance of boundary IoU, a share of the diagonal (0.02 in its paper); null = none"
    )
    absent_class: Literal["cityscapes", "detectron2"] = Field(
        default="cityscapes", description="a class predicted but not in the labels: IoU 0, or left out"
    )


class Prediction(Strict):
    """Frames without labels that the report and the user want to see segmented."""

    dataset: Name = Field(description="frames to segment")
    model: Name = Field(description="by which model")


class Consistency(Strict):
    """Frames without labels on which all models are compared: how sure they are, and whether they say the same of a
    frame, of its mirror image and of a brighter one."""

    dataset: Name = Field(description="frames of the night")
    count: Positive = Field(default=100, description="at most so many of them, evenly over the dataset")


class TranslationEvaluation(Strict):
    """How good a translated dataset is: distances to real frames, and how much of the labels survives."""

    segmenter: Name | None = Field(
        default=None, description="segmenter that never saw a translated frame; null = the recipe's first model"
    )
    real: Name | None = Field(
        default=None, description="real frames of the domain translated to; null = those of the translator"
    )
    extractor: Extraction | None = Field(
        default=None, description="of FID and KID; null = that of the recipe's selections, else efficientnet_lite0"
    )


class Claim(Strict):
    """Something that is said of models, to be held against the results: the first of each pair is better."""

    says: str = Field(description="in words, shown in the report")
    pairs: Annotated[list[tuple[Name, Name]], Field(min_length=1)] = Field(
        description="[model, the one that it is better than]"
    )
    test: Name | None = Field(default=None, description="test set; null = the first of the recipe")


class Recipe(Strict):
    """Everything a run does. Sections name things; `nightseg run --dry-run` prints the graph they make."""

    base: str | None = Field(
        default=None,
        description="recipe file, relative to this one: what it says holds where this one does not say otherwise",
    )
    name: Name = Field(description="of the run")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(default=0, description="everything random follows from it")
    seeds: Seeds = Field(
        default=[0], description="each model is trained once with each: only its training draws by seed + this"
    )
    taxonomy: AnyTaxonomy = Field(
        default="cityscapes19",
        description="class list: cityscapes19, camvid11, idd_lite7, a file (YAML, CSV, JSON, text), or a list here",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01, description="share of quarantined frames above which a stage fails"
    )
    compute: Compute = Compute()
    allow_download: bool = Field(
        default=False, description="weights that are not on the machine are fetched; else that is an error"
    )
    leaks: Literal["refuse", "report"] = Field(
        default="refuse", description="frames that a model has seen and is tested or validated on: an error, or told"
    )
    roots: dict[Name, str] = Field(default={}, description="folders that dataset roots refer to as {name}")
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)] = Field(description="sets of frames by name")
    translators: dict[Name, AnyTranslator] = Field(default={}, description="ways between day and night by name")
    network: Network = Network()
    loss: Loss = Loss()
    training: Training = Training()
    inference: Inference = Inference()
    models: dict[Name, Model] = Field(default={}, description="segmenters by name")
    test_sets: dict[Name, Name] = Field(default={}, description="name in the tables -> dataset")
    evaluation: Evaluation = Evaluation()
    predictions: dict[Name, Prediction] = Field(
        default={}, description="frames without labels to show segmented, by name"
    )
    consistency: Consistency | None = Field(
        default=None, description="scores that need no labels, for all models; null = none"
    )
    translations: dict[Name, TranslationEvaluation] = Field(
        default={}, description="translated dataset -> how to measure the quality of its translations"
    )
    claims: dict[Name, Claim] = Field(
        default={}, description="what is said of the models by name: the results show whether it holds here"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Recipe:
        if self.base is not None:
            raise ValueError("a base is filled in when a recipe file is read: use nightseg.recipe.load_recipe")
        return self

    def network_of(self, model: Model) -> Network:
        return model.network or self.network

    def loss_of(self, model: Model) -> Loss:
        return model.loss or self.loss

    def training_of(self, model: Model) -> Training:
        return model.training or self.training

    def seeds_of(self, model: Model) -> Seeds:
        return model.seeds or self.seeds


PATH_KEYS: Final = ("root", "weights", "encoder_weights", "perceptual_weights")  # hold paths, whatever these look like


def is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN[1:-1], text) is not None


def is_ready(start: str) -> bool:
    """Whether what a model starts from is there already: one of STARTS, or a model folder, known by its slash."""
    return start in STARTS or "/" in start


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
                taught = learning.model_copy(update={"teacher": previous} if learning.mode == "offline" else {})
                step = step.model_copy(update={"start": previous, "self_training": taught})
            previous = name if last else f"{name}.{number}"
            chain[previous] = step
    return chain


class Trained(NamedTuple):
    """One training of a model; `start` and teacher of its settings are names of trainings."""

    model: Model
    of: str  # the model, or a round of it
    seed: int


def expand_seeds(recipe: Recipe) -> dict[str, Trained]:
    """Every model once for each of its seeds: those with the first seed, which keep the models' names, come first.

    What a training starts from or is taught by is the training with its own seed, or the only one there is.
    """
    models = expand_rounds(recipe.models)
    seeds = {name: recipe.seeds_of(model) for name, model in models.items()}

    def training(name: str, seed: int) -> str:
        known = seeds.get(name, [seed])  # `imagenet`, or a folder
        return f"{name}.seed{seed}" if seed in known[1:] else name

    found: dict[str, Trained] = {}
    for turn in range(max(map(len, seeds.values()), default=0)):
        for name, model in models.items():
            if turn >= len(seeds[name]):
                continue
            seed = seeds[name][turn]
            changes: dict[str, object] = {"start": training(model.start, seed)}
            if model.self_training is not None and model.self_training.teacher is not None:
                teacher = training(model.self_training.teacher, seed)
                changes["self_training"] = model.self_training.model_copy(update={"teacher": teacher})
            is_changed = changes["start"] != model.start or "self_training" in changes
            found[training(name, seed)] = Trained(model.model_copy(update=changes) if is_changed else model, name, seed)
    return found
