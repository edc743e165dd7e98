"""What a recipe may say about a selection of unlabelled frames, and about the features that frames are compared by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from nightseg.errors import closest
from nightseg.settings import Fraction, Name, Positive, Strict

EXTRACTORS: Final = (
    *("efficientnet_lite0", "inception", "inception_768", "inception_192", "inception_64"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
)
"""Besides these any network of timm, as timm/NAME."""

NO_DOWNLOAD: Final = "efficientnet_lite0"


class Method(NamedTuple):
    """A way to choose frames, as recipes, command line and documentation name it."""

    what: str
    needs_reference: bool = True
    needs_positions: bool = False  # of feature maps: the stage `score` then compares each frame with the reference
    is_ranking: bool = (
        True  # by a score of each frame, so that ranks follow from scores; else a set is chosen, or chance
    )
    is_drawn: bool = False  # by chance: each seed of a model draws its own, so that their spread has it
    needs_features: bool = True  # else those of the extractor only tell what the choice is worth


METHODS: Final[Mapping[str, Method]] = {
    "fid-subset": Method("the set with the smallest FID, with a bound that no other set can beat", is_ranking=False),
    "pooled": Method("frame by frame, by the distance to the mean, as the thesis"),
    "spatial": Method("frame by frame, by the Frechet distance over positions", needs_positions=True),
    "mahalanobis": Method("frame by frame, by density"),
    "histogram": Method("frame by frame, by brightness", needs_features=False),
    "herding": Method("by kernel herding", is_ranking=False),
    "random": Method(
        "the control, drawn anew for each seed of a model",
        needs_reference=False,
        is_ranking=False,
        is_drawn=True,
        needs_features=False,
    ),
}
"""All methods there are, and the only list of them: recipes, command line and tests read it. The function of each lies
in selection/methods.py under its name (fid-subset: fid_subset)."""

METHODS_IN_WORDS: Final = "; ".join(f"{name}: {method.what}" for name, method in METHODS.items())


def known_extractor(name: str) -> str:
    """The name, if there is such an extractor; else ValueError with the names there are."""
    if name not in EXTRACTORS and not name.startswith("timm/"):
        known = f"one of {', '.join(EXTRACTORS)}, timm/NAME"
        raise ValueError(f"unknown extractor {name!r}{closest(name, EXTRACTORS)}; {known}")
    return name


def known_method(name: str) -> str:
    """The name, if there is such a method; else ValueError with the names there are."""
    if name not in METHODS:
        raise ValueError(f"{name!r} is not allowed{closest(name, METHODS)}; allowed: {', '.join(METHODS)}")
    return name


class Extraction(Strict):
    """Which features frames are compared by: distances between features of another making mean nothing.

    In a recipe a mapping, or the name alone.
    """

    name: Annotated[str, AfterValidator(known_extractor)] = Field(
        default="inception", description="network whose features are compared"
    )
    weights: str | None = Field(default=None, description="file with its weights; null = those it is known with")
    resize: Literal["pytorch-fid", "clean"] | None = Field(default=None, description="null = the usual one")
    mode: Literal["exact", "fast"] = Field(default="exact", description="fast: bfloat16 where it is faster")

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """For names of stages: other settings are other features."""
        file = hashlib.sha256(self.weights.encode()).hexdigest()[:8] if self.weights else None
        words = (self.name.replace("/", "-"), file, self.resize, "fast" if self.mode == "fast" else None)
        return "-".join(word for word in words if word)


class Selection(Strict):
    """Which unlabelled frames to learn from."""

    method: Annotated[str, AfterValidator(known_method)] = Field(default="fid-subset", description=METHODS_IN_WORDS)
    count: Positive = Field(description="frames to choose")
    quota: Positive | None = Field(default=None, description="most frames of one sequence")
    gap: Positive | None = Field(default=None, description="least distance of two frames of a sequence, in frames")
    duplicates: Fraction | None = Field(default=None, description="cosine from which a frame repeats an earlier one")
    extractor: Extraction = Extraction()
    reference: Name | None = Field(default=None, description="dataset to be close to; null = the translated train sets")

    @model_validator(mode="before")
    @classmethod
    def _measured_by_what_is_there(cls, value: Any) -> Any:
        """No weights have to be fetched for what does not look at features."""
        if not isinstance(value, Mapping) or "extractor" in value or value.get("duplicates") is not None:
            return value
        method = METHODS.get(str(value.get("method")))
        return value if method is None or method.needs_features else {**value, "extractor": NO_DOWNLOAD}

    @property
    def needs_reference(self) -> bool:
        return METHODS[self.method].needs_reference

    @property
    def needs_positions(self) -> bool:
        return METHODS[self.method].needs_positions
