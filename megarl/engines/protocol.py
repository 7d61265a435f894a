"""What a rollout engine is: token ids in; token ids, log-probs, finish reason and weight version out."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from megarl.config.schema import RepetitionStopConfig
from megarl.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How responses to one prompt are sampled. Greedy sampling knows the penalties and not top_p, top_k and min_p.

    Attributes:
        num_samples: responses per prompt.
        max_new_tokens: longest response.
        temperature: softmax temperature; 0 means greedy.
        top_p: nucleus mass, 1 means off.
        top_k: 0 means off.
        min_p: least probability of a token as a share of the most probable one's, 0 means off.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens of the response, once and for every time; 0 means
            off.
        repetition_penalty: divides positive logits of tokens of prompt and response and multiplies negative ones; 1 means off.
        stop_token_ids: sampling stops after one of these.
        repetition_stop: when a response ends because it repeats itself, if nothing else has ended it; None: never.
        seed: sample ``i`` of the prompt depends only on the weights, the prompt and ``(seed, i)``.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]
    repetition_stop: RepetitionStopConfig | None
    seed: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


def derived_seed(seed: int, *purpose: int | str) -> int:
    """Return 62 bits that depend on the arguments alone, on every machine; engines may add a sample index within 63 bits."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def resumed(sampling: SamplingParams, sample_index: int, num_tokens: int) -> SamplingParams:
    """Ask for sample ``sample_index`` of a request behind its first ``num_tokens`` tokens, as a request of its own.

    Its prompt is the first request's and those tokens. Its seed depends on the first request's, the index and ``num_tokens`` only:
    the same abort goes on with the same random numbers, and never with some that were used before.
    """
    seed = derived_seed(sampling.seed, sample_index, num_tokens)
    return replace(sampling, num_samples=1, max_new_tokens=sampling.max_new_tokens - num_tokens, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One response of an engine.

    Attributes:
        token_ids: response tokens, the stop token included.
        logprobs: log-prob of each (nats) under softmax(logits / temperature) over the whole vocabulary, before penalties,
            top-k, top-p and min-p; at temperature 0 (greedy) under softmax(logits).
        weight_versions: version of the weights that sampled each.
        finish_reason: why it ended.
        routed_experts: int16 [prompt and response tokens - 1, num_moe_layers, top_k], the experts that each token was sent to when
            it was read; the last was sampled and never read. None without rollout.routing_replay.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    routed_experts: Tensor | None = field(default=None, compare=False)


class RolloutEngine(Protocol):
    """An engine; all methods run on rank 0's asyncio loop. Failures raise RolloutError naming the engine and the fix."""

    async def start(self) -> None:
        """Start the engine or connect to it; returns when it is healthy. Its weights are not yet valid."""

    async def health(self) -> None:
        """Raise RolloutError when the engine cannot answer."""

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` responses to one prompt, in order."""

    async def abort(self) -> None:
        """End the requests in flight at the next token; returns when all have answered.

        A sample that was still being made comes with what there is of it, perhaps nothing, and FinishReason.ABORT. Only while no
        request is sent meanwhile is there an end of them. ``resumed`` says how such a sample goes on.
        """

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Load a whole new set of weights: Hugging Face names and full CPU or GPU tensors, each tensor used once.

        After it returns every generation uses the new weights and reports ``version``, and no cache of old weights is used.
        """

    async def close(self) -> None:
        """End what was started; never raises."""
