"""What a training step minimises, as a function of the chosen tokens' log-probs and entropies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.kl import kl_estimate
from megarl.algorithms.sequences import SequenceTokens
from megarl.algorithms.surrogates import RATIOS, SurrogateFunction, SurrogateInput
from megarl.algorithms.values import clipped_value_loss
from megarl.config.schema import AlgorithmConfig
from megarl.types import SampledTokens, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """The rows of a TrainBatch that one micro-batch trains on, each [tokens]; None where the TrainBatch has none.

    Attributes:
        sequences: which sequence each token is of.
    """

    weights: Tensor
    reference_logprobs: Tensor | None
    sampled: SampledTokens | None
    sequences: SequenceTokens


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of some tokens and what to report of them.

    Attributes:
        loss: scalar; losses of all micro-batches and ranks add up to the batch's loss.
        metrics: name in ``metrics.UPDATE_METRICS`` to scalar: an extreme over the tokens, their sum for a token mean, and for a
            mean over responses what adds up over micro-batches and ranks to the batch's mean.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


ObjectiveFunction = Callable[..., Objective]  # called with the outputs of the engine's head, each [tokens], and TokenData


def select_tokens(batch: TrainBatch, index: Tensor, device: torch.device, sequences: SequenceTokens) -> TokenData:
    """Select the data of some tokens.

    Args:
        batch: from which they are.
        index: int64 [tokens], into the packed batch.
        device: to which the data goes.
        sequences: of these tokens, on that device already.
    """
    reference = batch.reference_logprobs
    return TokenData(
        weights=batch.token_weights[index].to(device),
        reference_logprobs=None if reference is None else reference[index].to(device),
        sampled=None if batch.sampled is None else batch.sampled.at(index, device),
        sequences=sequences,
    )


def supervised_objective(logprobs: Tensor, entropies: Tensor, data: TokenData) -> Objective:
    """Sum up the cross-entropy, -log p of each token times its weight."""
    loss = -(logprobs * data.weights).sum()
    return Objective(loss, {"loss": loss.detach(), "entropy": entropies.detach().sum()})


def policy_objective(
    logprobs: Tensor,
    entropies: Tensor,
    data: TokenData,
    *,
    config: AlgorithmConfig,
    surrogate: SurrogateFunction,
    kl_coefficient: float,
) -> Objective:
    """Sum up the surrogate, with KL penalty and entropy bonus as configured.

    Args:
        logprobs, entropies: float [tokens], differentiable.
        data: of the same tokens.
        config: the algorithm's choices.
        surrogate: of config.surrogate.
        kl_coefficient: β of this step.
    """
    sampled = data.sampled
    assert sampled is not None
    log_ratio = RATIOS[config.ratio].function(logprobs, sampled.old_logprobs, data.sequences)
    policy = surrogate(
        SurrogateInput(logprobs=logprobs, log_ratio=log_ratio, advantages=sampled.advantages, sequences=data.sequences), config
    )
    policy_terms = policy.loss if sampled.sampler_weights is None else policy.loss * sampled.sampler_weights
    policy_loss = (policy_terms * data.weights).sum()
    loss = policy_loss
    metrics = {
        "policy_loss": policy_loss.detach(),
        "entropy": entropies.detach().sum(),
        # the tokens are the old policy's, so what they can estimate is the divergence from it
        "kl_old": kl_estimate(sampled.old_logprobs, logprobs.detach(), "k3").sum(),
        "clip_fraction_low": policy.clipped_low.float().sum(),
        "clip_fraction_high": policy.clipped_high.float().sum(),
    }
    if config.kl.place == "loss":
        assert data.reference_logprobs is not None
        kl = kl_estimate(logprobs, data.reference_logprobs, config.kl.estimator)
        loss = loss + kl_coefficient * (kl * data.weights).sum()
    if config.entropy_coefficient > 0:
        loss = loss - config.entropy_coefficient * (entropies * data.weights).sum()
    metrics["loss"] = loss.detach()
    ratios, infinite = log_ratio.detach().exp(), logprobs.new_tensor(torch.inf)
    metrics["ratio_min"], metrics["ratio_max"] = ratios.aminmax() if ratios.numel() else (infinite, -infinite)
    return Objective(loss, metrics)


def value_objective(values: Tensor, data: TokenData, *, clip_range: float) -> Objective:
    """Sum up the critic's clipped value loss.

    Args:
        values: float [tokens], differentiable.
        data: of the same tokens.
        clip_range: how far values may move from those before the step's updates.
    """
    assert data.sampled is not None and data.sampled.critic is not None
    critic = data.sampled.critic
    loss = (clipped_value_loss(values, critic.old_values, critic.returns, clip_range) * data.weights).sum()
    is_clipped = (values.detach() - critic.old_values).abs() > clip_range
    metrics = {
        "loss": loss.detach(),
        "value_mean": values.detach().sum(),
        "clip_fraction": is_clipped.float().sum(),
    }
    return Objective(loss, metrics)
