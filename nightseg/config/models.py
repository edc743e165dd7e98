"""Segmenters: network, teacher, selection, the way they look at frames."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from nightseg.config.strict import Fraction, Name, Positive, Size, Strict
from nightseg.config.training import Loss, Training
from nightseg.errors import closest

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
