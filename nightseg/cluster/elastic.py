"""Ray Train as it grows and shrinks with the cluster: how many workers, when, and which failures count.

Ray Train 2.60 has workers that come and go of its own (`ScalingConfig(num_workers=(1, 3))`). It starts with fewer at
once, also where others only hold for a while what is asked for; it grows in the middle of an epoch, which is then done
again; and it says nothing. So its policies are replaced by these, which let `nodes.Staffing` decide. They are made in
the driver and live in the controller of Ray Train, a process on the same node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from nightseg.cluster import nodes
from nightseg.cluster.nodes import Staffing
from nightseg.errors import UserError

SECONDS_BETWEEN_TRIES = 0.5  # of a start, while there is no room
SECONDS_BETWEEN_LOOKS = 5.0  # for room to grow


def controller_class() -> type[Any]:
    """Ray Train's controller. One that waits gives back first what its dead workers held, and can be interrupted."""
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, RestartingState

    class ElasticController(TrainController):  # type: ignore[misc]
        async def _step(self) -> Any:
            state = self.get_state()
            waits = isinstance(state, InitializingState | RestartingState | ReschedulingState)
            if waits and self._worker_group is not None:
                self._shutdown_worker_group()
            result = await super()._step()
            if waits and result.next_state is state:
                await asyncio.sleep(SECONDS_BETWEEN_TRIES)
            return result

    return ElasticController


def scaling_policy(
    scaling: Any,
    staffing: Staffing,
    *,
    newest: Callable[[], str | None],
    resizes: Callable[[], None],
    gives_up: Callable[[UserError], None],
) -> Any:
    """What replaces Ray Train's policy of sizes.

    Args:
        scaling: its ScalingConfig, with all workers that are asked for; the autoscaler is asked for as many.
        newest: the name of the newest checkpoint. A training grows right after one, and loses nothing.
        resizes: is told that the next start follows from no failure; gives_up: why there is none.
    """
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision, ResizeDecision

    class ElasticPolicy(FixedScalingPolicy):  # type: ignore[misc]
        looked = 0.0
        waits_after: str | None = None

        def make_decision_for_non_running_worker_group(self) -> Any:
            self._maybe_send_resource_request()
            try:
                workers = staffing.start(nodes.sizes(staffing.each), time.monotonic())
            except UserError as error:
                gives_up(error)
                raise
            return NoopDecision() if workers is None else self.resized(workers)

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            self._maybe_send_resource_request()
            staffing.runs()
            workers, now = worker_group_state.num_workers, time.monotonic()
            if workers >= staffing.asked or now - self.looked < SECONDS_BETWEEN_LOOKS:
                return NoopDecision()
            self.looked = now
            larger = staffing.larger(nodes.sizes(staffing.each), workers)
            if larger is None:
                self.waits_after = None
                return NoopDecision()
            checkpoint = newest() or ""
            if self.waits_after is None or checkpoint == self.waits_after:
                self.waits_after = checkpoint
                return NoopDecision()
            self.waits_after = None
            staffing.say(f"there is room again: goes on with {larger} of {staffing.asked} workers")
            resizes()
            return self.resized(larger)

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            staffing.lost(time.monotonic())

        def resized(self, workers: int) -> Any:
            return ResizeDecision(workers, self.scaling_config._resources_per_worker_not_none)

    return ElasticPolicy(scaling)


def failure_policy(config: Any) -> Any:
    """Ray Train's policy of failures (`max_failures`), but for failures that a lost node explains: those are free."""
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy

    class NodesAreNoFailures(DefaultFailurePolicy):  # type: ignore[misc]
        known = frozenset(nodes.alive())
        _worker_group_failures: int

        def make_decision(self, training_failed_error: Any) -> Any:
            there = frozenset(nodes.alive())
            # The node of this failure may not be known to be gone yet; then it is free when the next one is judged.
            self._worker_group_failures = max(0, self._worker_group_failures - len(self.known - there))
            self.known = there
            return super().make_decision(training_failed_error)

    return NodesAreNoFailures(config)
