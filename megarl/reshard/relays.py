"""Relays: through whose memory a worker's packed messages reach it, where it reads only memory that trainer ranks share with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megarl.reshard.packed_messages import PackedMessage, bucket_work
from megarl.reshard.plan.plan import Plan

Memory = tuple[str, ...]  # where two are equal, both processes can open the same memory (transport_choice.py: memory_of)


def holder_of(plan: Plan, worker: int, memory: Sequence[Memory]) -> Callable[[int], int]:
    """Which trainer rank holds what a sender has for a worker: the sender itself, or a rank that shares the worker's memory.

    Args:
        worker: number in a group in which the plan's source ranks come first, then its destination ranks.
        memory: of the whole group; some source rank has the worker's.
    """
    neighbours = [rank for rank in range(plan.source.num_ranks) if memory[rank] == memory[worker]]
    return lambda sender: sender if memory[sender] == memory[worker] else neighbours[sender % len(neighbours)]


def held_messages(plan: Plan, worker: int, memory: Sequence[Memory]) -> list[dict[int, list[PackedMessage]]]:
    """For each bucket the packed messages of a worker, of which ``peer`` is the sender, by their holder, in order of the holders.

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
    """Bytes up to the end of the last of some packed messages."""
    return packed_messages[-1].start + packed_messages[-1].num_bytes if packed_messages else 0
