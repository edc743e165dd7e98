"""Resources of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nightseg.settings import Positive, Strict


class TrainCompute(Strict):
    """How the two trainings are spread over the cluster (Ray Train)."""

    workers: Positive = Field(default=1, description="processes of a training (DDP)")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(default=1.0, description="CPUs of each")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(default=0.0, description="GPUs of each")
    min_workers: Positive = Field(
        default=1, description="a training that has lost nodes goes on with as few; its steps keep their frames"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=2, description="restarts from the last checkpoint before the run fails"
    )


class MapCompute(Strict):
    """How passes over frames are spread over the cluster (Ray Data actors). 0 actors: in the driver, without Ray."""

    actors: Annotated[int, Field(ge=0)] = Field(
        default=1, description="processes of a pass; 0 = in the process of the run, without Ray"
    )
    cpus_per_actor: Annotated[float, Field(gt=0)] = Field(default=1.0, description="CPUs of each")
    gpus_per_actor: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs of each; a share puts several on one"
    )
    batch: Positive = Field(default=8, description="frames of a forward pass")
    shard_rows: Positive = Field(default=64, description="frames of a shard, the unit that is repeated after a failure")

    @property
    def device(self) -> str:
        """Where the networks of a pass run: on a GPU that it has reserved, never on one that it merely can see."""
        return "cuda" if self.gpus_per_actor else "cpu"
