"""Per-token estimators of KL(policy || reference) for the policy's own samples (Schulman 2020, "Approximating KL divergence")."""

from torch import Tensor


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """k1 = -log r, k2 = (log r)² / 2, k3 = r - 1 - log r, with r = reference / policy probability.

    Args:
        logprobs: float [tokens] under the policy.
        reference: float [tokens] under the reference.

    Returns:
        float [tokens], nats.
    """
    log_ratio = reference - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return log_ratio.expm1() - log_ratio
        case _:
            raise AssertionError(estimator)
