"""AEPO, adaptive entropy-controlled policy optimization (QwenLong-L1.5, arXiv 2512.12967): negative samples by entropy."""

from torch import Tensor


def masks_negative(entropy: float, was_masking: bool, low: float, high: float) -> bool:
    """Whether negative samples are left out of this step.

    They are left out once the batch's entropy is above ``high`` (their gradient raises it further) and taken back in once it is
    below ``low``; in between nothing changes.

    Args:
        entropy: mean token entropy of the batch, nats.
        was_masking: the last step's answer.
        low, high: thresholds, nats.
    """
    if entropy > high:
        return True
    return was_masking and entropy >= low


def without_negatives(advantages: Tensor) -> Tensor:
    """Negative advantages set to 0; the normaliser of the loss stays that of all samples."""
    return advantages.clamp(min=0)
