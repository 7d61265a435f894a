"""From what optimizer steps report of the tokens of a micro-batch to a line of the log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megarl.metrics import UPDATE_METRICS, Reduction
from megarl.types import UpdateResult

EXTREMES = {  # 1 for a maximum, -1 for a minimum; all other metrics add up over micro-batches and ranks
    name: 1 if metric.reduction is Reduction.MAXIMUM else -1
    for name, metric in UPDATE_METRICS.items()
    if metric.reduction in (Reduction.MAXIMUM, Reduction.MINIMUM)
}


def batch_metrics(totals: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Return the metrics of one batch; a mean over no token and an extreme over nothing are left out.

    Args:
        totals: of each metric the sum or extreme over micro-batches and ranks. The weights that an objective's sequence means are
            made with have the batch's normaliser already.
        num_tokens: trained tokens of the batch.
    """
    metrics = {}
    for name, total in totals.items():
        if UPDATE_METRICS[name].reduction is Reduction.TOKEN_MEAN:
            if num_tokens:
                metrics[name] = total / num_tokens
        elif not (name in EXTREMES and math.isinf(total)):
            metrics[name] = total
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """The metrics of one batch, and how much there is of it."""

    metrics: Mapping[str, float]
    num_tokens: int
    num_sequences: int


def combined(batches: Sequence[BatchMetrics]) -> dict[str, float]:
    """Return the metrics of all batches together, as if they were one; a batch that lacks a metric does not count for it."""
    metrics = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.metrics):
        own = [batch for batch in batches if name in batch.metrics]
        metrics[name] = _reduced(UPDATE_METRICS[name].reduction, [batch.metrics[name] for batch in own], own)
    return metrics


def _reduced(reduction: Reduction, values: Sequence[float], batches: Sequence[BatchMetrics]) -> float:
    match reduction:
        case Reduction.MAXIMUM:
            return max(values)
        case Reduction.MINIMUM:
            return min(values)
        case Reduction.SUM:
            return sum(values)
        case Reduction.LAST:
            return values[-1]
        case Reduction.TOKEN_MEAN:
            counts = [batch.num_tokens for batch in batches]
        case Reduction.SEQUENCE_MEAN:
            counts = [batch.num_sequences for batch in batches]
        case Reduction.UPDATE_MEAN:
            counts = [1] * len(batches)
        case _:
            raise AssertionError(f"{reduction}: no reduction of optimizer steps")
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def step_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Return the metrics of a step from its optimizer steps; none while the model does not learn.

    What is not finite is not averaged: updates that were skipped, or had nothing to learn from, only count as such.
    """
    if not results:
        return {}
    learned, all_steps = [], []
    for result in results:
        if not (result.skipped or result.empty):
            norms = {"gradient_norm": result.gradient_norm, "gradient_norm_max": result.gradient_norm}
            learned.append(_batch(result, {**result.metrics, **norms}))
        counts = {"skipped_updates": float(result.skipped), "empty_updates": float(result.empty)}
        all_steps.append(_batch(result, {"learning_rate": result.learning_rate, **counts}))
    return combined(learned) | combined(all_steps)


def _batch(result: UpdateResult, metrics: Mapping[str, float]) -> BatchMetrics:
    return BatchMetrics(metrics=metrics, num_tokens=result.num_tokens, num_sequences=result.num_sequences)
