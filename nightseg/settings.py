"""The base of all types of the recipe, and the small words they share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Size = Annotated[tuple[Positive, Positive], Field(description="(height, width) in pixels")]
Domain = Literal["day", "night", "twilight", "unknown"]


class Strict(BaseModel):
    """The one base of all recipe types: frozen, no unknown keys, no type coercion beyond int to float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
