"""How token losses become one number: the aggregation axis, with the global normaliser written into token weights."""

import torch
from torch import Tensor


def token_weights(loss_mask: Tensor, cu_seqlens: Tensor, aggregation: str) -> Tensor:
    """Weight of each token such that the loss is the plain sum of weight times term over the whole batch.

    * ``sequence_mean``: 1 / (num_sequences · tokens of its sequence), GRPO's mean of sequence means. A sequence without
      trained tokens counts as one of mean 0.
    * ``token_mean``: 1 / tokens of the batch (DAPO, arXiv 2503.14476, equation 8).

    Args:
        loss_mask: bool [num_tokens].
        cu_seqlens: int64 [num_sequences + 1].

    Returns:
        float32 [num_tokens], 0 where the mask is False.
    """
    mask = loss_mask.double()
    if aggregation == "token_mean":
        return (mask / mask.sum().clamp(min=1)).float()
    assert aggregation == "sequence_mean", aggregation
    lengths = cu_seqlens.diff()
    sequence = torch.arange(lengths.numel(), device=mask.device).repeat_interleave(lengths)
    trained = torch.zeros(lengths.numel(), dtype=torch.float64, device=mask.device).index_add_(0, sequence, mask)
    return (mask / (trained[sequence].clamp(min=1) * lengths.numel())).float()
