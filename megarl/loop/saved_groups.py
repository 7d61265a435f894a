"""Groups that wait for the next step, as JSON values in a checkpoint."""

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy

from megarl.rollout.surplus import SurplusGroup
from megarl.types import Episode, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout, Turn

# numbers of each token, and how they are kept: a batch holds log-probabilities in float32
_TOKEN_TYPES = {"token_ids": "<i4", "from_policy": "|b1", "logprobs": "<f4", "weight_versions": "<i4"}


def save_groups(groups: Sequence[SurplusGroup]) -> list[dict[str, Any]]:
    """The groups as JSON values; prompts by their ids, what is per token compressed."""
    return [
        {
            "step": one.step,
            "prompt_id": one.group.prompt.prompt_id,
            "rollouts": [_save(scored) for scored in one.group.rollouts],
            "greedy": None if one.group.greedy is None else _save(one.group.greedy),
        }
        for one in groups
    ]


def load_groups(saved: Sequence[dict[str, Any]], prompt_of: Callable[[str], Prompt]) -> list[SurplusGroup]:
    """The groups of ``save_groups``, of which every batch is the same as of the groups that were saved.

    Args:
        saved: what ``save_groups`` gave.
        prompt_of: gives the prompt of an id.
    """
    groups = []
    for one in saved:
        prompt = prompt_of(one["prompt_id"])
        rollouts = tuple(_load(scored, prompt) for scored in one["rollouts"])
        greedy = None if one["greedy"] is None else _load(one["greedy"], prompt)
        groups.append(SurplusGroup(step=one["step"], group=RolloutGroup(prompt=prompt, rollouts=rollouts, greedy=greedy)))
    return groups


def _save(scored: ScoredRollout) -> dict[str, Any]:
    rollout = scored.rollout
    tokens = {
        name: base64.b64encode(zlib.compress(numpy.array(getattr(rollout, name), dtype=kind).tobytes())).decode("ascii")
        for name, kind in _TOKEN_TYPES.items()
    }
    return {
        **tokens,
        "sample_index": rollout.sample_index,
        "finish_reason": rollout.finish_reason.value,
        "text": rollout.text,
        "episode": None if rollout.episode is None else asdict(rollout.episode),
        "reward": scored.reward,
        "parts": dict(scored.parts),
        "step_rewards": [list(one) for one in scored.step_rewards],
        "failures": list(scored.failures),
    }


def _load_episode(saved: dict[str, Any]) -> Episode:
    return Episode(**(saved | {"turns": tuple(Turn(**turn) for turn in saved["turns"])}))


def _load(saved: dict[str, Any], prompt: Prompt) -> ScoredRollout:
    tokens: dict[str, Any] = {
        name: tuple(numpy.frombuffer(zlib.decompress(base64.b64decode(saved[name])), dtype=kind).tolist())
        for name, kind in _TOKEN_TYPES.items()
    }
    return ScoredRollout(
        rollout=Rollout(
            prompt=prompt,
            sample_index=saved["sample_index"],
            finish_reason=FinishReason(saved["finish_reason"]),
            text=saved["text"],
            episode=None if saved["episode"] is None else _load_episode(saved["episode"]),
            **tokens,
        ),
        reward=saved["reward"],
        parts=saved["parts"],
        step_rewards=tuple((int(token), float(reward)) for token, reward in saved["step_rewards"]),
        failures=tuple(saved["failures"]),
    )
