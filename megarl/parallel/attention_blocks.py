"""Attention of some queries to a block of keys, with the log-sum-exp that lets results over several blocks be merged exactly.

Over blocks b of keys, each with ``out_b`` and ``lse_b``: ``lse = log Σ exp(lse_b)`` and ``out = Σ exp(lse_b - lse) out_b`` (online
softmax, arXiv 1805.02867). Given the merged ``out`` and ``lse``, the gradients through one block need nothing of the other
blocks (FlashAttention-2, arXiv 2307.08691, algorithm 2). The scores are never held whole, in either pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def has_block_kernel(query: Tensor) -> bool:
    """Return whether torch has a kernel that also gives the log-sum-exp: on CPU for all types, on CUDA for 16-bit types."""
    return not query.is_cuda or query.dtype in (torch.float16, torch.bfloat16)


def block_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend to one block of keys.

    Args:
        query: [queries, heads, d].
        key, value: [keys, kv heads, d]; value heads may be narrower.
        scale: of the logits.
        causal: query ``i`` sees keys ``0 .. i`` of as many keys as queries; else every query sees every key.

    Returns:
        [queries, heads, d of value], and each query's log-sum-exp, float32 (float64 of float64) [queries, heads].
    """
    q, k, v = (_batched(x) for x in (query, key, as_wide(value, query)))
    if query.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1)[..., : value.size(-1)], lse[0].transpose(0, 1)


def block_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value through one block of keys.

    Args:
        gradient: of ``out``.
        query, key, value: as block_attention has them.
        out, lse: merged over all blocks that the queries see.
        scale: of the logits.
        causal: as block_attention has it.

    Returns:
        Gradients in the shapes and types of query, key and value; the query's is its part from this block.
    """
    q, k, v, o, g = (_batched(x) for x in (query, key, *(as_wide(x, query) for x in (value, out, gradient))))
    lse = _batched(lse[..., None])[..., 0].contiguous()
    if query.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is not
        parts = aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, o, lse, None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=scale
        )
    else:
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, lse, 0.0, causal, scale=scale)
    for_query, for_key, for_value = (part[0].transpose(0, 1) for part in parts)
    return for_query, for_key, for_value[..., : value.size(-1)]


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block's result to what was merged so far, in place; ``lse`` is -inf before the first block."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp()[..., None]).add_(block_out * (block_lse - total).exp()[..., None])
    lse.copy_(total)


def accumulator(like: Tensor) -> Tensor:
    """Return zeros in which blocks are summed: float32, or the tensor's type where it is wider."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32), memory_format=torch.contiguous_format)


def as_wide(value: Tensor, query: Tensor) -> Tensor:
    """Return the heads filled up with zeros to the query's width: the fused kernels take heads of one width only."""
    missing = query.size(-1) - value.size(-1)
    return F.pad(value, (0, missing)) if missing else value


def _batched(x: Tensor) -> Tensor:
    """Return [tokens, heads, d] as the kernels take it, [1, heads, tokens, d]."""
    return x.transpose(0, 1)[None]


class _SuffixAttention(torch.autograd.Function):
    """Queries of the last tokens of a sequence: all keys before them are one block, their own another."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        merged = accumulator(query[..., : value.size(-1)])
        lse = torch.full_like(merged[..., 0], -torch.inf)
        for keys, causal in _suffix_blocks(query, key):
            merge(merged, lse, *block_attention(query, key[keys], value[keys], scale, causal=causal))
        out = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        for_query, for_key, for_value = accumulator(query), torch.zeros_like(key), torch.zeros_like(value)
        for keys, causal in _suffix_blocks(query, key):
            parts = block_gradients(gradient, query, key[keys], value[keys], out, lse, ctx.scale, causal=causal)
            for_query += parts[0]
            for_key[keys], for_value[keys] = parts[1:]
        return for_query.to(query.dtype), for_key, for_value, None


def _suffix_blocks(query: Tensor, key: Tensor) -> list[tuple[slice, bool]]:
    num_before = key.size(0) - query.size(0)
    own = (slice(num_before, None), True)
    return [(slice(0, num_before), False), own] if num_before else [own]


def suffix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return causal attention of the last tokens of a sequence to all of it: query ``i`` sees keys ``0 .. keys - queries + i``.

    Args:
        query: [queries, heads, d].
        key, value: [keys, kv heads, d], keys >= queries; value heads may be narrower.
        scale: of the logits.

    Returns:
        [queries, heads, d of value]. Memory grows linearly where ``has_block_kernel``.
    """
    if has_block_kernel(query):
        return _SuffixAttention.apply(query, key, value, scale)
    q, k, v = (_batched(x) for x in (query, key, as_wide(value, query)))
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
    grouped = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)[..., : value.size(-1)]
