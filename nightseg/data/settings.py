"""Where frames come from: folders, scenes, sides of a pool, translations, several of them; class lists of labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WrapValidator, model_validator

from nightseg.settings import Domain, Fraction, Name, Positive, Size, Strict

Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = tuple[Byte, Byte, Byte]
RawIds = Byte | list[Byte] | list[Rgb]  # of an 8-bit label file; [red, green, blue] for the encoding `colors`


class ListedClass(Strict):
    """A class: its colour, and its ids in the label files. Its place in the list is its train id."""

    name: str = Field(description="what it is called")
    color: Rgb | None = Field(default=None, description="[red, green, blue]; null = one is made up")
    ids: RawIds | dict[str, RawIds] = Field(
        default={},
        description="what the label files hold for it: an id, a list of them, or encoding -> ids; none = its train id",
    )


class ClassList(Strict):
    """A class list, in a recipe or in a file of its own."""

    name: str = Field(default="own", description="what reports and model folders call it")
    classes: Annotated[list[ListedClass], Field(min_length=2, max_length=255)] = Field(
        description="the classes; the place in this list is the train id, from 0"
    )
    ignore: RawIds | Literal["rest"] | dict[str, RawIds | Literal["rest"]] = Field(
        default={}, description="ids without a class, by encoding where there are several; rest = every other id"
    )


def _named_or_listed(value: Any, handler: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):  # errors are those of the class list, and not of all that might stand here
        return ClassList.model_validate_json(json.dumps(value))
    if value is None or isinstance(value, str | ClassList):
        return handler(value)
    raise ValueError("give the name of a class list, a file, or a mapping with `classes`")


AnyTaxonomy = Annotated[str | ClassList, WrapValidator(_named_or_listed)]


class FolderDataset(Strict):
    """Frames that lie in folders. The layout says where images and labels are."""

    layout: Literal[
        "pairs",
        "images",
        "camvid",
        "cityscapes",
        "nighttime_driving",
        "acdc",
        "dark_zurich",
        "bdd100k",
        "nightcity",
        "mapillary",
        "nexet",
    ] = Field(
        description="where images and labels lie (docs/own-data.md): pairs = as `images` and `labels` say; "
        "images = any folder, without labels"
    )
    root: str = Field(description="the folder of the data set; {name} stands for what roots says")
    split: str = Field(default="", description="the part of it, such as train, val, test")
    images: str | None = Field(
        default=None,
        description="pairs: folder below root, pattern (`rgb/**/*.jpg`) or template (`rgb/{name}_left`); null = images",
    )
    labels: str | None = Field(
        default=None,
        description="pairs: folder, pattern or template of the labels (`masks/{name}_gt`); null = labels",
    )
    split_list: str | None = Field(
        default=None, description="text or CSV file, below root, that names the frames; null = all"
    )
    domain: Domain = Field(default="unknown", description="of all frames; unknown = what the layout says, if it does")
    labelled: bool = Field(default=True, description="whether there are labels; false = none are read")
    label_encoding: str | None = Field(
        default=None,
        description="what the labels hold: an encoding of the class list, or colors; null = what layout, names and "
        "files say",
    )
    taxonomy: AnyTaxonomy | None = Field(default=None, description="class list of these labels; null = the recipe's")
    map: dict[str, str | None] = Field(
        default={},
        description="class of that list -> class of the recipe's, null = ignored; those of the same name need no entry",
    )
    limit: Positive | None = Field(default=None, description="keep the first N frames in name order")

    @model_validator(mode="after")
    def _keys_of_its_layout(self) -> FolderDataset:
        if self.layout != "pairs" and (self.images is not None or self.labels is not None):
            raise ValueError(f"images and labels are for layout: pairs, and the layout is {self.layout}")
        if self.map and self.taxonomy is None:
            raise ValueError("map says which classes of another list are which of the recipe's: give its `taxonomy`")
        if (
            self.layout == "pairs" and self.split and self.split_list is None
            and not any("{split}" in (text or "") for text in (self.images, self.labels))
        ):  # fmt: skip
            raise ValueError(
                f"split {self.split!r} is used by nothing: write {{split}} where it stands in the paths, "
                'as in `images: "{split}/images"`, or give a split_list'
            )
        return self

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
