"""What a recipe may say about a selection of unlabelled frames."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nightseg.errors import closest
from nightseg.settings import Fraction, Name, Positive, Strict

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
