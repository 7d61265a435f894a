"""The hash that SGLang draws a request's seeded samples with, in torch: SGLang has it for GPUs and in the package sgl-kernel."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """Return MurmurHash3 (x86, 32 bits) of each (seed, position, column), as SGLang's Triton kernel of this name computes it.

    Args:
        seed: uint64 [rows].
        positions: int64 [rows].
        col_indices: int64 [columns].

    Returns:
        Hashes, int64 within 32 bits, [rows, columns].
    """
    seed = seed.view(torch.int64)
    state = torch.zeros_like(seed)
    for block in (seed & MASK, (seed >> 32) & MASK, positions & MASK):
        state = _mixed(state, block)
    state = _mixed(state[:, None], col_indices[None, :] & MASK) ^ 16  # the length of the four blocks in bytes
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)


def _mixed(state: Tensor, block: Tensor) -> Tensor:
    """Mix one block of four bytes into the state."""
    block = _times(_rotated_left(_times(block, 0xCC9E2D51), 15), 0x1B873593)
    return (_times(_rotated_left(state ^ block, 13), 5) + 0xE6546B64) & MASK


def _times(value: Tensor, factor: int) -> Tensor:
    """Return the product within 32 bits; in two halves, since int64 holds no product of two 32-bit numbers."""
    return (value * (factor & 0xFFFF) + (((value * (factor >> 16)) & 0xFFFF) << 16)) & MASK


def _rotated_left(value: Tensor, bits: int) -> Tensor:
    return ((value << bits) | (value >> (32 - bits))) & MASK
