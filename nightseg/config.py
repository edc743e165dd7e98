"""The recipe: what to learn from what, as frozen and strict types.

A recipe names things and says how they are made from each other: datasets, translators, models, test sets. Every
reference is a name, so the recipe is a graph; `check_graph` refuses unknown names and cycles before anything runs.
Reading YAML, overrides and the wording of errors live in `recipe/`; here are only the types and their rules.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nightseg.errors import closest
from nightseg.presets import LATER_SETTINGS, PERCEPTUAL_LAYERS, TRANSLATORS, completed

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Size = Annotated[tuple[Positive, Positive], Field(description="(height, width) in pixels")]
Domain = Literal["day", "night", "twilight", "unknown"]


class Strict(BaseModel):
    """The one base of all recipe types: frozen, no unknown keys, no type coercion beyond int to float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


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
    discriminator: Annotated[float, Field(gt=0)] = Field(default=1.0, description="the discriminators' own loss")


class Translator(Strict):
    """UNIT between two unlabelled datasets."""

    preset: Literal["thesis", "paper", "small"] | None = Field(
        default=None, description="settings known by a name; keys written beside it count more (presets.py)"
    )
    day: Name
    night: Name
    width: Positive = 64
    res_blocks: Positive = 4
    shared_blocks: Annotated[int, Field(ge=0)] = Field(
        default=0, description="residual blocks next to the latent code that both domains share; at most res_blocks"
    )
    discriminator_width: Positive = 64
    discriminator_scales: Positive = 3
    discriminator_norm: Literal["none", "layer"] = "none"
    adversarial_loss: Literal["least_squares", "cross_entropy"] = "least_squares"
    weights: UnitWeights = UnitWeights()
    perceptual_network: Literal["vgg16", "efficientnet_lite0"] = "vgg16"
    perceptual_weights: str | None = Field(default=None, description="file with the VGG16 weights")
    perceptual_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="of that file; null = it is torchvision's"
    )
    perceptual_layers: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="null = relu5_3, or stride_8 and stride_16 of efficientnet_lite0"
    )
    iterations: Positive = 330_000
    batch: Positive = 1
    short_side: Positive | None = Field(default=512, description="resize the shorter side to this before cropping")
    crop: Size = (256, 256)
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    step_every: Positive = Field(default=100_000, description="iterations between halvings of the learning rate")
    average: Fraction = Field(default=0.0, description="decay of the generators' running mean; 0 = the last weights")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU, where it is as fast"
    )
    compile: bool = Field(default=False, description="torch.compile the networks: minutes at the start, faster steps")
    checkpoint_every: Positive = 10_000
    samples_every: Positive | None = Field(
        default=None, description="iterations between sample sheets and loss terms in the run folder; null = at the end"
    )
    collapse_after: Positive | None = Field(
        default=1_000, description="stop when a discriminator teaches nothing for this many iterations; null = never"
    )
    tile: Size | None = Field(
        default=None, description="translate frames larger than this in tiles with blended seams; null = whole"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # What a validator returns is no JSON any more, and a list no tuple.
        sizes = {key: tuple(data[key]) for key in ("crop", "tile") if isinstance(data.get(key), list)}
        return completed(data | sizes, TRANSLATORS)

    @model_validator(mode="after")
    def _layers_are_those_of_the_network(self) -> Translator:
        network, known = self.perceptual_network, PERCEPTUAL_LAYERS[self.perceptual_network]
        for layer in self.perceptual_layers or ():
            if layer not in known:
                hint = f"{closest(layer, known)}; it has {', '.join(known)}"
                raise ValueError(f"perceptual_layers: {network} has no layer {layer!r}{hint}")
        if self.shared_blocks > self.res_blocks:
            raise ValueError(f"shared_blocks {self.shared_blocks} of res_blocks {self.res_blocks}: at most all of them")
        return self

    def facts(self) -> dict[str, Any]:
        """What shapes the trained translator, for its key. Settings that came later count where they say something."""
        facts = self.model_dump(mode="json", exclude={"day", "night", "preset", "tile", "collapse_after"})
        for name in LATER_SETTINGS:
            if facts[name] == type(self).model_fields[name].default:
                del facts[name]
        if self.weights.discriminator == UnitWeights().discriminator:
            del facts["weights"]["discriminator"]
        return facts


# -- models ----------------------------------------------------------------------------------------------------------


class Network(Strict):
    """Semantic FPN: encoder, and the size frames are resized to before training and inference."""

    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0"] = "resnet101"
    encoder_weights: str | None = Field(default=None, description="local file with ImageNet weights of a ResNet")
    input_size: Size | None = Field(default=None, description="(height, width) frames are resized to; null = native")
    pyramid_channels: Positive = 256
    head_channels: Positive = 128


class Loss(Strict):
    """Cross-entropy, focal, or alpha CE + (1 - alpha) w focal (thesis section 3)."""

    kind: Literal["cross_entropy", "focal", "combined"] = "cross_entropy"
    alpha: Fraction = 0.5
    gamma: Annotated[float, Field(ge=0)] = 2.0
    focal_weight: Annotated[float, Field(gt=0)] = 1.0


class Augmentation(Strict):
    """Joint image and label transforms, drawn from (seed, epoch, frame)."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    flip: Fraction = 0.5
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    noise: Fraction = Field(default=0.0, description="largest standard deviation of the noise, as a share of white")


class Training(Strict):
    """The optimisation of one segmenter."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch: Positive = 4
    epochs: Positive = 60
    steps_per_epoch: Positive | None = Field(default=None, description="null = one pass over the frames")
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    poly_power: Annotated[float, Field(ge=0)] = 0.9
    crop: Size = (512, 1024)
    freeze_batch_norm: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    validate_every: Positive = Field(default=1, description="epochs between validations")
    augmentation: Augmentation = Augmentation()


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


class TestRow(Strict):
    """One published number that this model and test set reproduce."""

    row: str = ""
    published_miou: Annotated[float, Field(ge=0, le=100)] | None = Field(default=None, description="percent")


class Model(Strict):
    """One segmenter: its data, its start, its teacher and selection, its loss."""

    train: Annotated[list[Name], Field(min_length=1)]
    validate_on: list[Name] = []
    start: str = Field(default="imagenet", description="imagenet, scratch, or the name of another model")
    self_training: SelfTraining | None = None
    rounds: Positive = Field(default=1, description="repeat the self-training this many times, each from the last")
    network: Network | None = Field(default=None, description="null = the recipe's")
    loss: Loss | None = Field(default=None, description="null = the recipe's")
    training: Training | None = Field(default=None, description="null = the recipe's")
    test: dict[Name, TestRow] | None = Field(default=None, description="test sets; null = all of the recipe")


class Prediction(Strict):
    """Frames without labels that the report and the user want to see segmented."""

    dataset: Name
    model: Name


class Recipe(Strict):
    """Everything a run does. Sections name things; `nightseg run --dry-run` prints the graph they make."""

    name: Name
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    taxonomy: str = "cityscapes19"
    max_bad_fraction: Fraction = 0.01
    compute: Compute = Compute()
    roots: dict[Name, str] = Field(default={}, description="folders that dataset roots refer to as {name}")
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    translators: dict[Name, Translator] = {}
    network: Network = Network()
    loss: Loss = Loss()
    training: Training = Training()
    models: dict[Name, Model] = {}
    test_sets: dict[Name, Name] = Field(default={}, description="name in the tables -> dataset")
    predictions: dict[Name, Prediction] = {}

    def network_of(self, model: Model) -> Network:
        return model.network or self.network

    def loss_of(self, model: Model) -> Loss:
        return model.loss or self.loss

    def training_of(self, model: Model) -> Training:
        return model.training or self.training


def is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN[1:-1], text) is not None
