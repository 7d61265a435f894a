"""Causal attention over packed sequences, with context parallelism: the core_attention of every layer.

Sequences lie one after another in the token dimension ("thd"); ``cu_seqlens`` says where each starts, and no token ever sees
another sequence. Under context parallelism each sequence is cut into 2·cp equal chunks and rank r holds chunks r and
2·cp - 1 - r ("zigzag", so that causal work is balanced; Llama 3, arXiv 2407.21783, section 3.3.2). Four ways to see the others:

* ``all_gather``: every rank gathers all keys and values and computes its own queries;
* ``all_to_all``: ranks exchange tokens for heads and compute whole sequences for heads / cp (Ulysses, arXiv 2309.14509);
* ``ring``: keys and values are passed around while ranks compute (ring_attention.py);
* ``hybrid``: neighbours exchange tokens for heads, and the keys of a rank's heads go around a ring of the ranks that have the same
  heads (USP, arXiv 2405.07719).
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.errors import ConfigError
from megarl.parallel.attention_blocks import as_wide, suffix_attention
from megarl.parallel.ring_attention import ring_attention

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


@lru_cache(maxsize=64)
def zigzag_positions(lengths: tuple[int, ...], cp_size: int) -> Tensor:
    """Return the packed positions held by each context parallel rank.

    Args:
        lengths: length of each sequence, each a multiple of 2 · cp_size.
        cp_size: context parallel size.

    Returns:
        int64 [cp_size, num_tokens / cp_size], positions into the packed tokens.
    """
    if cp_size == 1:
        return torch.arange(sum(lengths))[None]
    rows: list[list[Tensor]] = [[] for _ in range(cp_size)]
    start = 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * cp_size)
        for rank in range(cp_size):
            rows[rank] += [chunks[rank], chunks[2 * cp_size - 1 - rank]]
        start += length
    return torch.stack([torch.cat(row) for row in rows])


class _AllGatherTokens(torch.autograd.Function):
    """[tokens, ...] of each rank to [cp, tokens, ...]; the backward pass sums what every rank computed for this one's tokens."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty((group.size(), *local.shape))
        dist.all_gather_into_tensor(gathered.view(-1), local.contiguous().view(-1), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        local = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter_tensor(local.view(-1), gradient.contiguous().view(-1), group=ctx.group)
        return local, None


class _AllToAll(torch.autograd.Function):
    """[cp, ...] to [cp, ...]: block i goes to rank i. Its own inverse, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, blocks.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sent_back = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(sent_back, gradient.contiguous(), group=ctx.group)
        return sent_back, None


def _tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [tokens / cp, heads, d] for [tokens, heads / cp, d], tokens in rank order."""
    tokens, heads, head_dim = x.shape
    cp = group.size()
    blocks = x.view(tokens, cp, heads // cp, head_dim).transpose(0, 1)
    return _AllToAll.apply(blocks, group).reshape(cp * tokens, heads // cp, head_dim)


def _heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo what ``_tokens_to_heads`` does."""
    tokens, heads, head_dim = x.shape
    cp = group.size()
    received = _AllToAll.apply(x.view(cp, tokens // cp, heads, head_dim), group)
    return received.transpose(0, 1).reshape(tokens // cp, cp * heads, head_dim)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally within one sequence by torch's fused kernel, in linear memory; shapes as in suffix_attention."""
    width, value = value.size(-1), as_wide(value, query)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.size(1) != key.size(1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)[..., :width]


def _packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Attend within whole sequences, [tokens, heads, d]: one causal call each, or flash attention's varlen kernel on GPU."""
    if query.is_cuda and flash_attn_varlen_func is not None and query.dtype in (torch.float16, torch.bfloat16):
        boundaries = torch.tensor((0, *lengths), device=query.device).cumsum(0, dtype=torch.int32)
        longest = max(lengths)
        out = flash_attn_varlen_func(
            query, key, as_wide(value, query), boundaries, boundaries, longest, longest, softmax_scale=scale, causal=True
        )
        return out[..., : value.size(-1)]
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_causal_attention(q, k, v, scale) for q, k, v in parts])


class PackedAttention(MegatronModule):
    """core_attention for megatron-core's SelfAttention: no parameters, packed sequences only."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__(config=config)
        groups = kwargs["pg_collection"]
        if groups.cp.size() > 1 and "p2p" in config.cp_comm_type and torch.cuda.is_available() and not config.bf16:
            raise ConfigError(
                "context_parallel_method: ring and hybrid take model.dtype bfloat16 on GPUs, whose kernels give no log-sum-exp "
                "of float32; set model.dtype, or use all_gather or all_to_all"
            )
        self.context_parallel_group: dist.ProcessGroup = groups.cp
        self.hierarchical_groups: list[dist.ProcessGroup] | None = groups.hcp  # that exchanges heads, ring
        self.scale: float = kwargs.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend to packed sequences.

        Args:
            query: [tokens / cp, heads / tp, d], this rank's zigzag chunks of every sequence.
            key, value: [tokens / cp, kv heads / tp, d]; value heads may be narrower (latent attention).
            packed_seq_params: ``cu_seqlens_q_padded`` are the boundaries over all cp ranks, each sequence a multiple of 2 · cp.
            attention_mask, attn_mask_type, attention_bias: unused; the mask is causal within each sequence.

        Returns:
            [tokens / cp, heads / tp · d of value].
        """
        assert packed_seq_params is not None, "PackedAttention takes packed sequences only"
        boundaries = packed_seq_params.cu_seqlens_q_padded
        lengths = tuple((boundaries[1:] - boundaries[:-1]).tolist())
        group = self.context_parallel_group
        if group.size() == 1:
            out = _packed_causal_attention(query, key, value, lengths, self.scale)
        elif self.config.cp_comm_type == "a2a":
            out = self._exchange_heads(query, key, value, lengths)
        elif self.config.cp_comm_type == "p2p":
            out = ring_attention(query, key, value, lengths, self.scale, group)
        elif self.config.cp_comm_type == "a2a+p2p":
            out = self._exchange_heads_around_ring(query, key, value, lengths)
        else:
            out = self._gather_keys(query, key, value, lengths)
        return out.reshape(out.size(0), -1)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict[str, Any]:
        """Save nothing; upstream's default asks for a global process group."""
        return {}

    def _gather_keys(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        group = self.context_parallel_group
        cp, rank = group.size(), group.rank()
        order = zigzag_positions(lengths, cp).flatten().argsort().to(key.device)
        gathered = _AllGatherTokens.apply(torch.cat([key, value], dim=-1), group).flatten(0, 1)[order]
        keys, values = gathered.split([key.size(-1), value.size(-1)], dim=-1)
        outputs = []
        start, local_start = 0, 0
        for length in lengths:
            chunk = length // (2 * cp)
            for index in (rank, 2 * cp - 1 - rank):
                end = start + (index + 1) * chunk
                local = query[local_start : local_start + chunk]
                outputs.append(suffix_attention(local, keys[start:end], values[start:end], self.scale))
                local_start += chunk
            start += length
        return torch.cat(outputs)

    def _exchange_heads(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        group = self.context_parallel_group
        positions = zigzag_positions(lengths, group.size()).flatten().to(query.device)
        order = positions.argsort()
        query, key, value = (_tokens_to_heads(x, group)[order] for x in (query, *_shared_heads(key, value, group)))
        out = _packed_causal_attention(query, key, value, lengths, self.scale)
        return _heads_to_tokens(out[positions], group)

    def _exchange_heads_around_ring(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        assert self.hierarchical_groups is not None
        neighbours, ring = self.hierarchical_groups
        cp = self.context_parallel_group.size()
        first = ring.rank() * neighbours.size()
        # The neighbours' chunks of a sequence are two stretches without gaps: the zigzag chunks of as many ranks as the ring has.
        positions = zigzag_positions(lengths, cp)[first : first + neighbours.size()].flatten().to(query.device)
        order = positions.argsort()
        query, key, value = (_tokens_to_heads(x, neighbours)[order] for x in (query, *_shared_heads(key, value, neighbours)))
        out = ring_attention(query, key, value, lengths, self.scale, ring)
        return _heads_to_tokens(out[order.argsort()], neighbours)


def _shared_heads(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Repeat each head of keys, where there are fewer than ranks, for all ranks whose query heads it serves."""
    repeats = max(1, group.size() // key.size(1))
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
