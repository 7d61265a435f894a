"""Through whose memory a worker's parcels come to it, where a worker reads only in memory that it shares with trainer ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from megarl.reshard.parcels import Parcel, bucket_work
from megarl.reshard.plan import Plan

Memory = tuple[str, ...]  # where two are equal, both processes can open the same memory (transport_choice.py: memory_of)


def holder_of(plan: Plan, worker: int, memory: Sequence[Memory]) -> Callable[[int], int]:
    """Which trainer rank holds what a sender has for a worker: the sender itself, or a rank that shares the worker's memory.

    Args:
        worker: number in a group in which the plan's source ranks come first, then its destination ranks.
        memory: of the whole group; some source rank has the worker's.
    """
    neighbours = [rank for rank in range(plan.source.num_ranks) if memory[rank] == memory[worker]]
    return lambda sender: sender if memory[sender] == memory[worker] else neighbours[sender % len(neighbours)]


def held_parcels(plan: Plan, worker: int, memory: Sequence[Memory]) -> list[dict[int, list[Parcel]]]:
    """For each bucket the parcels of a worker, of which ``peer`` is the sender, by their holder, in order of the holders.

    A holder has them one after another in a buffer of the worker's own: ``start`` counts from its beginning.
    """
    holder = holder_of(plan, worker, memory)
    ranks = range(plan.source.num_ranks)
    buckets = []
    for work in bucket_work(plan, ranks, range(ranks.stop, ranks.stop + plan.destination.num_ranks), worker):
        held: dict[int, list[Parcel]] = {}
        for parcel in work.incoming:
            before = held.setdefault(holder(parcel.peer), [])
            before.append(replace(parcel, start=end_of(before)))
        buckets.append(dict(sorted(held.items())))
    return buckets


def end_of(parcels: Sequence[Parcel]) -> int:
    """Bytes up to the end of the last of some parcels."""
    return parcels[-1].start + parcels[-1].num_bytes if parcels else 0
