"""Work that rank 0 alone does, and what it makes for every rank."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megarl.train.roles import is_main_rank

Batch = TypeVar("Batch")
Value = TypeVar("Value")


def broadcast_batch(batch: Batch | None, kind: type[Batch]) -> Batch:
    """Give every rank rank 0's batch; collective.

    Args:
        batch: on rank 0 a dataclass whose fields are CPU tensors, or None; None elsewhere.
        kind: its class.
    """
    assert is_dataclass(kind)
    given = [(field.name, getattr(batch, field.name, None)) for field in fields(kind)]
    layout: list[Any] = [[(name, value.dtype, value.shape) for name, value in given if value is not None]]
    dist.broadcast_object_list(layout, src=0)
    tensors: dict[str, object] = {field.name: None for field in fields(kind)}
    for name, dtype, shape in layout[0]:
        tensor = torch.empty(shape, dtype=dtype) if batch is None else getattr(batch, name).contiguous()
        # neither gloo nor NCCL knows int16
        dist.broadcast(tensor.view(torch.uint8) if dtype == torch.int16 else tensor, src=0)
        tensors[name] = tensor
    return kind(**tensors)


def on_main_rank(make: Callable[[], Value]) -> Value | None:
    """Return what ``make`` returns, which rank 0 alone calls; None elsewhere."""
    return make() if is_main_rank() else None


def from_main_rank(make: Callable[[], Value]) -> Value:
    """Return on every rank what ``make`` returns, which rank 0 alone calls; collective."""
    return broadcast_value(on_main_rank(make))


def broadcast_value(value: Value | None) -> Value:
    """Give every rank rank 0's value, which is not None; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]
