"""Causal attention with keys and values passed around a ring of ranks (Ring Attention, arXiv 2310.01889), zigzag chunks.

Rank r holds chunks r and 2·n - 1 - r of every sequence, of n ranks. In each of n steps it computes with the keys and values of
one rank while the next ones are on their way. Of those of rank j, its queries see

* j = r: what a sequence of the two chunks would see of itself;
* j < r: the first chunk, which both of its own follow;
* j > r: both chunks, but only from its second.

So each step is one block without a mask for each sequence (the first a causal one), and equal work on every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.attention_blocks import accumulator, block_attention, block_gradients, merge


@dataclass(frozen=True, slots=True)
class _Block:
    """Which of this rank's queries see which of the keys now here."""

    queries: slice
    keys: slice
    causal: bool


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Attend to all tokens of this rank's sequences.

    Args:
        query: [tokens / n, heads, d], this rank's zigzag chunks of every sequence.
        key, value: [tokens / n, kv heads, d]; value heads may be narrower.
        lengths: of the sequences over all ranks, each a multiple of 2·n.
        scale: of the logits.
        group: the ring.

    Returns:
        [tokens / n, heads, d of value].
    """
    return _RingAttention.apply(query, key, value, lengths, scale, group)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, group: dist.ProcessGroup
    ) -> Tensor:
        merged = accumulator(query[..., : value.size(-1)])
        lse = torch.full_like(merged[..., 0], -torch.inf)
        here = [key.contiguous(), value.contiguous()]
        for source, is_last in _turns(group):
            arriving = None if is_last else _pass_on(here, group)
            for block in _blocks(source, lengths, group):
                keys, values = (x[block.keys] for x in here)
                out, block_lse = block_attention(query[block.queries], keys, values, scale, causal=block.causal)
                merge(merged[block.queries], lse[block.queries], out, block_lse)
            if arriving is not None:
                here = arriving.wait()
        out = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.lengths, ctx.scale, ctx.group = lengths, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        group = ctx.group
        gradient = gradient.contiguous()
        for_query = accumulator(query)
        here = [key.contiguous(), value.contiguous()]
        sums: _Arriving | None = None  # gradients of keys and values travel with them, and after n steps are back home
        for source, is_last in _turns(group):
            arriving = None if is_last else _pass_on(here, group)
            parts = [accumulator(x) for x in here]
            for block in _blocks(source, ctx.lengths, group):
                q, keys = block.queries, block.keys
                gradients = block_gradients(
                    gradient[q], query[q], here[0][keys], here[1][keys], out[q], lse[q], ctx.scale, causal=block.causal
                )
                for total, at, part in zip((for_query, *parts), (q, keys, keys), gradients, strict=True):
                    total[at] += part
            if sums is not None:
                parts = [part + total for part, total in zip(parts, sums.wait(), strict=True)]
            sums = _pass_on(parts, group)
            if arriving is not None:
                here = arriving.wait()
        assert sums is not None
        for_key, for_value = sums.wait()
        return for_query.to(query.dtype), for_key.to(key.dtype), for_value.to(value.dtype), None, None, None


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Tensors on their way from the previous rank, while this rank's are on theirs to the next."""

    tensors: list[Tensor]
    sent: Sequence[Tensor]  # kept alive until they have left
    requests: list[dist.Work]

    def wait(self) -> list[Tensor]:
        """Wait for the previous rank's tensors."""
        for request in self.requests:
            request.wait()
        return self.tensors


def _pass_on(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> _Arriving:
    """Send to the next rank of the ring what the next turn needs there, and receive from the previous one."""
    rank, size = group.rank(), group.size()
    received = [torch.empty_like(x) for x in tensors]
    sends = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % size) for x in received]
    return _Arriving(tensors=received, sent=tensors, requests=dist.batch_isend_irecv([*sends, *receives]))


def _turns(group: dist.ProcessGroup) -> Iterator[tuple[int, bool]]:
    """Yield whose keys are here in each step, and whether it is the last."""
    size = group.size()
    for step in range(size):
        yield (group.rank() - step) % size, step == size - 1


def _blocks(source: int, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Iterator[_Block]:
    """Return for each sequence what this rank's queries see of the keys of rank ``source``."""
    rank, start = group.rank(), 0
    for length in lengths:
        chunk = length // (2 * group.size())
        end = start + 2 * chunk
        whole, first, second = slice(start, end), slice(start, start + chunk), slice(start + chunk, end)
        yield _Block(queries=second if source > rank else whole, keys=first if source < rank else whole, causal=source == rank)
        start = end
