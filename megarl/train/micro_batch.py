"""One rank's share of one packed micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.models.routing_replay import ReplayedSeqParams
from megarl.parallel.attention import zigzag_positions
from megarl.parallel.layout import Layout
from megarl.types import NO_EXPERT, PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What the model reads and which of its outputs are used.

    Worked example, cp 1, one sequence "p p r r" at tokens 10..13 of the batch: ``rows = [1, 2]`` (the outputs that predict
    the two r), ``targets`` the ids of the two r, ``index = [12, 13]``.

    Attributes:
        input_ids: int64 [1, tokens / cp], this context parallel rank's zigzag chunks of every (padded) sequence.
        position_ids: int64 [1, tokens / cp], position within the sequence.
        packed_seq_params: megatron-core's description of the packing, over all cp ranks, and the experts of this rank's tokens.
        rows: int64 [trained], positions in ``input_ids`` whose output predicts a trained token.
        targets: int64 [trained], those tokens.
        index: int64 [trained], where those tokens stand in the PackedBatch.
    """

    input_ids: Tensor
    position_ids: Tensor
    packed_seq_params: ReplayedSeqParams
    rows: Tensor
    targets: Tensor
    index: Tensor


def padded_lengths(lengths: Sequence[int], layout: Layout) -> list[int]:
    """Round each length up to equal zigzag chunks, and the last one further so that every tp rank holds equally many tokens."""
    multiple = layout.sequence_multiple
    padded = [-(-length // multiple) * multiple for length in lengths]
    padded[-1] += -sum(padded) % layout.tokens_multiple
    return padded


def build_micro_batch(batch: PackedBatch, sequences: Sequence[int], layout: Layout, device: torch.device) -> MicroBatch:
    """Pack some sequences of the batch for this rank.

    Padding tokens are token 0, stand behind their sequence where causal attention hides them, and are never trained on. Without
    sequences the micro-batch is one sequence of padding: ranks with less data than others still take part in collectives.
    """
    starts = batch.cu_seqlens[list(sequences)].tolist()
    lengths = batch.sequence_lengths[list(sequences)].tolist()
    padded = padded_lengths(lengths or [1], layout)

    source = torch.full((sum(padded),), -1)  # packed position to token of the batch
    next_token = torch.full((sum(padded),), -1)
    position = 0
    for start, length, padded_length in zip(starts, lengths, padded, strict=False):  # the padding alone is of no sequence
        source[position : position + length] = torch.arange(start, start + length)
        next_token[position : position + length - 1] = torch.arange(start + 1, start + length)
        position += padded_length
    position_ids = torch.cat([torch.arange(length) for length in padded])

    mine = zigzag_positions(tuple(padded), layout.config.cp)[layout.cp_rank]
    source, next_token, position_ids = source[mine], next_token[mine], position_ids[mine]
    input_ids = torch.where(source >= 0, batch.token_ids[source], 0)
    rows = ((next_token >= 0) & batch.loss_mask[next_token]).nonzero()[:, 0]
    index = next_token[rows]

    boundaries = torch.tensor([0, *padded]).cumsum(0).to(torch.int32)
    longest = max(padded)
    packed_seq_params = ReplayedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        routed_experts=_replayed_experts(batch, source, layout),
    )
    return MicroBatch(
        input_ids=input_ids[None].to(device),
        position_ids=position_ids[None].to(device),
        packed_seq_params=packed_seq_params,
        rows=rows.to(device),
        targets=batch.token_ids[index].to(device),
        index=index,
    )


def _replayed_experts(batch: PackedBatch, source: Tensor, layout: Layout) -> Tensor | None:
    """Return the experts of the tokens whose routers this rank computes: under sequence parallelism a part of the cp rank's.

    Args:
        source: int64 [tokens / cp], where each of the cp rank's tokens stands in the batch; -1 for padding.
    """
    if batch.routed_experts.shape[1] == 0:
        return None
    experts = torch.where((source >= 0)[:, None, None], batch.routed_experts[source], NO_EXPERT)
    return experts.chunk(layout.config.tp)[layout.tp_rank] if layout.config.sequence_parallel else experts
