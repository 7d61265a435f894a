"""What MegaRL puts into transformers' generate(): reproducible sampling, and an end for responses that repeat themselves."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from megarl.config.schema import RepetitionStopConfig


class GumbelSampler(LogitsProcessor):
    """Perturbs the logits so that their argmax is a sample, and records the log-prob of that argmax.

    Gumbel-max: argmax(logits / temperature + Gumbel noise) is distributed as softmax(logits / temperature). The noise of a row
    comes from its own Philox stream, so what a row samples does not depend on the rows beside it, except where two
    perturbed logits are closer than the rounding of a batched matrix product (about 1e-6).

    Attributes:
        logprobs: for each step float32 [batch], log softmax(logits / temperature) of the token chosen by each row, before
            top-k and top-p; at temperature 0 log softmax(logits).
    """

    def __init__(self, keys: Sequence[tuple[int, int]], temperature: float, top_k: int, top_p: float) -> None:
        """Take ``keys``, the (seed, sample index) of each row, each an unsigned 64-bit number."""
        self.logprobs: list[Tensor] = []
        self._temperature = temperature
        self._streams = [numpy.random.Generator(numpy.random.Philox(key=key)) for key in keys]
        self._warpers: list[LogitsProcessor] = []
        if top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn float32 logits [batch, vocabulary] into scores whose argmax is each row's next token."""
        if self._temperature == 0:
            choice = logits = scores
        else:
            choice = logits = scores / self._temperature
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
