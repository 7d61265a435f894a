"""A response in several turns: the policy and an environment in turn."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megarl.engines.protocol import Generation, SamplingParams, derived_seed
from megarl.environments.run import EnvironmentFailure, Environments
from megarl.types import NO_VERSION, Episode, FinishReason, Prompt, Rollout, Turn

T = TypeVar("T")

Generate = Callable[[tuple[int, ...], SamplingParams], Awaitable[Generation]]
EncodeObservation = Callable[[str, int | None], tuple[int, ...]]
Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True)
class _Trajectory:
    """What was said so far, as tokens and as text."""

    token_ids: list[int] = field(default_factory=list)
    from_policy: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    finish_reason: FinishReason = FinishReason.STOP
    failure: str | None = None
    is_out_of_turns: bool = False
    seconds: float = 0.0

    def add_turn(self, generation: Generation, text: str) -> None:
        """Add a turn of the policy."""
        self.token_ids += generation.token_ids
        self.from_policy += [True] * len(generation.token_ids)
        self.logprobs += generation.logprobs
        self.weight_versions += generation.weight_versions
        self.finish_reason = generation.finish_reason
        self.turns.append(Turn(speaker="policy", text=text))

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Add the tokens of the environment's message."""
        version = self.weight_versions[-1] if self.weight_versions else NO_VERSION
        self.token_ids += token_ids
        self.from_policy += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.weight_versions += [version] * len(token_ids)


class EpisodePlayer:
    """Plays episodes, many at a time.

    The tokens of an episode are the prompt's, what the engine sampled and what ``encode_observation`` gave, in turn; each request
    to the engine sends all of them so far, and none is ever decoded and tokenised again.

    Args:
        environments: started; closed by the caller.
        encode_observation: tokens of an environment's message after a turn's last token, or after the prompt (None).
        decode: text of a turn without the tokens that end it.
        max_turns: of the policy.
        prefill: beginning of every turn but the first, whose own the prompt has, that stands before the tokens of the policy.
    """

    def __init__(
        self,
        environments: Environments,
        encode_observation: EncodeObservation,
        decode: Decode,
        max_turns: int,
        prefill: str = "",
    ) -> None:
        self._environments = environments
        self._encode_observation = encode_observation
        self._decode = decode
        self._max_turns = max_turns
        self._prefill = prefill

    async def play(self, prompt: Prompt, sample_index: int, sampling: SamplingParams, generate: Generate) -> Rollout:
        """Play one episode.

        It ends when the environment says so, after the last turn, when a turn ran into ``sampling.max_new_tokens`` (which the
        environment then does not see), and when the next message would leave no token to answer it; the latter two count as
        truncated. An environment that fails ends it too.

        Args:
            prompt: the task.
            sample_index: of the sample within its group.
            sampling: ``seed`` is the group's; ``max_new_tokens`` bounds all tokens behind the prompt, the environment's too.
            generate: one sample of the engine.
        """
        trajectory = _Trajectory()
        try:
            await self._play(trajectory, prompt, sample_index, sampling, generate)
        except EnvironmentFailure as failure:
            num_turns = sum(turn.speaker == "policy" for turn in trajectory.turns)
            trajectory.failure = f"{f'turn {num_turns}' if num_turns else 'reset'}: {failure}"
        policy_texts = [turn.text for turn in trajectory.turns if turn.speaker == "policy"]
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            token_ids=tuple(trajectory.token_ids),
            from_policy=tuple(trajectory.from_policy),
            logprobs=tuple(trajectory.logprobs),
            weight_versions=tuple(trajectory.weight_versions),
            finish_reason=trajectory.finish_reason,
            text=policy_texts[-1] if policy_texts else "",
            episode=Episode(
                turns=tuple(trajectory.turns),
                reward=trajectory.reward,
                failure=trajectory.failure,
                is_out_of_turns=trajectory.is_out_of_turns,
                seconds=trajectory.seconds,
            ),
        )

    async def _play(
        self, trajectory: _Trajectory, prompt: Prompt, sample_index: int, sampling: SamplingParams, generate: Generate
    ) -> None:
        seed = derived_seed(sampling.seed, sample_index, "environment")
        state, observation = await _timed(self._environments.reset(prompt.text, prompt.reference, seed), trajectory)
        if observation is not None and not self._read(trajectory, observation, None, sampling.max_new_tokens):
            return
        for turn in range(1, self._max_turns + 1):
            request = replace(
                sampling,
                num_samples=1,
                max_new_tokens=sampling.max_new_tokens - len(trajectory.token_ids),
                seed=derived_seed(sampling.seed, sample_index, turn),
            )
            generation = await generate((*prompt.token_ids, *trajectory.token_ids), request)
            prefill = self._prefill if trajectory.token_ids else prompt.prefill
            text = prefill + self._decode(generation.token_ids)
            trajectory.add_turn(generation, text)
            if generation.finish_reason is FinishReason.LENGTH:
                return
            state, step = await _timed(self._environments.step(state, text), trajectory)
            trajectory.reward += step.reward
            if step.done or turn == self._max_turns:
                trajectory.is_out_of_turns = not step.done
                if step.observation is not None:
                    trajectory.turns.append(Turn(speaker="environment", text=step.observation))
                return
            if not self._read(trajectory, step.observation or "", generation.token_ids[-1], sampling.max_new_tokens):
                return

    def _read(self, trajectory: _Trajectory, observation: str, last_token: int | None, max_tokens: int) -> bool:
        """Add the message, and its tokens where they leave room for an answer; whether they do."""
        token_ids = self._encode_observation(observation, last_token)
        trajectory.turns.append(Turn(speaker="environment", text=observation))
        if len(trajectory.token_ids) + len(token_ids) >= max_tokens:
            trajectory.finish_reason = FinishReason.LENGTH
            return False
        trajectory.add_observation(token_ids)
        return True


async def _timed(call: Awaitable[T], trajectory: _Trajectory) -> T:
    started = time.monotonic()
    try:
        return await call
    finally:
        trajectory.seconds += time.monotonic() - started
