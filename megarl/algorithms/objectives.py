"""What a training step minimises, as a function of the chosen tokens' log-probabilities and entropies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.kl import kl_estimate
from megarl.algorithms.ratios import RATIOS
from megarl.algorithms.sequences import SequenceTokens
from megarl.algorithms.surrogates import SurrogateFunction, SurrogateInput
from megarl.algorithms.values import clipped_value_loss
from megarl.config.schema import AlgorithmConfig
from megarl.types import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """The rows of a TrainBatch that one micro-batch trains on, each [tokens]; None where the TrainBatch has none.

    Attributes:
        sequences: which sequence each token is of.
    """

    weights: Tensor
    advantages: Tensor | None
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    sampler_weights: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    sequences: SequenceTokens


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of some tokens and what to report of them.

    Attributes:
        loss: scalar; losses of all micro-batches and ranks add up to the batch's loss.
        sums: name to scalar that adds up over the batch; names in ``means`` are divided by the number of tokens afterwards.
        maxima: name to scalar whose maximum over the batch is reported.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


ObjectiveFunction = Callable[..., Objective]  # called with the outputs of the engine's head, each [tokens], and TokenData
PER_TOKEN = "per_token/"  # prefix of sums that are reported as means over the batch's tokens


def select_tokens(batch: TrainBatch, index: Tensor, device: torch.device, sequences: SequenceTokens) -> TokenData:
    """The data of tokens ``index`` (int64 [tokens], into the packed batch), moved to ``device``; ``sequences`` is there already."""

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index].to(device)

    return TokenData(
        weights=batch.token_weights[index].to(device),
        advantages=rows(batch.advantages),
        old_logprobs=rows(batch.old_logprobs),
        reference_logprobs=rows(batch.reference_logprobs),
        sampler_weights=rows(batch.sampler_weights),
        old_values=rows(batch.old_values),
        returns=rows(batch.returns),
        sequences=sequences,
    )


def supervised_objective(logprobs: Tensor, entropies: Tensor, data: TokenData) -> Objective:
    """Cross-entropy: the weighted sum of -log p."""
    loss = -(logprobs * data.weights).sum()
    return Objective(loss, {"loss": loss.detach(), PER_TOKEN + "entropy": entropies.detach().sum()}, {})


def policy_objective(
    logprobs: Tensor,
    entropies: Tensor,
    data: TokenData,
    *,
    config: AlgorithmConfig,
    surrogate: SurrogateFunction,
    kl_coefficient: float,
) -> Objective:
    """The surrogate, plus KL penalty and entropy bonus as configured.

    Args:
        logprobs, entropies: float [tokens], differentiable.
        data: of the same tokens.
        config: the algorithm's choices.
        surrogate: of config.surrogate.
        kl_coefficient: β of this step.
    """
    assert data.advantages is not None and data.old_logprobs is not None
    log_ratio = RATIOS[config.ratio].function(logprobs, data.old_logprobs, data.sequences)
    policy = surrogate(
        SurrogateInput(logprobs=logprobs, log_ratio=log_ratio, advantages=data.advantages, sequences=data.sequences), config
    )
    policy_terms = policy.loss if data.sampler_weights is None else policy.loss * data.sampler_weights
    policy_loss = (policy_terms * data.weights).sum()
    loss = policy_loss
    detached = logprobs.detach()
    sums = {
        "policy_loss": policy_loss.detach(),
        PER_TOKEN + "entropy": entropies.detach().sum(),
        PER_TOKEN + "kl_old": kl_estimate(detached, data.old_logprobs, "k3").sum(),
        PER_TOKEN + "clip_fraction_low": policy.clipped_low.float().sum(),
        PER_TOKEN + "clip_fraction_high": policy.clipped_high.float().sum(),
    }
    if data.reference_logprobs is not None:
        kl = kl_estimate(logprobs, data.reference_logprobs, config.kl.estimator)
        sums[PER_TOKEN + "kl_reference"] = kl.detach().sum()
        if config.kl.place == "loss":
            loss = loss + kl_coefficient * (kl * data.weights).sum()
    if config.entropy_coefficient > 0:
        loss = loss - config.entropy_coefficient * (entropies * data.weights).sum()
    sums["loss"] = loss.detach()
    ratio_max = log_ratio.detach().amax().exp() if log_ratio.numel() else logprobs.new_zeros(())
    return Objective(loss, sums, {"ratio_max": ratio_max})


def value_objective(values: Tensor, data: TokenData, *, clip_range: float) -> Objective:
    """The critic's clipped value loss.

    Args:
        values: float [tokens], differentiable.
        data: of the same tokens.
        clip_range: how far values may move from those before the step's updates.
    """
    assert data.old_values is not None and data.returns is not None
    loss = (clipped_value_loss(values, data.old_values, data.returns, clip_range) * data.weights).sum()
    is_clipped = (values.detach() - data.old_values).abs() > clip_range
    sums = {
        "loss": loss.detach(),
        PER_TOKEN + "value_mean": values.detach().sum(),
        PER_TOKEN + "clip_fraction": is_clipped.float().sum(),
    }
    return Objective(loss, sums, {})


def finish_metrics(sums: dict[str, float], maxima: dict[str, float], num_tokens: int) -> dict[str, float]:
    """Divide the per-token sums by the number of trained tokens and drop their prefix."""
    metrics = dict(maxima)
    for name, value in sums.items():
        metrics[name.removeprefix(PER_TOKEN)] = value / max(num_tokens, 1) if name.startswith(PER_TOKEN) else value
    return metrics


def masked_mean_gap(first: Tensor, second: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and maximum of |first - second| over the mask; 0 when the mask is empty."""
    gap = (first - second).abs()[mask]
    return (float(gap.mean()), float(gap.max())) if gap.numel() else (0.0, 0.0)
