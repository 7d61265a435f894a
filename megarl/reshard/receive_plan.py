"""What a worker of an engine is told about its part of a plan, and through whose memory its messages reach it.

A worker may read only memory that trainer ranks share with it. A rank that has the worker's memory then relays for the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from megarl.reshard.packed_messages import PackedMessage, bucket_work
from megarl.reshard.plan.plan import Copy, Plan
from megarl.reshard.transport_choice import SHARED, Location, shared_memory_of

Memory = tuple[str, ...]  # where two are equal, both processes can open the same memory (transport_choice.py: shared_memory_of)


def element_size(copy: Copy) -> int:
    """Return the bytes of one number of a copy."""
    rows, columns = copy.source
    return copy.num_bytes // ((rows.stop - rows.start) * (columns.stop - columns.start))


def receive_plan(
    plan: Plan, worker: int, dtypes: dict[int, torch.dtype], locations: Sequence[Location], transport: str
) -> dict[str, Any]:
    """Describe what a worker will get in each update, and where it finds it, as its receiver reads it.

    Args:
        worker: number in the group, in which trainer ranks come first.
        dtypes: of the engine's weights, by the size of a number in bytes.
        locations: of the whole group.
    """
    shapes = dict(zip(plan.destination.parameters, plan.destination.shapes, strict=True))
    numbers: dict[str, int] = {}
    parameters: list[list[Any]] = []
    buckets: list[list[dict[str, object]]] = []
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
        memory = [shared_memory_of(location, transport) for location in locations]
        held = held_messages(plan, worker, memory)
        return [[(holder, packed) for holder, packed_messages in bucket.items() for packed in packed_messages] for bucket in held]
    ranks = range(plan.source.num_ranks)
    workers = range(ranks.stop, ranks.stop + plan.destination.num_ranks)
    return [[(packed.peer, packed) for packed in work.incoming] for work in bucket_work(plan, ranks, workers, worker)]


def holder_of(plan: Plan, worker: int, memory: Sequence[Memory]) -> Callable[[int], int]:
    """Return which trainer rank holds what a sender has for a worker: the sender, or a rank that shares the worker's memory.

    Args:
        worker: number in a group in which the plan's source ranks come first, then its destination ranks.
        memory: of the whole group; some source rank has the worker's.
    """
    neighbours = [rank for rank in range(plan.source.num_ranks) if memory[rank] == memory[worker]]
    return lambda sender: sender if memory[sender] == memory[worker] else neighbours[sender % len(neighbours)]


def held_messages(plan: Plan, worker: int, memory: Sequence[Memory]) -> list[dict[int, list[PackedMessage]]]:
    """Return for each bucket the packed messages of a worker by their holder, in order of the holders; ``peer`` is the sender.

    A holder has them one after another in a buffer of the worker's own: ``start`` counts from its beginning.
    """
    holder = holder_of(plan, worker, memory)
    ranks = range(plan.source.num_ranks)
    buckets = []
    for work in bucket_work(plan, ranks, range(ranks.stop, ranks.stop + plan.destination.num_ranks), worker):
        held: dict[int, list[PackedMessage]] = {}
        for packed in work.incoming:
            before = held.setdefault(holder(packed.peer), [])
            before.append(replace(packed, start=end_of(before)))
        buckets.append(dict(sorted(held.items())))
    return buckets


def end_of(packed_messages: Sequence[PackedMessage]) -> int:
    """Return the bytes up to the end of the last of some packed messages."""
    return packed_messages[-1].start + packed_messages[-1].num_bytes if packed_messages else 0
