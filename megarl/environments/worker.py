"""What a worker process of environments answers. It keeps nothing: an environment travels with each request, pickled."""

import asyncio
import base64
import inspect
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from megarl.builtin.environments import BaseEnvironment
from megarl.builtin.environments.protocol import Environment, checked_observation, checked_step
from megarl.errors import one_line

T = TypeVar("T")


def build_environments(config: BaseEnvironment) -> Callable[[tuple[Any, ...]], tuple[str, Any]]:
    """Make the function that answers ``("reset", prompt, reference, seed)`` and ``("step", environment, response)``.

    An answer is the environment, pickled and in base64, and what its method returned, as JSON has it.
    """
    build = config.build()

    def answer(request: tuple[Any, ...]) -> tuple[str, Any]:
        method, *arguments = request
        if method == "reset":
            environment = build()
            observation = checked_observation(_finished(environment.reset(*arguments)))
            return _pickled(environment), observation
        state, response = arguments
        environment = pickle.loads(base64.b64decode(state))
        step = checked_step(_finished(environment.step(response)))
        return "" if step.done else _pickled(environment), asdict(step)

    return answer


def _finished(result: T | Awaitable[T]) -> T:
    async def wait() -> T:
        return await result  # type: ignore[misc]

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def _pickled(environment: Environment) -> str:
    try:
        return base64.b64encode(pickle.dumps(environment)).decode()
    except Exception as error:
        raise TypeError(
            f"the environment cannot be pickled between turns ({one_line(error)}); set rollout.environment.in_process to true"
        ) from error
