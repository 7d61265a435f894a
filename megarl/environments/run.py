"""Where environments run: in worker processes, where one that never returns can be killed, or on the trainer's event loop."""

import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from megarl.builtin.environments import BaseEnvironment
from megarl.builtin.environments.protocol import Environment, Observation, Step, checked_observation, checked_step, read_step
from megarl.errors import RolloutError
from megarl.workers.answers import clean
from megarl.workers.on_loop import CallFailure, call_on_loop
from megarl.workers.pool import ProcessPool, WorkerFailure

T = TypeVar("T")


class EnvironmentFailure(Exception):
    """An environment raised, ran out of time, ended its process or answered nonsense; the message is the reason."""


class Environments(Protocol):
    """All episodes' environments; a state is one episode's, and only ``step`` reads it."""

    async def reset(self, prompt: str, reference: Mapping[str, object], seed: int) -> tuple[object, Observation]:
        """Begin an episode and return its state and first observation. Raises EnvironmentFailure."""

    async def step(self, state: object, response: str) -> tuple[object, Step]:
        """Make a step and return the next state and the answer. Raises EnvironmentFailure."""

    async def check(self) -> None:
        """Raise RolloutError when they cannot run."""

    def take_num_replaced(self) -> int:
        """Return how many workers ended before they had answered, and were replaced, since this was asked last."""

    async def close(self) -> None:
        """End what was started."""


def open_environments(config: BaseEnvironment) -> Environments:
    """Open the environments of a run.

    Raises:
        ConfigError: the class cannot be imported, or refuses the options.
    """
    build = config.build()
    return LocalEnvironments(build, config.timeout) if config.in_process else ProcessEnvironments(config)


class ProcessEnvironments:
    """Environments in worker processes. Between turns an environment is bytes here, so a worker's end costs one call only."""

    def __init__(self, config: BaseEnvironment) -> None:
        self._timeout = config.timeout
        self._processes = ProcessPool(
            "megarl.environments.worker:build_environments",
            config,
            len(os.sched_getaffinity(0)),
            kind="an environment",
            error=RolloutError,
            sandbox=config.sandbox,
            section="rollout.environment.sandbox",
            modules=[] if config.user_module is None else [config.user_module],
        )

    async def reset(self, prompt: str, reference: Mapping[str, object], seed: int) -> tuple[object, Observation]:
        """See Environments."""
        return await self._ask(checked_observation, "reset", prompt, dict(reference), seed)

    async def step(self, state: object, response: str) -> tuple[object, Step]:
        """See Environments."""
        return await self._ask(read_step, "step", state, response)

    async def check(self) -> None:
        """See Environments."""
        await self._processes.check()

    def take_num_replaced(self) -> int:
        """See Environments."""
        return self._processes.take_num_replaced()

    async def close(self) -> None:
        """Kill the workers."""
        await self._processes.close()

    async def _ask(self, read: Callable[[object], T], *request: object) -> tuple[str, T]:
        """Return the state and what ``read`` makes of the answer, which may be a response's own work."""
        try:
            answer = await self._processes.ask(request, self._timeout, _late(self._timeout))
            if not (isinstance(answer, list) and len(answer) == 2 and isinstance(answer[0], str)):
                raise ValueError("the worker answered with something else than a state and what its method returned")
            return answer[0], read(answer[1])
        except (WorkerFailure, ValueError) as failure:
            raise EnvironmentFailure(clean(str(failure))) from failure


class LocalEnvironments:
    """Environments on the event loop: for async ones, and sync ones that answer at once. Only async ones can be timed out."""

    def __init__(self, build: Callable[[], Environment], timeout: float) -> None:
        self._build = build
        self._timeout = timeout

    async def reset(self, prompt: str, reference: Mapping[str, object], seed: int) -> tuple[object, Observation]:
        """See Environments."""

        async def reset() -> tuple[Environment, Observation]:
            environment = self._build()
            return environment, checked_observation(await _finished(environment.reset(prompt, reference, seed)))

        return await self._limited(reset)

    async def step(self, state: Any, response: str) -> tuple[object, Step]:
        """See Environments."""

        async def step() -> tuple[Environment, Step]:
            return state, checked_step(await _finished(state.step(response)))

        return await self._limited(step)

    async def check(self) -> None:
        """Do nothing, as they were made once already."""

    def take_num_replaced(self) -> int:
        """Return 0, as there are no workers."""
        return 0

    async def close(self) -> None:
        """Do nothing, as nothing was started."""

    async def _limited(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call_on_loop(call, self._timeout, _late(self._timeout))
        except CallFailure as failure:
            raise EnvironmentFailure(str(failure)) from failure


async def _finished(result: T | Awaitable[T]) -> T:
    return await result if inspect.isawaitable(result) else result


def _late(timeout: float) -> str:
    return f"no answer within rollout.environment.timeout = {timeout:g} seconds"
