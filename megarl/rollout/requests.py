"""Requests for the responses to a prompt: how each is sampled, from which seed, and how they run at the same time."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megarl.config.schema import Config
from megarl.engines.protocol import SamplingParams, derived_seed
from megarl.rollout.lock_step import EpisodeKey
from megarl.types import GREEDY_INDEX, Prompt

T = TypeVar("T")

LIMIT_KEYS = "rollout.request_timeout, rollout.request_timeout_per_kilotoken"


class RequestFailed(Exception):
    """A request failed with its cause; told apart from errors of scorers, which are never retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how it is answered.

    Attributes:
        prompt: the prompt.
        samples: of the responses of its group.
        greedy: of the one greedy response beside them; None where none is wanted.
    """

    prompt: Prompt
    samples: SamplingParams
    greedy: SamplingParams | None

    @property
    def responses(self) -> list[tuple[int, SamplingParams]]:
        """Sample index and settings of each response, the greedy one last."""
        responses = [(index, self.samples) for index in range(self.samples.num_samples)]
        return responses if self.greedy is None else [*responses, (GREEDY_INDEX, self.greedy)]

    @property
    def episodes(self) -> list[EpisodeKey]:
        """What LockStep knows the responses by."""
        return [(self.samples.seed, index) for index, _ in self.responses]


class RequestMaker:
    """Makes the requests of a run.

    Args:
        config: the run.
        stop_token_ids: all that end a response.
        with_greedy: whether training requests ask for a greedy response too.
    """

    def __init__(self, config: Config, stop_token_ids: Sequence[int], *, with_greedy: bool) -> None:
        self._config = config
        self._stop_token_ids = tuple(stop_token_ids)
        self._with_greedy = with_greedy

    @property
    def num_training_responses(self) -> int:
        """Responses of a training request, the greedy one included."""
        return self._config.rollout.samples_per_prompt + self._with_greedy

    def training(self, prompt: Prompt, purpose: str, step: int, position: int) -> Request:
        """Ask for a group to train on. Its seed depends on the run's and on ``purpose``, ``step`` and ``position``."""
        seed, rollout = derived_seed(self._config.seed, purpose, step, position), self._config.rollout
        return Request(
            prompt=prompt,
            samples=self._sampling(rollout.samples_per_prompt, rollout.temperature, seed),
            greedy=self._sampling(1, 0.0, seed) if self._with_greedy else None,
        )

    def evaluation(self, prompt: Prompt, position: int) -> Request:
        """Ask for the responses of an evaluation; its seed does not depend on the step, so that evaluations compare."""
        seed, settings = derived_seed(self._config.seed, "evaluate", 0, position), self._config.evaluation
        samples = self._sampling(settings.samples_per_prompt, settings.temperature, seed)
        return Request(prompt=prompt, samples=samples, greedy=None)

    def _sampling(self, num_samples: int, temperature: float, seed: int) -> SamplingParams:
        rollout = self._config.rollout
        return SamplingParams(
            num_samples=num_samples,
            max_new_tokens=rollout.max_new_tokens,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            presence_penalty=rollout.presence_penalty,
            frequency_penalty=rollout.frequency_penalty,
            repetition_penalty=rollout.repetition_penalty,
            stop_token_ids=self._stop_token_ids,
            repetition_stop=rollout.repetition_stop,
            seed=seed,
        )


async def run_together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at the same time; results in order. The first error cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
    return [task.result() for task in running]
