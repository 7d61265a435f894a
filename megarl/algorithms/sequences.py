"""Sums over the sequences of a packed batch, whole or scattered over context parallel ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def sequence_numbers(cu_seqlens: Tensor) -> Tensor:
    """Return the sequence that each token of a packed batch belongs to: int64 [num_sequences + 1] to int64 [num_tokens]."""
    lengths = cu_seqlens.diff()
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def sums_per_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each sequence's values.

    Args:
        values: bool or number [num_tokens].
        cu_seqlens: int64 [num_sequences + 1].

    Returns:
        float64 [num_sequences].
    """
    numbers = sequence_numbers(cu_seqlens)
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, numbers, values.double())


def trained_lengths(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the trained tokens of each sequence: bool [num_tokens] and int64 [num_sequences + 1] to int64 [num_sequences]."""
    running = torch.nn.functional.pad(loss_mask.cumsum(0), (1, 0))
    return running[cu_seqlens].diff()


def suffix_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over each token and the ones behind it in its sequence: number [num_tokens] to float64 [num_tokens]."""
    values = values.double()
    running = values.cumsum(0)
    ends = torch.cat([running.new_zeros(1), running])[cu_seqlens[1:]]
    return ends.repeat_interleave(cu_seqlens.diff()) - running + values


def spread_over_tokens(per_sequence: Tensor, cu_seqlens: Tensor, loss_mask: Tensor) -> Tensor:
    """Give every trained token its sequence's value, and 0 to the others.

    Args:
        per_sequence: float [num_sequences].
        cu_seqlens: int64 [num_sequences + 1].
        loss_mask: bool [num_tokens].

    Returns:
        float [num_tokens].
    """
    return per_sequence.repeat_interleave(cu_seqlens.diff()) * loss_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTokens:
    """Where the chosen tokens of a micro-batch stand in the sequences of the batch.

    Under context parallelism this rank holds only some tokens of a sequence: ``sum_over_ranks`` completes its sums. A sequence is
    never cut over micro-batches or data parallel replicas, so sums over the context parallel group are sums over the sequence.

    Attributes:
        numbers: int64 [tokens], the sequence of each token.
        lengths: int64 [num_sequences], trained tokens of each sequence of the batch, over all ranks.
        sum_over_ranks: differentiable elementwise sum of a tensor over the context parallel group; every rank of the group must
            call it equally often.
    """

    numbers: Tensor
    lengths: Tensor
    sum_over_ranks: Callable[[Tensor], Tensor]

    def totals(self, values: Tensor) -> Tensor:
        """Sum ``values`` over each sequence; float [tokens] to float64 [num_sequences], 0 of other micro-batches."""
        sums = torch.zeros(self.lengths.numel(), dtype=torch.float64, device=values.device)
        return self.sum_over_ranks(sums.index_add(0, self.numbers, values.double()))

    def sums(self, values: Tensor) -> Tensor:
        """Sum ``values`` over each token's whole sequence, in float64; float [tokens] to float [tokens]."""
        return self.totals(values)[self.numbers].to(values.dtype)

    def means(self, values: Tensor) -> Tensor:
        """Average ``values`` over the trained tokens of each token's sequence; float [tokens] to float [tokens]."""
        return self.sums(values) / self.lengths[self.numbers]
