"""Resources of a run."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from nightseg.settings import Positive, Strict

LEAST_SHARE: Final = 0.0001  # of a resource that Ray lends


def _is_lent(amount: float) -> float:
    """Ray would refuse it only when a process starts, or after nodes have come for it."""
    if amount > 1 and not amount.is_integer():
        raise ValueError(f"a share of one GPU, or whole GPUs; Ray does not lend {amount:g}")
    return _is_no_crumb(amount)


def _is_no_crumb(amount: float) -> float:
    if 0 < amount < LEAST_SHARE:
        raise ValueError(f"Ray does not lend less than {LEAST_SHARE:g}, got {amount:g}")
    return amount


CPUs = Annotated[float, Field(gt=0), AfterValidator(_is_no_crumb)]
GPUs = Annotated[float, Field(ge=0), AfterValidator(_is_lent)]


class TrainCompute(Strict):
    """How the two trainings are spread over the cluster (Ray Train)."""

    workers: Positive = Field(default=1, description="processes of a training (DDP)")
    cpus_per_worker: CPUs = Field(default=1.0, description="CPUs of each")
    gpus_per_worker: GPUs = Field(default=0.0, description="GPUs of each: a share of one, or a whole number")
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
    cpus_per_actor: CPUs = Field(default=1.0, description="CPUs of each")
    gpus_per_actor: GPUs = Field(
        default=0.0, description="GPUs of each: a share of one, which puts several on it, or a whole number"
    )
    batch: Positive = Field(default=8, description="frames of a forward pass")
    shard_rows: Positive = Field(default=64, description="frames of a shard, the unit that is repeated after a failure")

    @property
    def on_cpus(self) -> MapCompute:
        """That of a pass that has no use for a GPU: it holds none while others wait for it."""
        return self.model_copy(update={"gpus_per_actor": 0.0}) if self.gpus_per_actor else self

    @property
    def device(self) -> str:
        """Where the networks of a pass run: on a GPU that it has reserved, never on one that it merely can see."""
        return "cuda" if self.gpus_per_actor else "cpu"
