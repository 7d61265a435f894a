"""Groups, whole or in parts, as JSON values in a checkpoint: prompts by their ids, what is per token as compressed arrays."""

import base64
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy
import torch

from megarl.engines.protocol import Generation
from megarl.errors import CheckpointError, one_line
from megarl.types import Episode, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout, Turn

Saved = dict[str, Any]
PromptOf = Callable[[str], Prompt]

# Numbers of each token, and how they are kept: a batch holds log-probabilities in float32.
_TOKEN_TYPES = {"token_ids": "<i4", "logprobs": "<f4", "weight_versions": "<i4", "from_policy": "|b1"}
_EXPERTS_TYPE = "<i2"
_COMPRESSION = 1  # log-probabilities hardly get smaller, and the rest does at any level


@contextmanager
def refuse_damage() -> Iterator[None]:
    """Load saved groups within the block.

    Raises:
        CheckpointError: they are not what was saved.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise CheckpointError(
            f"the checkpoint's groups (outstanding.json) cannot be read ({one_line(error)}); resume from an older checkpoint, "
            "with the data of the interrupted run"
        ) from error


def save_prompt(prompt: Prompt) -> Saved:
    """Save its id and a digest of its tokens."""
    return {"prompt_id": prompt.prompt_id, "digest": _digest(prompt)}


def load_prompt(saved: Mapping[str, Any], prompt_of: PromptOf) -> Prompt:
    """Return the prompt of the saved id.

    Raises:
        CheckpointError: it has other tokens than the one that was saved.
    """
    prompt = prompt_of(saved["prompt_id"])
    if _digest(prompt) != saved["digest"]:
        raise CheckpointError(
            f"prompt {prompt.prompt_id} is not the one that the checkpoint's responses answer; resume with the data, template and "
            "tokenizer of the interrupted run"
        )
    return prompt


def save_group(group: RolloutGroup) -> Saved:
    """Save a whole group."""
    return {
        **save_prompt(group.prompt),
        "rollouts": [_save_scored(scored) for scored in group.rollouts],
        "greedy": None if group.greedy is None else _save_scored(group.greedy),
    }


def load_group(saved: Saved, prompt_of: PromptOf) -> RolloutGroup:
    """Load the group of ``save_group``, of which every batch is the same as of the one that was saved."""
    prompt = load_prompt(saved, prompt_of)
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(_load_scored(scored, prompt) for scored in saved["rollouts"]),
        greedy=None if saved["greedy"] is None else _load_scored(saved["greedy"], prompt),
    )


def save_sample(sample: Generation) -> Saved:
    """Save a response, or what there is of one; its log-probabilities in float32."""
    return _save_tokens(sample, ("token_ids", "logprobs", "weight_versions"))


def load_sample(saved: Saved) -> Generation:
    """Load the response of ``save_sample``."""
    return Generation(**_load_tokens(saved, ("token_ids", "logprobs", "weight_versions")))


def _save_scored(scored: ScoredRollout) -> Saved:
    rollout = scored.rollout
    return {
        **_save_tokens(rollout, tuple(_TOKEN_TYPES)),
        "sample_index": rollout.sample_index,
        "text": rollout.text,
        "episode": None if rollout.episode is None else asdict(rollout.episode),
        "reward": scored.reward,
        "parts": dict(scored.parts),
        "step_rewards": scored.step_rewards,
        "failures": scored.failures,
    }


def _load_scored(saved: Saved, prompt: Prompt) -> ScoredRollout:
    return ScoredRollout(
        rollout=Rollout(
            prompt=prompt,
            sample_index=saved["sample_index"],
            text=saved["text"],
            episode=None if saved["episode"] is None else _load_episode(saved["episode"]),
            **_load_tokens(saved, tuple(_TOKEN_TYPES)),
        ),
        reward=saved["reward"],
        parts=saved["parts"],
        step_rewards=tuple((token, reward) for token, reward in saved["step_rewards"]),
        failures=tuple(saved["failures"]),
    )


def _load_episode(saved: Saved) -> Episode:
    return Episode(**(saved | {"turns": tuple(Turn(**turn) for turn in saved["turns"])}))


def _save_tokens(response: Rollout | Generation, names: tuple[str, ...]) -> Saved:
    experts = response.routed_experts
    return {
        **{name: _pack(numpy.array(getattr(response, name), _TOKEN_TYPES[name])) for name in names},
        "finish_reason": response.finish_reason.value,
        "routed_experts": None if experts is None else [list(experts.shape), _pack(experts.numpy().astype(_EXPERTS_TYPE))],
    }


def _load_tokens(saved: Saved, names: tuple[str, ...]) -> dict[str, Any]:
    tokens = {name: tuple(_unpack(saved[name], _TOKEN_TYPES[name]).tolist()) for name in names}
    if len({len(values) for values in tokens.values()}) > 1:
        raise ValueError(f"{', '.join(names)} of a response are not equally many")
    experts = None
    if saved["routed_experts"] is not None:
        shape, values = saved["routed_experts"]
        experts = torch.from_numpy(_unpack(values, _EXPERTS_TYPE).reshape(shape).astype(numpy.int16))
    return {**tokens, "finish_reason": FinishReason(saved["finish_reason"]), "routed_experts": experts}


def _pack(values: "numpy.ndarray[Any, Any]") -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), _COMPRESSION)).decode("ascii")


def _unpack(text: str, kind: str) -> "numpy.ndarray[Any, Any]":
    return numpy.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


def _digest(prompt: Prompt) -> str:
    return hashlib.blake2b(numpy.array(prompt.token_ids, "<i8").tobytes(), digest_size=8).hexdigest()
