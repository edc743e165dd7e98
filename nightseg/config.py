"""The recipe: what to learn from what, as frozen and strict types.

A recipe names things and says how they are made from each other: datasets, translators, models, test sets. Every
reference is a name, so the recipe is a graph; `check_graph` refuses unknown names and cycles before anything runs.
Reading YAML, overrides and the wording of errors live in `recipe/`; here are only the types and their rules.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from nightseg.config_strict import NAME_PATTERN, Domain, Fraction, Name, Positive, Size, Strict
from nightseg.config_training import Loss, Training
from nightseg.config_translators import (
    ColourTranslator,
    CommandTranslator,
    FourierTranslator,
    PhotometricTranslator,
    translator_kind,
)
from nightseg.errors import closest

# -- compute ---------------------------------------------------------------------------------------------------------


class TrainCompute(Strict):
    """How the two trainings are spread over the cluster (Ray Train)."""

    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 2


class MapCompute(Strict):
    """How passes over frames are spread over the cluster (Ray Data actors)."""

    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    batch: Positive = 8
    shard_rows: Positive = 64


class Compute(Strict):
    """Resources of the run; they come from here and nowhere else."""

    train: TrainCompute = TrainCompute()
    map: MapCompute = MapCompute()


# -- datasets --------------------------------------------------------------------------------------------------------


class FolderDataset(Strict):
    """Frames that lie in folders. The layout says where images and labels are."""

    layout: Literal["camvid", "cityscapes", "nighttime_driving", "images"]
    root: str
    split: str = ""
    domain: Domain = "unknown"
    labelled: bool = True
    label_encoding: str | None = Field(default=None, description="raw-id map of the labels; null = the layout's own")
    limit: Positive | None = Field(default=None, description="keep the first N frames in name order")


class ScenesDataset(Strict):
    """Procedural street scenes with exact labels (`frames/scenes.py`); `mix` gives the share of each domain."""

    layout: Literal["scenes"]
    count: Positive
    mix: dict[Literal["day", "night", "twilight"], Fraction] = {"day": 1.0}
    size: Size = (128, 256)
    labelled: bool = True
    scene_seed: Annotated[int, Field(ge=0)] = 0
    first: Annotated[int, Field(ge=0)] = Field(default=0, description="index of the first scene")

    @model_validator(mode="after")
    def _shares_add_up(self) -> ScenesDataset:
        if abs(sum(self.mix.values()) - 1.0) > 1e-6:
            raise ValueError(f"the shares of mix must add up to 1, they add up to {sum(self.mix.values()):g}")
        return self


class SplitDataset(Strict):
    """One side of a heap of frames, separated by luminance histograms (thesis section 1)."""

    split: Name = Field(description="the dataset that is a heap of day, night and twilight frames")
    keep: Literal["day", "night", "twilight"]
    margin: Fraction = Field(default=0.2, description="frames with a smaller margin between the domains are twilight")


class TranslatedDataset(Strict):
    """Every frame of a dataset passed through a translator; labels stay valid and are referenced."""

    translate: Name
    by: Name
    to: Literal["day", "night"] = "night"


class JoinedDataset(Strict):
    """Several datasets as one."""

    join: Annotated[list[Name], Field(min_length=1)]


def _dataset_kind(value: Any) -> str:
    def has(key: str) -> bool:
        return key in value if isinstance(value, dict) else hasattr(value, key)

    for key in ("translate", "join"):
        if has(key):
            return key
    if has("keep") or (has("split") and not has("layout")):
        return "split"
    layout = value.get("layout") if isinstance(value, dict) else getattr(value, "layout", None)
    return "scenes" if layout == "scenes" else "folder"


Dataset = Annotated[
    Annotated[FolderDataset, Tag("folder")]
    | Annotated[ScenesDataset, Tag("scenes")]
    | Annotated[SplitDataset, Tag("split")]
    | Annotated[TranslatedDataset, Tag("translate")]
    | Annotated[JoinedDataset, Tag("join")],
    Discriminator(_dataset_kind),
]


# -- translators -----------------------------------------------------------------------------------------------------


class UnitWeights(Strict):
    """Weights of the UNIT loss terms (night_segmentation 5.1; UNIT, arXiv 1703.00848, MUNIT-style master branch)."""

    adversarial: float = 1.0
    reconstruction: float = 10.0
    kl: float = 0.01
    cycle: float = 10.0
    cycle_kl: float = 0.01
    perceptual: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0 trains without perceptual loss")


class Translator(Strict):
    """UNIT between two unlabelled datasets."""

    kind: Literal["unit"] = "unit"
    day: Name
    night: Name
    width: Positive = 64
    res_blocks: Positive = 4
    discriminator_width: Positive = 64
    discriminator_scales: Positive = 3
    discriminator_norm: Literal["none", "layer"] = "none"
    weights: UnitWeights = UnitWeights()
    perceptual_network: Literal["vgg16", "efficientnet_lite0"] = "vgg16"
    perceptual_weights: str | None = Field(default=None, description="local file with the VGG16 weights")
    iterations: Positive = 330_000
    batch: Positive = 1
    short_side: Positive | None = Field(default=512, description="resize the shorter side to this before cropping")
    crop: Size = (256, 256)
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    step_every: Positive = Field(default=100_000, description="iterations between halvings of the learning rate")
    average: Fraction = Field(default=0.0, description="decay of the generators' running mean; 0 = the last weights")
    checkpoint_every: Positive = 10_000


AnyTranslator = Annotated[
    Annotated[Translator, Tag("unit")]
    | Annotated[PhotometricTranslator, Tag("photometric")]
    | Annotated[FourierTranslator, Tag("fourier")]
    | Annotated[ColourTranslator, Tag("colour")]
    | Annotated[CommandTranslator, Tag("command")],
    Discriminator(translator_kind),
]


# -- models ----------------------------------------------------------------------------------------------------------


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BOTTLENECK_RESNETS = RESNETS[2:]
ENCODERS = (*RESNETS, "efficientnet_lite0")


def known_encoder(name: str) -> str:
    """The name, if there may be such an encoder; timm's are looked up before anything runs, but not here."""
    if name not in ENCODERS and not name.startswith("timm/"):
        raise ValueError(f"unknown encoder {name!r}{closest(name, ENCODERS)}; one of {', '.join(ENCODERS)}, timm/NAME")
    return name


class Network(Strict):
    """Semantic FPN: encoder, and the size frames are resized to before training and inference."""

    encoder: Annotated[str, AfterValidator(known_encoder)] = Field(
        default="resnet101", description="a ResNet, efficientnet_lite0, or timm/NAME with maps at strides 4, 8, 16, 32"
    )
    encoder_weights: str | None = Field(default=None, description="local file with ImageNet weights of the encoder")
    input_size: Size | None = Field(default=None, description="(height, width) frames are resized to; null = native")
    pyramid_channels: Positive = 256
    head_channels: Positive = 128
    norm: Literal["batch", "frozen", "sync"] = Field(
        default="batch",
        description="the encoder's batch norms learn from a worker's batch, not at all, or from all workers' (GPUs)",
    )
    freeze_at: Annotated[int, Field(ge=0, le=5)] = Field(
        default=0, description="first stages of a ResNet that do not learn; 1 = stem, 2 = stem and res2, ..."
    )
    stride_in_1x1: bool = Field(
        default=False,
        description="stages halve the size in a 1x1 convolution, as MSRA's weights want (resnet50 and up)",
    )
    backend: Literal["torchvision", "detectron2"] = Field(
        default="torchvision", description="whose modules compute; detectron2 must be installed for its own"
    )

    @model_validator(mode="after")
    def _settings_that_an_encoder_has(self) -> Network:
        if self.stride_in_1x1 and self.encoder not in BOTTLENECK_RESNETS:
            raise ValueError(f"stride_in_1x1 is for {', '.join(BOTTLENECK_RESNETS)}, not for {self.encoder}")
        if self.freeze_at and self.encoder not in RESNETS:
            raise ValueError(f"freeze_at counts the stages of {', '.join(RESNETS)}, not of {self.encoder}")
        if self.backend == "detectron2" and self.encoder not in RESNETS:
            raise ValueError(f"backend detectron2 computes {', '.join(RESNETS)}, not {self.encoder}")
        return self

    def architecture(self) -> dict[str, Any]:
        """What is built, as arguments of `build_semantic_fpn`; a model card repeats it."""
        keys = ("encoder", "pyramid_channels", "head_channels", "norm", "freeze_at", "stride_in_1x1", "backend")
        return {key: getattr(self, key) for key in keys}

    def identity(self) -> dict[str, Any]:
        """What a stage's result follows from. Later settings count only where they say something, so that stages which
        were done before there were such settings keep their keys."""
        whole = self.model_dump(mode="json")
        later = {"norm": "batch", "freeze_at": 0, "stride_in_1x1": False, "backend": "torchvision"}
        return {key: value for key, value in whole.items() if key not in later or value != later[key]}


class Inference(Strict):
    """How a trained model looks at frames in evaluation, pseudo-labels, predictions. Validation sees whole frames."""

    window: Size | None = Field(default=None, description="(height, width) of a sliding window; null = whole frames")
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.25, description="share of a window covered again")
    flip: bool = Field(default=False, description="look at the mirrored frame as well; probabilities are averaged")
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = Field(
        default=(1.0,), description="factors of the input size, one look each; probabilities are averaged"
    )
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _every_scale_once(self) -> Inference:
        if len(set(self.scales)) != len(self.scales):
            raise ValueError("a scale stands there twice, which would count its look double")
        return self


EXTRACTORS = (
    *("efficientnet_lite0", "inception", "inception_768", "inception_192", "inception_64"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
)


def known_extractor(name: str) -> str:
    """The name, if there is such an extractor; else ValueError with the names there are."""
    if name not in EXTRACTORS and not name.startswith("timm/"):
        known = f"one of {', '.join(EXTRACTORS)}, timm/NAME"
        raise ValueError(f"unknown extractor {name!r}{closest(name, EXTRACTORS)}; {known}")
    return name


ExtractorName = Annotated[str, AfterValidator(known_extractor)]


class Selection(Strict):
    """Which unlabelled frames to learn from."""

    method: Literal["fid-subset", "pooled", "spatial", "mahalanobis", "histogram", "herding", "random"] = Field(
        default="fid-subset",
        description="fid-subset: the set with the smallest FID, with a bound; pooled: as the thesis, frame by frame",
    )
    count: Positive
    quota: Positive | None = Field(default=None, description="most frames of one sequence")
    gap: Positive | None = Field(default=None, description="least distance of two frames of a sequence, in frames")
    duplicates: Fraction | None = Field(default=None, description="cosine from which a frame repeats an earlier one")
    extractor: ExtractorName = "inception"
    extractor_weights: str | None = Field(default=None, description="file with its weights")
    extractor_resize: Literal["pytorch-fid", "clean"] | None = Field(default=None, description="null = the usual one")
    extractor_mode: Literal["exact", "fast"] = Field(default="exact", description="fast: bfloat16 where it is faster")
    reference: Name | None = Field(default=None, description="dataset to be close to; null = the translated train sets")


class Threshold(Strict):
    """Which pixels of a pseudo-label are kept; the rest becomes 255."""

    kind: Literal["none", "fixed", "class_balanced"] = "class_balanced"
    confidence: Fraction = Field(default=0.9, description="fixed: least confidence kept; class_balanced: upper limit")
    share: Fraction = Field(default=0.6, description="class_balanced: share of each class's pixels that is kept")


class SelfTraining(Strict):
    """Pseudo-labels of a teacher on a pool of unlabelled frames, added to the train sets."""

    pool: Name
    teacher: Name | None = Field(default=None, description="null = the model this one starts from")
    select: Selection | None = Field(default=None, description="null = every frame of the pool")
    threshold: Threshold = Threshold()
    inference: Inference | None = Field(default=None, description="how the teacher looks; null = the recipe's")


class TestRow(Strict):
    """One published number that this model and test set reproduce."""

    row: str = ""
    published_miou: Annotated[float, Field(ge=0, le=100)] | None = Field(default=None, description="percent")


class Model(Strict):
    """One segmenter: its data, its start, its teacher and selection, its loss."""

    train: Annotated[list[Name], Field(min_length=1)]
    validate_on: list[Name] = []
    start: str = Field(
        default="imagenet", description="imagenet, scratch, another model's name, or a model folder (a/path)"
    )
    self_training: SelfTraining | None = None
    rounds: Positive = Field(default=1, description="repeat the self-training this many times, each from the last")
    network: Network | None = Field(default=None, description="null = the recipe's")
    loss: Loss | None = Field(default=None, description="null = the recipe's")
    training: Training | None = Field(default=None, description="null = the recipe's")
    test: dict[Name, TestRow] | None = Field(default=None, description="test sets; null = all of the recipe")


class Evaluation(Strict):
    """What is measured on the test sets beside PA, CA, mIoU and FWIoU."""

    boundary: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="distance of boundary IoU, a share of the diagonal (0.02 in its paper); null = none"
    )


class Prediction(Strict):
    """Frames without labels that the report and the user want to see segmented."""

    dataset: Name
    model: Name


class Judgement(Strict):
    """How good a translated dataset is: distances to real frames, and how much of the labels survives."""

    judge: Name | None = Field(
        default=None, description="segmenter that never saw a translated frame; null = the recipe's first model"
    )
    real: Name | None = Field(
        default=None, description="real frames of the domain translated to; null = those of the translator"
    )
    extractor: ExtractorName | None = Field(
        default=None, description="of FID and KID; null = that of the recipe's selections, else efficientnet_lite0"
    )
    extractor_weights: str | None = Field(default=None, description="file with its weights")


class Recipe(Strict):
    """Everything a run does. Sections name things; `nightseg run --dry-run` prints the graph they make."""

    name: Name
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    taxonomy: str = "cityscapes19"
    max_bad_fraction: Fraction = 0.01
    compute: Compute = Compute()
    roots: dict[Name, str] = Field(default={}, description="folders that dataset roots refer to as {name}")
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    translators: dict[Name, AnyTranslator] = {}
    network: Network = Network()
    loss: Loss = Loss()
    training: Training = Training()
    inference: Inference = Inference()
    models: dict[Name, Model] = {}
    test_sets: dict[Name, Name] = Field(default={}, description="name in the tables -> dataset")
    evaluation: Evaluation = Evaluation()
    predictions: dict[Name, Prediction] = {}
    translations: dict[Name, Judgement] = Field(default={}, description="translated dataset -> how to judge it")

    def network_of(self, model: Model) -> Network:
        return model.network or self.network

    def loss_of(self, model: Model) -> Loss:
        return model.loss or self.loss

    def training_of(self, model: Model) -> Training:
        return model.training or self.training


def is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN[1:-1], text) is not None
