"""What each token adds to the policy loss: the surrogate axis, and the ratio axis that it builds on.

A function of this axis takes a SurrogateInput and the algorithm's settings and returns a Surrogate. The loss of the batch is the
sum of its terms times the weights of the aggregation axis, over all micro-batches and ranks.

A ratio is the importance ratio between the policy and the one that sampled, as a log-ratio for each token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.sequences import SequenceTokens
from megarl.config.schema import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One choice of the axis; ``function(logprobs, old_logprobs, sequences)`` gives float [tokens], differentiable."""

    function: Callable[[Tensor, Tensor, SequenceTokens], Tensor]
    formula: str


def token(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """Return log π - log π_old of the token (PPO, arXiv 1707.06347)."""
    return logprobs - old_logprobs


def sequence(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """Return log s = mean over the response of log π - log π_old, for all its tokens (GSPO, arXiv 2507.18071, equation 7)."""
    return sequences.means(logprobs - old_logprobs)


def sequence_token(logprobs: Tensor, old_logprobs: Tensor, sequences: SequenceTokens) -> Tensor:
    """Return log(sg[s] · π / sg[π]): the sequence's value with the token's gradient (GSPO-token, arXiv 2507.18071, equation 14)."""
    return sequences.means((logprobs - old_logprobs).detach()) + (logprobs - logprobs.detach())


RATIOS = {
    "token": Ratio(function=token, formula="ρ_t = π(o_t) / π_old(o_t) (1707.06347)"),
    "sequence": Ratio(function=sequence, formula="s = (π(o) / π_old(o))^(1/|o|) (2507.18071)"),
    "sequence_token": Ratio(function=sequence_token, formula="s_t = sg[s] · π(o_t) / sg[π(o_t)] (2507.18071)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateInput:
    """The chosen tokens of one micro-batch.

    Attributes:
        logprobs: float [tokens], under the policy, differentiable.
        log_ratio: float [tokens], log of the importance ratio at its level (see RATIOS), differentiable.
        advantages: float [tokens].
        sequences: sums and means over whole responses.
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    sequences: SequenceTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Per-token terms, each [tokens].

    Attributes:
        loss: to be minimised, differentiable.
        clipped_low: True where the lower bound of the ratio is active.
        clipped_high: likewise the upper bound.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


SurrogateFunction = Callable[[SurrogateInput, AlgorithmConfig], Surrogate]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateChoice:
    """One choice of the axis: the function, and its formula with the paper."""

    function: SurrogateFunction
    formula: str


def ppo_clip(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    """Return -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) (PPO, arXiv 1707.06347, equation 7; two ranges: DAPO, 2503.14476).

    With ``clip.dual`` c, the loss of a negative advantage is at most -c A (dual clip, arXiv 1912.09729, equation 3).
    """
    advantages, clip = inputs.advantages, config.clip
    ratio = inputs.log_ratio.exp()
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    clipped_high = (ratio > 1 + clip.high) & (advantages > 0)
    if clip.dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip.dual * advantages), loss)
        clipped_high |= (ratio > clip.dual) & (advantages < 0)
    return Surrogate(loss=loss, clipped_low=(ratio < 1 - clip.low) & (advantages < 0), clipped_high=clipped_high)


def gmpo(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    """Return -A · geometric mean over the response of its clipped token ratios (GMPO, arXiv 2507.20673, equation 4).

    Each log-ratio is bounded on the side where it would gain: above by ``clip.high`` where A > 0, below by -``clip.low`` else.
    """
    log_ratio, gains, clip = inputs.log_ratio, inputs.advantages > 0, config.clip
    bounded = torch.where(gains, log_ratio.clamp(max=clip.high), log_ratio.clamp(min=-clip.low))
    return Surrogate(
        loss=-inputs.advantages * inputs.sequences.means(bounded).exp(),
        clipped_low=(log_ratio < -clip.low) & (inputs.advantages < 0),
        clipped_high=(log_ratio > clip.high) & gains,
    )


def cispo(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    """Return -sg[clip(ρ, 1 - ε_low, 1 + ε_high)] A log π: all tokens have a gradient (CISPO, arXiv 2506.13585, equations 4, 5)."""
    ratio, clip = inputs.log_ratio.detach().exp(), config.clip
    return Surrogate(
        loss=-ratio.clamp(1 - clip.low, 1 + clip.high) * inputs.advantages * inputs.logprobs,
        clipped_low=ratio < 1 - clip.low,
        clipped_high=ratio > 1 + clip.high,
    )


def policy_gradient(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    """Return -A log π (REINFORCE, Williams 1992)."""
    never = torch.zeros_like(inputs.advantages, dtype=torch.bool)
    return Surrogate(loss=-inputs.advantages * inputs.logprobs, clipped_low=never, clipped_high=never)


def mirror_descent(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    """Return -A log π(o) + (τ/2) (log π(o) - log π_old(o))² for whole responses (Kimi k1.5, arXiv 2501.12599, equation 3).

    The square of a response's log-ratio Δ is shared among its tokens as δ_t Δ, whose sum is Δ² and whose gradient is 2 Δ ∇Δ.
    """
    square = inputs.log_ratio * inputs.sequences.sums(inputs.log_ratio)
    never = torch.zeros_like(inputs.advantages, dtype=torch.bool)
    loss = -inputs.advantages * inputs.logprobs + config.mirror_descent_tau / 2 * square
    return Surrogate(loss=loss, clipped_low=never, clipped_high=never)


SURROGATES = {
    "ppo_clip": SurrogateChoice(function=ppo_clip, formula="−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) (1707.06347)"),
    "gmpo": SurrogateChoice(function=gmpo, formula="−A · (Π_t clip_A(ρ_t, e^−ε_low, e^ε_high))^(1/|o|) (2507.20673)"),
    "cispo": SurrogateChoice(function=cispo, formula="−sg[clip(ρ, 1 − ε_low, 1 + ε_high)] A log π (2506.13585)"),
    "policy_gradient": SurrogateChoice(function=policy_gradient, formula="−A log π (Williams 1992)"),
    "mirror_descent": SurrogateChoice(
        function=mirror_descent, formula="−A log π(o) + τ/2 · (log π(o) − log π_old(o))² (2501.12599)"
    ),
}
