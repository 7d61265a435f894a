"""The importance ratio between the policy and the one that sampled: the ratio axis, as log-ratios for each token."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megarl.algorithms.sequences import SequenceTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One choice of the axis; ``function(logprobs, old_logprobs, sequences)`` gives float [tokens], differentiable."""

    function: Callable[[Tensor, Tensor, SequenceTokens], Tensor]
    formula: str


def token(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """log π - log π_old of the token (PPO, arXiv 1707.06347)."""
    return logprobs - old_logprobs


def sequence(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """log s = mean over the response of log π - log π_old, the same for all its tokens (GSPO, arXiv 2507.18071, equation 7)."""
    return sequences.means(logprobs - old_logprobs)


def sequence_token(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """log(sg[s] · π / sg[π]): the sequence's value with the token's gradient (GSPO-token, arXiv 2507.18071, equation 14)."""
    return sequences.means((logprobs - old_logprobs).detach()) + (logprobs - logprobs.detach())


RATIOS = {
    "token": Ratio(function=token, formula="ρ_t = π(o_t) / π_old(o_t) (1707.06347)"),
    "sequence": Ratio(function=sequence, formula="s = (π(o) / π_old(o))^(1/|o|) (2507.18071)"),
    "sequence_token": Ratio(function=sequence_token, formula="s_t = sg[s] · π(o_t) / sg[π(o_t)] (2507.18071)"),
}
