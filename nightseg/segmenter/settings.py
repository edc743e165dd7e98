"""What a recipe may say about a segmenter: network, loss, training, inference, thresholds of pseudo-labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from nightseg.errors import closest
from nightseg.settings import Fraction, Name, Positive, Size, Strict

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BOTTLENECK_RESNETS = RESNETS[2:]
LITE_ENCODERS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
ENCODERS = (*RESNETS, *LITE_ENCODERS)


def known_encoder(name: str) -> str:
    """The name, if there may be such an encoder; timm's are looked up before anything runs, but not here."""
    if name not in ENCODERS and not name.startswith("timm/"):
        raise ValueError(f"unknown encoder {name!r}{closest(name, ENCODERS)}; one of {', '.join(ENCODERS)}, timm/NAME")
    return name


class Network(Strict):
    """Semantic FPN: encoder, and the size frames are resized to before training and inference."""

    encoder: Annotated[str, AfterValidator(known_encoder)] = Field(
        default="resnet101",
        description="a ResNet, efficientnet_lite0 to 2, or timm/NAME: maps at strides 4 to 32, or a transformer",
    )
    encoder_weights: str | None = Field(default=None, description="local file with ImageNet weights of the encoder")
    input_size: Size | None = Field(default=None, description="(height, width) frames are resized to; null = native")
    pyramid_channels: Positive = Field(default=256, description="channels of the feature pyramid")
    head_channels: Positive = Field(default=128, description="channels of the segmentation head")
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


class Inference(Strict):
    """How a trained model sees frames in evaluation, pseudo-labels, predictions. Validation sees whole frames."""

    window: Size | None = Field(default=None, description="(height, width) of a sliding window; null = whole frames")
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.25, description="share of a window covered again")
    flip: bool = Field(
        default=False, description="test-time augmentation: the mirrored frame as well; probabilities averaged"
    )
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = Field(
        default=(1.0,), description="test-time augmentation: factors of the input size; probabilities averaged"
    )
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of the forward pass")

    @model_validator(mode="after")
    def _every_scale_once(self) -> Inference:
        if len(set(self.scales)) != len(self.scales):
            raise ValueError("scales: a scale is given twice, and would count twice in the mean")
        return self


class Ohem(Strict):
    """Online hard example mining (arXiv 1604.03540, for pixels): the loss counts the hardest pixels of each frame only,
    a share of them, or those below a confidence."""

    share: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="of a frame's valid pixels")
    confidence: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="learn from pixels whose true class has at most this probability"
    )
    min_kept: Positive = Field(default=10_000, description="with confidence: the fewest pixels kept of a frame")

    @model_validator(mode="after")
    def _one_rule(self) -> Ohem:
        if (self.share is None) == (self.confidence is None):
            raise ValueError("give exactly one of share and confidence")
        return self


class Loss(Strict):
    """Cross-entropy, focal, or alpha CE + (1 - alpha) w focal (thesis section 3)."""

    kind: Literal["cross_entropy", "focal", "combined"] = Field(
        default="cross_entropy", description="combined: alpha CE + (1 - alpha) focal_weight focal"
    )
    alpha: Fraction = Field(default=0.5, description="combined: share of the cross-entropy")
    gamma: Annotated[float, Field(ge=0)] = Field(default=2.0, description="focal: exponent of 1 - p_t")
    focal_weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="combined: factor of the focal term")
    class_weights: dict[str, Annotated[float, Field(ge=0)]] | list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="class name -> weight (others weigh 1), or a weight for every class in order"
    )
    ohem: Ohem | None = Field(default=None, description="null = learn from every valid pixel")
    loss_chunk_rows: Annotated[int, Field(ge=4, multiple_of=4)] | None = Field(
        default=None, description="rows of full-size logits held at a time (16 is good): less memory; null = all"
    )

    @property
    def cross_entropy_share(self) -> float:
        """`alpha`, but where the kind is pure."""
        return {"cross_entropy": 1.0, "focal": 0.0, "combined": self.alpha}[self.kind]


class Augmentation(Strict):
    """Joint image and label transforms, drawn from (seed, epoch, frame)."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        default=(0.5, 2.0), description="range of the random resize, as a share of the input size"
    )
    flip: Fraction = Field(default=0.5, description="probability of a horizontal flip")
    brightness: Fraction = Field(default=0.0, description="largest relative change")
    contrast: Fraction = Field(default=0.0, description="largest relative change")
    saturation: Fraction = Field(default=0.0, description="largest relative change")
    noise: Fraction = Field(default=0.0, description="largest standard deviation of the noise, as a share of white")
    gamma: Annotated[float, Field(ge=0, le=4)] = Field(
        default=0.0, description="largest change of the tone curve's exponent, in powers of two: 1 = from 1/2 to 2"
    )
    hue: Fraction = Field(default=0.0, description="largest change, both ways together, as a share of the circle")
    blur: Annotated[float, Field(ge=0, le=16)] = Field(
        default=0.0, description="largest standard deviation of a blur, in pixels of the crop"
    )


class ClassSampling(Strict):
    """Rare class sampling (arXiv 2111.14887): a class is drawn first, the rarer the likelier, then a frame that shows
    it, and a crop that does. In parts of the training set whose labels were counted when they were collected."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="of the softmax over 1 - share of the pixels: small = the rarest classes, large = all"
    )
    min_share: Fraction = Field(
        default=0.005, description="a frame or crop shows a class that has this share of its pixels"
    )


class Training(Strict):
    """The optimisation of one segmenter."""

    preset: str | None = Field(
        default=None, description="thesis or detectron2: settings to start from; keys written beside it win"
    )
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="SGD with momentum, or AdamW")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="after the warm-up, before the decay"
    )
    encoder_rate: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="learning rate of the encoder, as a multiple of learning_rate"
    )
    head_rate: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="learning rate of all that follows the encoder, as a multiple of learning_rate"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="learning rate of a stage of the encoder (block of a transformer), as share of the next's",
    )
    momentum: Fraction = Field(default=0.9, description="of SGD")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="of convolutions; not of norms")
    decay_biases: bool = Field(default=False, description="biases of convolutions are decayed too, as in detectron2")
    batch: Positive = Field(default=4, description="frames of one step, over all workers")
    accumulate: Positive = Field(
        default=1, description="parts in which a worker takes its frames of a step: less memory"
    )
    epochs: Positive = Field(default=60, description="number of epochs")
    steps_per_epoch: Positive | None = Field(
        default=None, description="steps of an epoch; null = one pass over the frames"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=200, description="steps in which the learning rate rises linearly"
    )
    decay: Literal["poly", "step", "cosine"] = Field(default="poly", description="how the learning rate falls, once")
    poly_power: Annotated[float, Field(ge=0)] = Field(default=0.9, description="poly: exponent of the decay")
    decay_at: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = Field(
        default=[2 / 3, 8 / 9], description="step: shares of the training after which the rate falls"
    )
    decay_factor: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.1, description="step: what it falls by")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(default=None, description="largest norm of the gradient")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="decay of the EMA of the weights, which becomes the model; 0 = the last weights"
    )
    crop: Size = (512, 1024)
    freeze_batch_norm: bool = Field(default=False, description="batch norms keep their statistics and weights")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of forward and backward passes; weights stay float32"
    )
    compile: bool = Field(default=False, description="torch.compile the network: slow first steps, then faster ones")
    validate_every: Positive = Field(default=1, description="epochs between validations")
    keep: Literal["last", "best"] = Field(
        default="last",
        description="which weights become the model: the last ones, or those of the validation with the best mIoU on "
        "`validate_on`, which must then not be a test set",
    )
    checkpoint_every: Positive | None = Field(
        default=None, description="steps between checkpoints; null = after each epoch, and every ten minutes in one"
    )
    augmentation: Augmentation = Augmentation()
    class_sampling: ClassSampling | None = Field(default=None, description="null = every frame of a set alike")

    def steps_of_epoch(self, num_frames: int) -> int:
        return self.steps_per_epoch or -(-num_frames // self.batch)

    @model_validator(mode="after")
    def _holds_together(self) -> Training:
        if self.preset is not None:
            raise ValueError("presets are filled in when a recipe file is read; in Python use nightseg.recipe.presets")
        if self.decay_at != sorted(set(self.decay_at)):
            raise ValueError("decay_at: the shares must rise")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} cannot be taken in {self.accumulate} equal parts (accumulate)")
        return self


class AdaptNorms(Strict):
    """AdaBN (arXiv 1603.04779): batch norms take their statistics from unlabelled frames; no weight learns."""

    pool: Name = Field(description="dataset of frames, labelled or not")
    frames: Positive = Field(default=200, description="so many of them, drawn by the seed")
    share: Fraction = Field(
        default=1.0, description="of the pool's statistics; the rest are the model's own (arXiv 2006.16971)"
    )


class Threshold(Strict):
    """Which pixels of a pseudo-label are kept; the rest becomes 255."""

    kind: Literal["none", "fixed", "class_balanced"] = Field(
        default="class_balanced",
        description="none keeps every pixel; fixed: one confidence for all classes; class_balanced: one for each class",
    )
    confidence: Fraction = Field(default=0.9, description="fixed: least confidence kept; class_balanced: upper limit")
    share: Fraction = Field(default=0.6, description="class_balanced: share of each class's pixels that is kept")
    floor: Fraction = Field(default=0.0, description="class_balanced: lower limit of the confidence, for every class")

    precision: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="online, class_balanced: of the kept pixels of a class so many must be right on labelled frames "
        "under night light; null = not looked at",
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> Threshold:
        if self.floor and self.kind != "class_balanced":
            raise ValueError(f"floor is the lower limit of class_balanced thresholds, {self.kind} has none")
        if self.precision and self.kind != "class_balanced":
            raise ValueError(f"precision raises class_balanced thresholds, {self.kind} has none")
        if self.floor > self.confidence:
            raise ValueError(f"floor {self.floor} is above confidence {self.confidence}, the upper limit")
        return self


class Masked(Strict):
    """Masked image consistency (arXiv 2212.01322): the student sees a frame of the pool with squares left out, and
    learns the teacher's labels of the whole frame."""

    patch: Positive = Field(default=32, description="side of a square, in pixels of the crop")
    ratio: Fraction = Field(default=0.7, description="share of the squares that is left out")
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="of its pixels, times online.weight")


class Guard(Strict):
    """Sees a teacher that gives a class away or lets it swallow others, by the share of the pool that it predicts."""

    act: Literal["ignore", "warn", "stop"] = Field(
        default="ignore",
        description="a class out of range: its pixels are not learned, only told, or the teacher teaches no more",
    )
    range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = Field(
        default=(0.5, 1.5), description="of a class's share of the pool, as a multiple of its share at the start"
    )

    @model_validator(mode="after")
    def _range_around_one(self) -> Guard:
        if not self.range[0] < 1 < self.range[1]:
            raise ValueError(f"range {self.range}: a share that has not changed, 1, must lie in it")
        return self


class OnlineGuard(Guard):
    """Of a teacher that changes while it teaches: the start is in the same training."""

    start_steps: Positive = Field(default=25, description="steps whose mean is the share at the start")


class Online(Strict):
    """Self-training while the model learns: its EMA labels the pool in every step (arXiv 1703.01780, 2007.08702)."""

    batch: Positive | None = Field(
        default=None, description="frames of the pool in a step, over all workers; null = half of training.batch"
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="of a pixel of the pool, as a multiple of a labelled one"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps before the teacher teaches")
    mix: Literal["classmix", "cutmix", "none"] = Field(
        default="classmix",
        description="pasted on a frame of the pool: half of the classes of a labelled frame, a box of it, or nothing",
    )
    masked: Masked | None = Field(default=None, description="masked image consistency; null = none")
    flip: bool = Field(default=False, description="the teacher sees the mirrored frame as well; averaged")
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = Field(
        default=(1.0,), description="the teacher sees frames at these factors of their size; averaged"
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of the teacher's forward pass; null = training.precision"
    )
    memory: Positive = Field(
        default=100, description="steps that the running counts of classes and confidences reach back"
    )
    guard: OnlineGuard = OnlineGuard()
    augmentation: Augmentation = Field(
        default=Augmentation(brightness=0.5, contrast=0.5, saturation=0.5, noise=0.05),
        description="of the pool: scale and flip for teacher and student, all else for the student alone; default: "
        "brightness, contrast and saturation 0.5, noise 0.05",
    )

    def frames(self, training: Training) -> int:
        """Frames of the pool in a step, over all workers."""
        return self.batch or max(1, training.batch // 2)


class Teaching(Strict):
    """What a model that teaches itself is told of its pool."""

    online: Online = Online()
    threshold: Threshold = Threshold()
    never_below: dict[str, list[str]] = Field(default={}, description="class -> classes that it is never below")
