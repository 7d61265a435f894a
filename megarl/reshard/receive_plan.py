"""What a worker of an engine is told about its part of a plan."""

from collections.abc import Sequence
from typing import Any

import torch

from megarl.reshard.packed_messages import PackedMessage, bucket_work
from megarl.reshard.plan.plan import Copy, Plan
from megarl.reshard.relays import held_messages
from megarl.reshard.transport_choice import SHARED, Location, memory_of


def element_size(copy: Copy) -> int:
    """Bytes of one number of a copy."""
    rows, columns = copy.source
    return copy.num_bytes // ((rows.stop - rows.start) * (columns.stop - columns.start))


def receive_plan(
    plan: Plan, worker: int, dtypes: dict[int, torch.dtype], locations: Sequence[Location], transport: str
) -> dict[str, Any]:
    """What a worker will get in each update, and where it finds it, as its receiver reads it.

    Args:
        worker: number in the group, in which trainer ranks come first.
        dtypes: of the engine's weights, by the size of a number in bytes.
        locations: of the whole group.
    """
    shapes = dict(zip(plan.destination.parameters, plan.destination.shapes, strict=True))
    numbers: dict[str, int] = {}
    parameters: list[list[Any]] = []
    buckets: list[list[dict[str, Any]]] = []
    for bucket in _packed_messages(plan, worker, locations, transport):
        packed_messages = []
        for holder, packed in bucket:
            copies = []
            for copy, offset in zip(packed.copies, packed.offsets, strict=True):
                name, (rows, columns) = copy.destination_parameter, copy.destination
                if name not in numbers:
                    numbers[name] = len(parameters)
                    dtype = str(dtypes[element_size(copy)]).removeprefix("torch.")
                    parameters.append([name, shapes[name], dtype, 0])
                parameters[numbers[name]][-1] += copy.num_bytes
                copies.append(
                    (numbers[name], rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start, offset)
                )
            memory = {"holder": holder, "start": packed.start, "bytes": packed.num_bytes}
            packed_messages.append({"sender": packed.peer, "tensor": packed.copies[0].tensor, "copies": copies} | memory)
        buckets.append(packed_messages)
    return {"transport": transport, "parameters": parameters, "buckets": buckets}


def _packed_messages(
    plan: Plan, worker: int, locations: Sequence[Location], transport: str
) -> list[list[tuple[int, PackedMessage]]]:
    """Return each bucket's packed messages with the rank in whose memory the worker reads each: its sender, if none is shared."""
    if transport in SHARED:
        memory = [memory_of(location, transport) for location in locations]
        held = held_messages(plan, worker, memory)
        return [[(holder, packed) for holder, packed_messages in bucket.items() for packed in packed_messages] for bucket in held]
    ranks = range(plan.source.num_ranks)
    workers = range(ranks.stop, ranks.stop + plan.destination.num_ranks)
    return [[(packed.peer, packed) for packed in work.incoming] for work in bucket_work(plan, ranks, workers, worker)]
