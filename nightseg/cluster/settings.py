"""Resources of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nightseg.settings import Positive, Strict


class TrainCompute(Strict):
    """How the two trainings are spread over the cluster (Ray Train)."""

    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 2


class MapCompute(Strict):
    """How passes over frames are spread over the cluster (Ray Data actors). 0 actors: in the driver, without Ray."""

    actors: Annotated[int, Field(ge=0)] = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    batch: Positive = 8
    shard_rows: Positive = 64

    @property
    def on_cpus(self) -> MapCompute:
        """The same for a pass that has no use for a GPU."""
        return self.model_copy(update={"gpus_per_actor": 0.0})
