"""What an environment is. Worker processes import this, so it stays light: no torch, hence no megarl.types."""

import math
import numbers
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Protocol

Observation = str | None
Outcome = tuple[Observation, float | None, bool]


class Environment(Protocol):
    """One episode's environment, made with ``rollout.environment.options`` as keyword arguments. Methods may be async.

    Whatever a method raises is a failure of the episode (``rewards.on_failure``).
    """

    def reset(self, prompt: str, reference: Mapping[str, object], seed: int) -> Observation | Awaitable[Observation]:
        """Begin the episode.

        Args:
            prompt: the prompt as the model reads it, decoded.
            reference: of the prompt's row, as scorers get it: what all samples of a group have in common belongs there.
            seed: of this sample's own random choices; it depends on the run's seed, the step, the prompt's position and the sample.

        Returns:
            A message to the policy before its first turn, or None.
        """

    def step(self, response: str) -> Outcome | Awaitable[Outcome]:
        """Answer one turn of the policy.

        Args:
            response: what it wrote, without special tokens.

        Returns:
            ``(observation, reward, done)``: the message to the policy, the turn's reward (None counts as 0), and whether the
            episode is over. The observation may be None only then, and is then shown to people alone.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A checked answer of ``Environment.step``; ``reward`` is 0 where it gave none."""

    observation: Observation
    reward: float
    done: bool


def checked_observation(value: object) -> Observation:
    """Check what ``reset`` returned; ValueError when it is neither a text nor None."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"reset returned {value!r}, not a text or None")
    return value


def read_step(answer: object) -> Step:
    """Read a worker's answer, which may be a response's own work; ValueError when it is no step."""
    if not isinstance(answer, dict) or answer.keys() != {"observation", "reward", "done"}:
        raise ValueError("the worker answered with something else than a step")
    return checked_step((answer["observation"], answer["reward"], answer["done"]))


def checked_step(value: object) -> Step:
    """Check what ``step`` returned; ValueError when it is not what the protocol says."""
    if not (isinstance(value, tuple) and len(value) == 3):
        raise ValueError(f"step returned {value!r}, not (observation, reward, done)")
    observation, reward, done = value
    if observation is not None and not isinstance(observation, str):
        raise ValueError(f"step returned the observation {observation!r}, not a text or None")
    if reward is not None and not (isinstance(reward, numbers.Real) and math.isfinite(reward)):
        raise ValueError(f"step returned the reward {reward!r}, not a finite number or None")
    if not isinstance(done, bool):
        raise ValueError(f"step returned {done!r} for done, not True or False")
    if observation is None and not done:
        raise ValueError("step returned no observation although the episode goes on")
    return Step(observation=observation, reward=0.0 if reward is None else float(reward), done=done)
