"""Collectives that gradients flow through."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverGroup(torch.autograd.Function):
    """Every rank's loss may use the sum, so each rank's part has the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise sum over a group's ranks, equal on all of them.

    The loss of the group is the sum of its ranks' losses. Every rank must call it, and go backward through it, equally often.
    """
    return values if group.size() == 1 else _SumOverGroup.apply(values, group)
