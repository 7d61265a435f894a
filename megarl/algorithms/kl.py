"""Per-token estimators of KL(policy || reference) for the policy's own samples, and the controller of its coefficient.

Estimators: Schulman 2020, "Approximating KL divergence". With r = reference / policy probability of the token:
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One choice of the axis: a function of log r, and its formula."""

    function: Callable[[Tensor], Tensor]
    formula: str


ESTIMATORS = {
    "k1": Estimator(function=lambda log_r: -log_r, formula="−log r"),
    "k2": Estimator(function=lambda log_r: log_r.square() / 2, formula="(log r)² / 2"),
    "k3": Estimator(function=lambda log_r: log_r.expm1() - log_r, formula="r − 1 − log r"),
}


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate the KL divergence at each token, nats.

    Args:
        logprobs: float [tokens] under the policy.
        reference: float [tokens] under the reference.
        estimator: a key of ESTIMATORS.
    """
    return ESTIMATORS[estimator].function(reference - logprobs)


def adapted_coefficient(coefficient: float, kl: float, target: float, rate: float) -> float:
    """Return β (1 + K e) with e = clip((KL - target) / target, -0.2, 0.2) (arXiv 1909.08593, section 2.2).

    Args:
        coefficient: β.
        kl: measured KL of a response, nats.
        target: wanted KL of a response, nats.
        rate: K.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1 + rate * error)
