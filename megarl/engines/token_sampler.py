"""What MegaRL puts into transformers' generate(): reproducible sampling, and an end for responses that repeat themselves."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megarl.config.schema import RepetitionStopConfig
from megarl.engines.protocol import SamplingParams


class GumbelSampler(LogitsProcessor):
    """Perturbs the logits so that their argmax is a sample, and records the log-prob of that argmax.

    Gumbel-max: argmax(logits / temperature + Gumbel noise) is distributed as softmax(logits / temperature). The noise of a row
    comes from its own Philox stream, so what a row samples does not depend on the rows beside it, except where two
    perturbed logits are closer than the rounding of a batched matrix product (about 1e-6).

    Attributes:
        logprobs: for each step float32 [batch], log softmax(logits / temperature) of the token chosen by each row, before
            penalties, top-k, top-p and min-p; at temperature 0 log softmax(logits).
    """

    def __init__(self, keys: Sequence[tuple[int, int]], sampling: SamplingParams, attention_mask: Tensor) -> None:
        """Take the sampling that all rows share.

        Args:
            keys: the (seed, sample index) of each row, each an unsigned 64-bit number.
            sampling: all but its seed and its lengths is used.
            attention_mask: int64 [batch, prompt width], 0 at padding.
        """
        self.logprobs: list[Tensor] = []
        self._temperature = sampling.temperature
        self._penalties = Penalties(sampling, attention_mask) if has_penalties(sampling) else None
        self._streams = [numpy.random.Generator(numpy.random.Philox(key=key)) for key in keys]
        self._warpers: list[LogitsProcessor] = []
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn float32 logits [batch, vocabulary] into scores whose argmax is each row's next token."""
        choice = scores if self._penalties is None else self._penalties(input_ids, scores)
        logits = scores
        if self._temperature > 0:
            choice, logits = choice / self._temperature, scores / self._temperature
            for warper in self._warpers:
                choice = warper(input_ids, choice)
            choice = choice - self._log_exponential_noise(scores.shape[1]).to(scores.device)
        token = choice.argmax(dim=-1, keepdim=True)
        self.logprobs.append((logits.gather(1, token) - logits.logsumexp(dim=-1, keepdim=True)).squeeze(1))
        return choice

    def _log_exponential_noise(self, vocabulary: int) -> Tensor:
        """Return the log of Exponential(1) draws, float32 [batch, vocabulary]; its negative is Gumbel noise."""
        noise = numpy.empty((len(self._streams), vocabulary), dtype=numpy.float32)
        for stream, row in zip(self._streams, noise, strict=True):
            stream.random(dtype=numpy.float32, out=row)
        # The draws are multiples of 2^-24 in [0, 1); both ends are kept off 0 and 1, where the logarithms are infinite.
        uniform = torch.from_numpy(noise).add_(2**-25).clamp_(max=1 - 2**-24)
        return uniform.log_().neg_().log_()


def has_penalties(sampling: SamplingParams) -> bool:
    """Return whether any penalty is on."""
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    return penalties != (0, 0, 1)


class Penalties:
    """Makes tokens that a row has already less probable; the rule is vLLM's (``vllm/model_executor/layers/utils.py``)."""

    def __init__(self, sampling: SamplingParams, attention_mask: Tensor) -> None:
        """Take the penalties of ``sampling`` and the prompts' mask, int64 [batch, prompt width], 0 at padding."""
        self._sampling = sampling
        self._mask = attention_mask

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return penalised logits: int64 [batch, width so far] and float32 [batch, vocabulary] to float32 [batch, vocabulary]."""
        prompts, responses = input_ids.tensor_split([self._mask.shape[1]], dim=1)
        counts = torch.zeros_like(logits).scatter_add_(1, responses, torch.ones_like(responses, dtype=logits.dtype))
        in_prompt = torch.zeros_like(logits).scatter_add_(1, prompts, self._mask.to(logits.dtype))
        factor = self._sampling.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(counts + in_prompt > 0, repeated, logits)
        return logits - self._sampling.frequency_penalty * counts - self._sampling.presence_penalty * (counts > 0)


class RepetitionStop(StoppingCriteria):
    """Ends a row when its last tokens are one pattern several times in a row; each row looks at its own response only.

    The rule is vLLM's (``check_sequence_repetition`` in its scheduler), so that the engines end the same responses.

    Attributes:
        lengths: for each row its response tokens when it first repeated itself; None while it has not. A row that another criterion
            ended goes on with padding, which repeats itself: the smaller length counts.
    """

    def __init__(self, config: RepetitionStopConfig, num_rows: int, prompt_width: int) -> None:
        """Take ``prompt_width``, the number of columns, padding included, before the responses."""
        self.lengths: list[int | None] = [None] * num_rows
        self._config = config
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether each row is done: int64 [rows, width so far] to bool [rows]."""
        length = input_ids.shape[1] - self._prompt_width
        count = self._config.min_count
        repeats = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for size in range(self._config.min_pattern_size, min(self._config.max_pattern_size, length // count) + 1):
            end = input_ids[:, -size * count :]
            repeats |= (end[:, size:] == end[:, :-size]).all(dim=1)
        for row in repeats.nonzero()[:, 0].tolist():
            if self.lengths[row] is None:
                self.lengths[row] = length
        return repeats
