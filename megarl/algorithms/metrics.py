"""What optimizer steps report: one table of names with their reductions, from the tokens of a micro-batch to a line of the log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megarl.types import UpdateResult


class Reduction(StrEnum):
    """How values of parts become the value of the whole. All but the extremes are exact means or sums over all parts' members."""

    TOKEN_MEAN = "mean over trained tokens"
    SEQUENCE_MEAN = "mean over responses"
    UPDATE_MEAN = "mean over optimizer steps"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of the log; ``unit`` is ``-`` for a plain number."""

    reduction: Reduction
    unit: str
    meaning: str


def _metric(reduction: Reduction, unit: str, meaning: str) -> Metric:
    return Metric(reduction=reduction, unit=unit, meaning=meaning)


TOKEN_MEAN, SEQUENCE_MEAN = Reduction.TOKEN_MEAN, Reduction.SEQUENCE_MEAN
METRICS: Mapping[str, Metric] = {
    "loss": _metric(SEQUENCE_MEAN, "-", "what is minimised: each optimizer step's loss, whose normaliser is its own"),
    "policy_loss": _metric(SEQUENCE_MEAN, "-", "the surrogate's part of the loss, without KL penalty and entropy bonus"),
    "entropy": _metric(TOKEN_MEAN, "nats", "of the policy at each trained token"),
    "kl_old": _metric(
        TOKEN_MEAN, "nats", "KL(policy that the step began with || policy), k3: 0 in the first optimizer step, which moves it"
    ),
    "clip_fraction_low": _metric(TOKEN_MEAN, "share", "tokens at which the lower bound of the ratio is active"),
    "clip_fraction_high": _metric(TOKEN_MEAN, "share", "tokens at which the upper bound of the ratio is active"),
    "ratio_min": _metric(Reduction.MINIMUM, "-", "smallest importance ratio"),
    "ratio_max": _metric(Reduction.MAXIMUM, "-", "largest importance ratio"),
    "value_mean": _metric(TOKEN_MEAN, "reward", "what the critic expects"),
    "clip_fraction": _metric(TOKEN_MEAN, "share", "of the critic: values that have moved further than value_clip"),
    "accuracy": _metric(SEQUENCE_MEAN, "share", "pairs whose chosen response has the larger reward"),
    "margin": _metric(SEQUENCE_MEAN, "reward", "chosen less rejected"),
    "chosen_reward": _metric(SEQUENCE_MEAN, "reward", "of the chosen responses"),
    "rejected_reward": _metric(SEQUENCE_MEAN, "reward", "of the rejected responses"),
    "chosen_logprob": _metric(SEQUENCE_MEAN, "nats", "log π of the whole chosen response"),
    "rejected_logprob": _metric(SEQUENCE_MEAN, "nats", "log π of the whole rejected response"),
    "gradient_norm": _metric(Reduction.UPDATE_MEAN, "L2 norm", "of the global gradient before clipping"),
    "gradient_norm_max": _metric(Reduction.MAXIMUM, "L2 norm", "of the global gradient before clipping, largest"),
}
EXTREMES = {  # 1 for a maximum, -1 for a minimum; all other metrics add up over micro-batches and ranks
    name: 1 if metric.reduction is Reduction.MAXIMUM else -1
    for name, metric in METRICS.items()
    if metric.reduction in (Reduction.MAXIMUM, Reduction.MINIMUM)
}


def batch_metrics(totals: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """The metrics of one batch from what an objective's add up to over it; one of no token is left out.

    Args:
        totals: of each metric the sum or extreme over micro-batches and ranks. The weights that an objective's sequence means are
            made with have the batch's normaliser already.
        num_tokens: trained tokens of the batch.
    """
    metrics = {}
    for name, total in totals.items():
        if METRICS[name].reduction is TOKEN_MEAN:
            if num_tokens:
                metrics[name] = total / num_tokens
        elif not (name in EXTREMES and math.isinf(total)):  # an extreme over nothing
            metrics[name] = total
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The metrics of one batch, and how much there is of it."""

    metrics: Mapping[str, float]
    num_tokens: int
    num_sequences: int


def combined(parts: Sequence[Part]) -> dict[str, float]:
    """The metrics of all parts together, as if they were one; a part that lacks a metric does not count for it."""
    metrics = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        own = [part for part in parts if name in part.metrics]
        values, reduction = [part.metrics[name] for part in own], METRICS[name].reduction
        if name in EXTREMES:
            metrics[name] = max(values) if reduction is Reduction.MAXIMUM else min(values)
            continue
        counts = {
            TOKEN_MEAN: [part.num_tokens for part in own],
            SEQUENCE_MEAN: [part.num_sequences for part in own],
            Reduction.UPDATE_MEAN: [1] * len(own),
        }[reduction]
        metrics[name] = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    return metrics


def step_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """The metrics of a step from its optimizer steps; nothing while the model does not learn.

    What is not finite is not averaged: updates that were skipped, or had nothing to learn from, only count as such.
    """
    if not results:
        return {}
    parts = [
        Part(
            metrics={**result.metrics, "gradient_norm": result.gradient_norm, "gradient_norm_max": result.gradient_norm},
            num_tokens=result.num_tokens,
            num_sequences=result.num_sequences,
        )
        for result in results
        if not (result.skipped or result.empty)
    ]
    return combined(parts) | {
        "learning_rate": results[-1].learning_rate,
        "skipped_updates": float(sum(result.skipped for result in results)),
        "empty_updates": float(sum(result.empty for result in results)),
    }
