"""Where frames come from: folders, scenes, sides of a pool, translations, several of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from nightseg.settings import Domain, Fraction, Name, Positive, Size, Strict


class FolderDataset(Strict):
    """Frames that lie in folders. The layout says where images and labels are."""

    layout: Literal["camvid", "cityscapes", "nighttime_driving", "images"] = Field(
        description="where images and labels lie: see nightseg/data/layouts.py; images = any folder, without labels"
    )
    root: str = Field(description="the folder of the data set; {name} stands for what roots says")
    split: str = Field(default="", description="the part of it, such as train, val, test")
    domain: Domain = Field(default="unknown", description="of all frames; unknown = what the layout says, if it does")
    labelled: bool = Field(default=True, description="whether there are labels; false = none are read")
    label_encoding: str | None = Field(default=None, description="raw-id map of the labels; null = the layout's own")
    limit: Positive | None = Field(default=None, description="keep the first N frames in name order")

    @classmethod
    def of_images(cls, folder: str) -> FolderDataset:
        """All images of a folder, without labels."""
        return cls(layout="images", root=folder, labelled=False)


class ScenesDataset(Strict):
    """Procedural street scenes with exact labels (nightseg/data/scenes); `mix` gives the share of each domain."""

    layout: Literal["scenes"] = Field(description="frames are drawn, no folder is read")
    count: Positive = Field(description="number of frames")
    mix: dict[Literal["day", "night", "twilight"], Fraction] = Field(
        default={"day": 1.0}, description="share of each domain; they add up to 1"
    )
    size: Size = (128, 256)
    labelled: bool = Field(default=True, description="whether labels are written, and the domain told")
    scene_seed: Annotated[int, Field(ge=0)] = Field(default=0, description="another seed draws other streets")
    first: Annotated[int, Field(ge=0)] = Field(default=0, description="index of the first scene")

    @model_validator(mode="after")
    def _shares_add_up(self) -> ScenesDataset:
        if abs(sum(self.mix.values()) - 1.0) > 1e-6:
            raise ValueError(f"the shares of mix must add up to 1, they add up to {sum(self.mix.values()):g}")
        return self


class SplitDataset(Strict):
    """One side of a pool of frames, separated by luminance histograms (thesis section 1)."""

    split: Name = Field(description="the dataset that is a pool of day, night and twilight frames")
    keep: Literal["day", "night", "twilight"] = Field(description="the side that this dataset is")
    margin: Fraction = Field(default=0.2, description="frames with a smaller margin between the domains are twilight")


class TranslatedDataset(Strict):
    """Every frame of a dataset passed through a translator; labels stay valid and are referenced."""

    translate: Name = Field(description="dataset whose frames are translated")
    by: Name = Field(description="translator")
    to: Literal["day", "night"] = Field(default="night", description="domain that they are translated to")
    fresh: bool = Field(
        default=False,
        description="photometric: where a model trains on it, a frame is translated anew each time that it is drawn",
    )


class JoinedDataset(Strict):
    """Several datasets as one."""

    join: Annotated[list[Name], Field(min_length=1)] = Field(description="datasets whose frames are put together")


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
