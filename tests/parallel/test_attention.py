"""Context parallel attention against softmax written out token by token, in float64."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarl.config.schema import ParallelConfig
from megarl.parallel.attention import PackedAttention, zigzag_positions
from megarl.parallel.attention_blocks import suffix_attention
from megarl.parallel.launch import run_local_ranks
from megarl.parallel.layout import build_layout

NAMES = {"all_gather": "all_gather", "all_to_all": "a2a", "ring": "p2p", "hybrid": "a2a+p2p"}
LENGTHS = [(1,), (1, 2, 3), (5, 37, 1, 17)]  # many shorter than the ranks are many
HEADS = [(8, 8), (8, 1), (12, 6)]
WIDTH, SCALE = 6, 0.37


def written_out(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each token and head on its own."""
    repeats = query.size(1) // key.size(1)
    rows, start = [], 0
    for length in lengths:
        for t in range(length):
            seen = slice(start, start + t + 1)
            for head in range(query.size(1)):
                weights = torch.exp(SCALE * (key[seen, head // repeats] @ query[start + t, head]))
                rows.append((weights / weights.sum()) @ value[seen, head // repeats])
        start += length
    return torch.stack(rows).view(query.size(0), query.size(1), -1)


def inputs(lengths: tuple[int, ...], heads: tuple[int, int], value_width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, and a gradient of the result."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, (query_heads, key_heads) = sum(lengths), heads
    sizes = ((query_heads, WIDTH), (key_heads, WIDTH), (key_heads, value_width), (query_heads, value_width))
    return tuple(torch.randn(tokens, *size, generator=generator, dtype=torch.float64) for size in sizes)


@cache
def expected_results(lengths: tuple[int, ...], heads: tuple[int, int], value_width: int) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of query, key and value; made before ranks are forked, so once for all."""
    *whole, gradient = (x.requires_grad_() for x in inputs(lengths, heads, value_width))
    out = written_out(*whole, lengths)
    return out.detach(), list(torch.autograd.grad(out, whole, gradient.detach()))


def run_on_ranks(cp: int, method: str, ulysses_size: int | None, heads: list[tuple[int, int]]) -> None:
    cases = [(lengths, case, value_width) for lengths in LENGTHS for case in heads for value_width in (WIDTH, 4)]
    for case in cases:
        expected_results(*case)
    run_local_ranks(check_on_rank, (cp, method, ulysses_size, cases), cp, 60)


def padded(x: Tensor, lengths: tuple[int, ...], multiple: int) -> Tensor:
    """Each sequence filled up with 9 to the multiple."""
    parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, -len(part) % multiple), value=9.0) for part in x.split(lengths)]
    return torch.cat(parts)


def check_on_rank(
    cp: int, method: str, ulysses_size: int | None, cases: list[tuple[tuple[int, ...], tuple[int, int], int]]
) -> None:
    groups = build_layout(ParallelConfig(cp=cp, context_parallel_method=method, ulysses_size=ulysses_size)).groups
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.config, attention.scale = SimpleNamespace(cp_comm_type=NAMES[method]), SCALE
    attention.context_parallel_group, attention.hierarchical_groups = groups.cp, groups.hcp
    for case in cases:
        lengths, *_ = case
        filled = tuple(length + -length % (2 * cp) for length in lengths)
        mine = zigzag_positions(filled, cp)[dist.get_rank()]
        is_real = padded(torch.ones(sum(lengths), 1, 1), lengths, 2 * cp)[mine, 0, 0] == 1
        *whole, gradient = (padded(x, lengths, 2 * cp)[mine] for x in inputs(*case))
        local = [x.requires_grad_() for x in whole]
        boundaries = PackedSeqParams(cu_seqlens_q_padded=torch.tensor([0, *filled]).cumsum(0))
        out = attention(*local, None, packed_seq_params=boundaries)
        out.backward((gradient * is_real[:, None, None]).flatten(1))  # padding tokens have no gradient, as in the loss
        expected, gradients = expected_results(*case)
        for ours, reference in zip((out, *(x.grad for x in local)), (expected, *gradients), strict=True):
            there = padded(reference, lengths, 2 * cp)[mine]
            torch.testing.assert_close(ours.view_as(there)[is_real], there[is_real])


def can_exchange(heads: tuple[int, int], num_ranks: int) -> bool:
    return heads[0] % num_ranks == 0 and (heads[1] % num_ranks == 0 or num_ranks % heads[1] == 0)


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["all_gather", "all_to_all", "ring"])
def test_equals_softmax_written_out(cp: int, method: str) -> None:
    takes = HEADS if method != "all_to_all" else [case for case in HEADS if can_exchange(case, cp)]
    run_on_ranks(cp, method, None, takes)


@pytest.mark.parametrize(("cp", "ulysses_size"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)])
def test_hybrid_equals_softmax_written_out(cp: int, ulysses_size: int) -> None:
    takes = [case for case in HEADS if can_exchange(case, ulysses_size)]
    run_on_ranks(cp, "hybrid", ulysses_size, takes)


@pytest.mark.parametrize("num_queries", [1, 7, 20])
def test_the_last_tokens_of_a_sequence(num_queries: int) -> None:
    query, key, value, gradient = (x.requires_grad_() for x in inputs((20,), (6, 2), 4))
    expected = written_out(query, key, value, (20,))[-num_queries:]
    expected.backward(gradient[-num_queries:].detach())
    references = [x.grad.clone() for x in (query, key, value)]
    query.grad = key.grad = value.grad = None
    out = suffix_attention(query[-num_queries:], key, value, SCALE)
    out.backward(gradient[-num_queries:].detach())
    torch.testing.assert_close(out, expected)
    for x, reference in zip((query, key, value), references, strict=True):
        torch.testing.assert_close(x.grad, reference)
