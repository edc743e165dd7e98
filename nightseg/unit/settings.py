"""UNIT, the translator that nightseg trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from nightseg.errors import closest
from nightseg.settings import Fraction, Name, Positive, Size, Strict

PerceptualName = Literal["vgg16", "efficientnet_lite0"]

# Each layer, and how many pixels of the image are one of its.
PERCEPTUAL_STRIDES: Final[Mapping[PerceptualName, Mapping[str, int]]] = {
    "vgg16": {
        f"relu{block}_{layer}": (1, 2, 4, 8, 8)[block - 1]
        for block, depth in enumerate((2, 2, 3, 3, 3), 1)
        for layer in range(1, depth + 1)
    },
    "efficientnet_lite0": {f"stride_{stride}": stride for stride in (2, 4, 8, 16, 32)},
}


class LossWeights(Strict):
    """Weights of the UNIT loss terms (night_segmentation 5.1; UNIT, arXiv 1703.00848, MUNIT-style master branch)."""

    adversarial: float = Field(default=1.0, description="GAN loss of the translations")
    reconstruction: float = Field(default=10.0, description="L1 of a frame and its reconstruction")
    kl: float = Field(default=0.01, description="of the latent code")
    cycle: float = Field(default=10.0, description="L1 of a frame and its translation translated back")
    cycle_kl: float = Field(default=0.01, description="of the latent code of the translation")
    perceptual: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0 trains without perceptual loss")
    discriminator: Annotated[float, Field(gt=0)] = Field(default=1.0, description="the discriminators' own loss")

    @property
    def needs_cycle(self) -> bool:
        return self.cycle != 0.0 or self.cycle_kl != 0.0


class Translator(Strict):
    """UNIT between two unlabelled datasets."""

    kind: Literal["unit"] = "unit"
    preset: str | None = Field(
        default=None, description="thesis, paper or small: settings to start from; keys written beside it win"
    )
    day: Name = Field(description="dataset of day frames")
    night: Name = Field(description="dataset of night frames")
    width: Positive = Field(default=64, description="channels of the first layer of the generators")
    res_blocks: Positive = Field(default=4, description="residual blocks of encoder and of decoder")
    shared_blocks: Annotated[int, Field(ge=0)] = Field(
        default=0, description="residual blocks next to the latent code that both domains share; at most res_blocks"
    )
    discriminator_width: Positive = Field(default=64, description="channels of the first layer of the discriminators")
    discriminator_scales: Positive = Field(default=3, description="image scales, one discriminator each")
    discriminator_norm: Literal["none", "layer"] = Field(default="none", description="norm of the discriminators")
    adversarial_loss: Literal["least_squares", "cross_entropy"] = Field(
        default="least_squares", description="least squares (LSGAN) or cross-entropy"
    )
    weights: LossWeights = LossWeights()
    perceptual_network: PerceptualName = Field(default="vgg16", description="network of the perceptual loss")
    perceptual_weights: str | None = Field(default=None, description="file with the VGG16 weights")
    perceptual_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="of that file; null = it is torchvision's"
    )
    perceptual_layers: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="null = relu5_3, or stride_8 and stride_16 of efficientnet_lite0"
    )
    start: str | None = Field(
        default=None,
        description="weights to begin from: a model folder or .safetensors file of a translator, or scenes, which "
        "comes with nightseg; null = random",
    )
    iterations: Positive = Field(default=330_000, description="steps of the training")
    batch: Positive = Field(default=1, description="crops of each domain in a step")
    short_side: Positive | None = Field(
        default=512, description="resize the shorter side to so many pixels before cropping"
    )
    crop: Size = (256, 256)
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-4, description="of Adam")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="of Adam")
    step_every: Positive = Field(default=100_000, description="iterations between halvings of the learning rate")
    ema_decay: Fraction = Field(
        default=0.0, description="of the generators' exponential moving average; 0 = the last weights"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU, where it is as fast"
    )
    compile: bool = Field(default=False, description="torch.compile the networks: minutes at the start, faster steps")
    checkpoint_every: Positive = Field(default=10_000, description="iterations between checkpoints")
    samples_every: Positive | None = Field(
        default=None, description="iterations between sample sheets and loss terms in the run folder; null = at the end"
    )
    collapse_after: Positive | None = Field(
        default=1_000, description="stop when a discriminator teaches nothing for this many iterations; null = never"
    )
    tile: Size | None = Field(
        default=None, description="(height, width): translate larger frames in tiles with blended seams; null = whole"
    )

    @model_validator(mode="after")
    def _layers_are_those_of_the_network(self) -> Translator:
        if self.preset is not None:
            raise ValueError("presets are filled in when a recipe file is read; in Python use nightseg.recipe.presets")
        network, known = self.perceptual_network, PERCEPTUAL_STRIDES[self.perceptual_network]
        for layer in self.perceptual_layers or ():
            if layer not in known:
                hint = f"{closest(layer, known)}; it has {', '.join(known)}"
                raise ValueError(f"perceptual_layers: {network} has no layer {layer!r}{hint}")
        if network != "vgg16" and (self.perceptual_weights is not None or self.perceptual_sha256 is not None):
            raise ValueError(
                f"perceptual_weights and perceptual_sha256 are of vgg16 only; {network} comes with its own"
            )
        if self.shared_blocks > self.res_blocks:
            raise ValueError(f"shared_blocks {self.shared_blocks} of res_blocks {self.res_blocks}: at most all of them")
        return self
