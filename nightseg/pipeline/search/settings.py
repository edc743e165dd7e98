"""What a search may say: which keys of a recipe, by which score, how long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from nightseg.errors import closest
from nightseg.recipe.types import Seeds
from nightseg.report.formatting import plain, short_names
from nightseg.settings import Name, Positive, Strict

MOST_OF_A_GRID: Final = 10_000

Above = Annotated[float, Field(gt=0)]


class Dimension(Strict):
    """One searched key: a range of numbers, or a list of values. The ends of a range belong to it."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[Above, float] | None = None
    integer: tuple[int, int] | None = None
    log_integer: tuple[Positive, int] | None = None
    choice: Annotated[list[int | float | str | bool], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        kinds = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        if self.range is not None and not self.range[0] < self.range[1]:
            low, high = self.range
            raise ValueError(f"the range begins at {plain(low)} and ends at {plain(high)}; the end must be larger")
        if self.choice is not None and len({_typed(value) for value in self.choice}) < len(self.choice):
            raise ValueError("a value of choice stands there twice")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        return self.uniform or self.log_uniform or self.integer or self.log_integer

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return bool(self.integer or self.log_integer)

    @property
    def is_log(self) -> bool:
        return bool(self.log_uniform or self.log_integer)

    def edges(self) -> list[Any]:
        """The values that decide what the dimension reaches: the ends of a range, or all of a choice."""
        return list(self.choice or self.range or ())

    @property
    def size(self) -> float:
        """How many values there are; infinity for ranges of real numbers."""
        if self.choice is not None:
            return len(self.choice)
        low, high = self.range or (0, 0)
        return high - low + 1 if self.is_whole else math.inf

    def value(self, index: int) -> Any:
        """The value with this index, of a dimension that has finitely many."""
        return self.choice[index] if self.choice is not None else int((self.range or (0, 0))[0]) + index

    def holds(self, value: Any) -> bool:
        if self.choice is not None:
            return _typed(value) in map(_typed, self.choice)
        low, high = self.range or (0, 0)
        is_number = isinstance(value, int if self.is_whole else int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high


def _typed(value: Any) -> tuple[type, Any]:
    """For Python 1, 1.0 and True are the same."""
    return type(value), value


METRICS: Final = ("miou", "pa", "ca", "fwiou")


def _metric(given: str) -> str:
    kind, point, name = given.partition(".")
    if given in METRICS or (kind == "iou" and name):
        return given
    of_class = f"iou.{name or 'CLASS'}"
    hint = closest(given, [of_class] if point else METRICS)
    raise ValueError(f"{given!r} is not allowed{hint}; allowed: {', '.join(METRICS)}, iou.CLASS")


class Search(Strict):
    """What to search, over which recipe, for how long."""

    name: Name
    recipe: str = Field(description="recipe file, relative to this file")
    set: list[str] = Field(default=[], description="overrides of the recipe, a.b=c")
    model: Name = Field(description="the model that is compared; by its validation, so it must have validate_on")
    metric: Annotated[str, AfterValidator(_metric)] = Field(
        default="miou", description=f"{', '.join(METRICS)}, or iou.CLASS"
    )
    mode: Literal["max", "min"] = Field(default="max", description="whether the largest is the best")
    test: Name | None = Field(
        default=None, description="compare by this test set in the place of validate_on; needs spoil_test"
    )
    spoil_test: bool = Field(
        default=False, description="trials may be compared by a test set: what it says of the best is too good then"
    )
    space: Annotated[dict[str, Dimension], Field(min_length=1, description="dotted recipe key -> values")]
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe", description="tpe learns from the trials before; grid: all combinations, in an order by seed"
    )
    seeds: Seeds | None = Field(default=None, description="each trial is trained with each; null = the recipe's")
    trials: Positive = Field(default=16, description="in all, those of an interrupted search included")
    hours: Above | None = Field(
        default=None, description="no training begins later, those of an interrupted search included; null = no limit"
    )
    concurrent: Positive | None = Field(
        default=None, description="trials at a time at most; null = as many as there are CPUs and GPUs for"
    )
    cpus: Above | None = Field(default=None, description="of the cluster, for all trials together; null = all")
    gpus: Annotated[float, Field(ge=0)] | None = Field(default=None, description="the same")
    grace_epochs: Positive = Field(default=1, description="epochs before ASHA may stop a trial")
    tries: Positive = Field(
        default=2, description="how often a trial that fails is begun, each time that the search is"
    )
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _grid_is_finite(self) -> Search:
        if self.sampler == "grid":
            endless = [key for key, dimension in self.space.items() if math.isinf(dimension.size)]
            if endless:
                raise ValueError(f"a grid has finitely many values: give {', '.join(endless)} as choice or integer")
            if self.size > MOST_OF_A_GRID:
                raise ValueError(f"the grid has {self.size:g} combinations, more than {MOST_OF_A_GRID}: use tpe")
        return self

    @property
    def size(self) -> float:
        """How many combinations there are."""
        return math.prod(dimension.size for dimension in self.space.values())

    @property
    def overrides(self) -> list[str]:
        """Of the recipe, before the values of a trial."""
        return [*self.set, *([f"models.{self.model}.seeds={self.seeds}"] if self.seeds else [])]

    @property
    def judgement(self) -> dict[str, Any]:
        """What trials are compared and stopped by: with another, those that are done have to be asked again."""
        return self.model_dump(mode="json", include={"model", "metric", "mode", "test", "grace_epochs"})

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial with these values is one of this space."""
        return values.keys() == self.space.keys() and all(self.space[key].holds(values[key]) for key in values)

    @property
    def short(self) -> dict[str, str]:
        """Key -> what people call it."""
        return short_names(self.space)

    def label(self, values: Mapping[str, Any]) -> str:
        """How a trial is called wherever people see it: alpha=0.55, gamma=2.9, count=120."""
        return ", ".join(f"{self.short[key]}={plain(values[key])}" for key in self.space)
