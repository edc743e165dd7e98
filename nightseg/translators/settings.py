"""Translators that need no training: what a recipe may say about them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from nightseg.errors import closest
from nightseg.settings import Fraction, Name, Positive, Strict

PLACEHOLDERS = ("input", "output", "labels", "seed", "to")

_NEEDED = {"input": "reads the frames from", "output": "writes the translated frames to"}

Range = tuple[float, float]


class LitClasses(Strict):
    """Which classes of the taxonomy are the sky, and which of them carry lights at night."""

    sky: list[str] = Field(default=["sky"], description="classes of the sky")
    vehicle: list[str] = Field(
        default=["car", "truck", "bus", "van", "motorcycle"], description="classes with headlights and rear lights"
    )
    signal: list[str] = Field(default=["traffic light"], description="classes of traffic lights")
    facade: list[str] = Field(default=["building", "window", "house"], description="classes with windows")
    lamp: list[str] = Field(
        default=["pole", "lamp", "street light", "polegroup"], description="classes that carry street lamps"
    )

    def unknown(self, translator: str, classes: Collection[str]) -> list[str]:
        """What to say where a class list has none of the classes that a role names; an empty list is meant so."""
        missing = [role for role, names in self if names and not any(name in classes for name in names)]
        said, key = [], f"translators.{translator}.classes"
        if "sky" in missing:
            said.append(
                f"no class is the sky, so nights by {translator} keep a bright one: set `{key}.sky: [NAME]` ([] if "
                "there is none)"
            )
        if lights := [role for role in missing if role != "sky"]:
            others = f", likewise {', '.join(lights[1:])}" if lights[1:] else ""
            said.append(
                f"no class is {' or '.join(lights)}, so nothing lights up there in nights by {translator}: set "
                f"`{key}.{lights[0]}: [NAME, ...]`{others} ([] if there is none)"
            )
        return said if set(missing) != {"signal"} else []  # many lists have no traffic lights


class PhotometricTranslator(Strict):
    """Night by optics, from the day frame and its label: no training, no night frame; never to day."""

    kind: Literal["photometric"]
    stops: Range = Field(
        default=(-4.0, -2.0), description="exposure of a frame in stops, drawn from this range; at most 0"
    )
    temperature: Range = Field(default=(2400.0, 4500.0), description="kelvin of the street light, drawn likewise")
    vignette: Fraction = Field(default=0.4, description="share of the light that the lens loses in the corners")
    electrons: Annotated[float, Field(gt=0)] = Field(
        default=1500.0, description="that white frees in the sensor; shot noise has the variance signal / electrons"
    )
    read_noise: Annotated[float, Field(ge=0)] = Field(default=0.0015, description="standard deviation, 1 = white")
    sky: Annotated[float, Field(ge=0)] | Range = Field(
        default=0.06,
        description="light that the sky keeps, as a share of what all else keeps, or a range of it; above 1 for dusk",
    )
    glow: Range = Field(
        default=(0.0, 0.0), description="light of lamps in the haze, 1 = white, drawn likewise: before the sky and afar"
    )
    tint: Fraction = Field(default=0.0, description="largest change of green against red and blue, both ways: cameras")
    beam: Annotated[float, Field(ge=0)] = Field(default=1.5, description="our own headlights, 1 = the street's light")
    lights: Annotated[float, Field(ge=0)] = Field(default=1.0, description="strength of lamps and windows; 0 = none")
    classes: LitClasses = LitClasses()

    @field_validator("stops")
    @classmethod
    def _stops_darken(cls, value: Range) -> Range:
        if not value[0] <= value[1] <= 0:
            raise ValueError(f"stops go from the darkest to the brightest exposure, at most 0; got {list(value)}")
        return value

    @field_validator("sky", "glow")
    @classmethod
    def _light_is_no_darkness(cls, value: float | Range) -> float | Range:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 0 <= low <= high:
            raise ValueError(f"a range goes from low to high, from 0 on; got {[low, high]}")
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_is_known(cls, value: Range) -> Range:
        if not 1667 <= value[0] <= value[1] <= 25000:
            raise ValueError(f"temperature goes from low to high, between 1667 and 25000 kelvin; got {list(value)}")
        return value


class FourierTranslator(Strict):
    """FDA: the low-frequency amplitudes of a night frame, the phases of the day frame (arXiv 2004.05498)."""

    kind: Literal["fourier"]
    night: Name = Field(description="dataset of the style images for `to: night`")
    day: Name | None = Field(default=None, description="the same for `to: day`; null = not translated to day")
    beta: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.01, description="frequencies below this many cycles a pixel are swapped; 0 = none"
    )
    style_images: Positive = Field(default=200, description="frames of night (or day) to draw from, chosen by the seed")
    nearest: Positive | None = Field(
        default=None, description="draw from this many with the most similar layout; null = all"
    )


class ColourTranslator(Strict):
    """The colours of a night frame whose layout is like the day frame's."""

    kind: Literal["colour"]
    night: Name = Field(description="dataset of the style images for `to: night`")
    day: Name | None = Field(default=None, description="the same for `to: day`; null = not translated to day")
    method: Literal["reinhard", "histogram"] = Field(
        default="reinhard", description="mean and deviation in Oklab, or the histogram of each band"
    )
    style_images: Positive = Field(default=200, description="frames of night (or day) to draw from, chosen by the seed")
    nearest: Positive | None = Field(
        default=5, description="draw from this many with the most similar layout; null = all"
    )


class CommandTranslator(Strict):
    """A program of the user: PNGs in a folder in, PNGs of the same names and sizes in a folder out."""

    kind: Literal["command"]
    argv: Annotated[list[str], Field(min_length=1)] = Field(
        description="program and arguments, no shell; {input} {output} {labels} {seed} {to} are filled in"
    )
    to: Annotated[list[Literal["day", "night"]], Field(min_length=1)] = Field(
        default=["night"], description="what it can translate to"
    )
    revision: int | str = Field(
        default="", description="change it when the program changes: frames are translated again"
    )
    timeout_seconds: Annotated[float, Field(gt=0)] | None = Field(default=None, description="of one shard; null = none")

    @field_validator("argv")
    @classmethod
    def _placeholders_are_known(cls, value: list[str]) -> list[str]:
        used = set(re.findall(r"\{([a-z_]+)\}", " ".join(value)))
        for word in sorted(used - set(PLACEHOLDERS)):
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"{{{word}}} is not filled in{closest(word, PLACEHOLDERS)}; known: {known}")
        for word, use in _NEEDED.items():
            if word not in used:
                raise ValueError(f"the arguments need {{{word}}}: the folder that the program {use}")
        return value


UntrainedTranslator = PhotometricTranslator | FourierTranslator | ColourTranslator | CommandTranslator


def translator_kind(value: Any) -> str:
    """The kind of a translator; UNIT where none is given."""
    return str(value.get("kind", "unit") if isinstance(value, dict) else getattr(value, "kind", "unit"))
