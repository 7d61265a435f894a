"""Scorers in worker processes."""

from collections.abc import Iterable, Mapping, Sequence

from megarl.builtin.scorers import WorkerScorer
from megarl.builtin.scorers.document_qa import RuleScore
from megarl.config.schema import SandboxConfig
from megarl.errors import RewardError
from megarl.rewards.worker import Score, read_score
from megarl.workers.answers import clean
from megarl.workers.pool import ProcessPool, WorkerFailure
from megarl.workers.sandbox import find_sandbox


class ScorerFailure(Exception):
    """A scorer raised, ran out of time, or ended its process; the message is the reason."""


class WorkerPool:
    """Up to ``num_workers`` processes, each with all scorers."""

    def __init__(
        self, scorers: Mapping[str, WorkerScorer], num_workers: int, sandbox: SandboxConfig, modules: Iterable[str] = ()
    ) -> None:
        """Prepare the processes.

        Args:
            scorers: by the name that ``score`` takes.
            num_workers: most processes.
            sandbox: what they may do.
            modules: of the user, that scorers import.
        """
        self._has_scorers = bool(scorers)
        self._processes = ProcessPool(
            "megarl.rewards.worker:build_scorers",
            (dict(scorers), find_sandbox().program is not None),
            num_workers,
            kind="a scorer",
            error=RewardError,
            sandbox=sandbox,
            section="rewards.sandbox",
            modules=modules,
        )

    async def check(self) -> None:
        """Start one worker; raises RewardError when it cannot be started."""
        if self._has_scorers:
            await self._processes.check()

    def take_num_replaced(self) -> int:
        """See ProcessPool."""
        return self._processes.take_num_replaced()

    async def score(
        self, name: str, response: str | Sequence[str], reference: Mapping[str, object], timeout: float
    ) -> Score | RuleScore:
        """Return the score of the scorer of that name: a number, a list of them for steps, or a RuleScore of type document_qa.

        ``timeout`` seconds count from when a worker takes the request.

        Raises:
            ScorerFailure: the scorer raised, ran out of time or ended its process.
            RewardError: no worker can be started.
        """
        late = f"no score within rewards.timeout = {timeout:g} seconds"
        try:
            return read_score(await self._processes.ask((name, response, dict(reference)), timeout, late), response)
        except (WorkerFailure, ValueError) as failure:
            raise ScorerFailure(clean(str(failure))) from failure

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``score`` must have returned or been cancelled before."""
        await self._processes.close()
