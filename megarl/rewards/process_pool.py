"""Scorers in worker processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.errors import RewardError
from megarl.rewards.scorers import ScorerSpec
from megarl.workers.pool import ProcessPool, WorkerFailure


class ScorerFailure(Exception):
    """A scorer raised, ran out of time, or ended its process; the message is the reason."""


class WorkerPool:
    """Up to ``num_workers`` processes, each with all scorers."""

    def __init__(self, specs: Sequence[ScorerSpec], num_workers: int) -> None:
        build = "megarl.rewards.worker:build_scorers"
        self._processes = ProcessPool(build, list(specs), num_workers, kind="a scorer", error=RewardError)

    async def score(self, name: str, response: str | Sequence[str], reference: Mapping[str, Any], timeout: float) -> Any:
        """The score of the scorer of that name: a number, a list of them for steps, or a RuleScore of type document_qa.

        ``timeout`` seconds count from when a worker takes the request.

        Raises:
            ScorerFailure: the scorer raised, ran out of time or ended its process.
            RewardError: no worker can be started.
        """
        late = f"no score within rewards.timeout = {timeout:g} seconds"
        try:
            return await self._processes.ask((name, response, dict(reference)), timeout, late)
        except WorkerFailure as failure:
            raise ScorerFailure(str(failure)) from failure

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``score`` must have returned or been cancelled before."""
        await self._processes.close()
