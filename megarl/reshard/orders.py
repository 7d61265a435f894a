"""What a worker of an engine is told about its part of a plan."""

from collections.abc import Sequence
from typing import Any

import torch

from megarl.reshard.parcels import Parcel, bucket_work
from megarl.reshard.plan import Copy, Plan
from megarl.reshard.routes import held_parcels
from megarl.reshard.transport_choice import SHARED, Place, memory_of


def element_size(copy: Copy) -> int:
    """Bytes of one number of a copy."""
    rows, columns = copy.source
    return copy.num_bytes // ((rows.stop - rows.start) * (columns.stop - columns.start))


def order(plan: Plan, worker: int, dtypes: dict[int, torch.dtype], places: Sequence[Place], transport: str) -> dict[str, Any]:
    """What a worker will get in each update, and where it finds it, as its receiver reads it.

    Args:
        worker: number in the group, in which trainer ranks come first.
        dtypes: of the engine's weights, by the size of a number in bytes.
        places: of the whole group.
    """
    shapes = dict(zip(plan.destination.parameters, plan.destination.shapes, strict=True))
    numbers: dict[str, int] = {}
    parameters: list[list[Any]] = []
    buckets: list[list[dict[str, Any]]] = []
    for bucket in _parcels(plan, worker, places, transport):
        parcels = []
        for holder, parcel in bucket:
            copies = []
            for copy, offset in zip(parcel.copies, parcel.offsets, strict=True):
                name, (rows, columns) = copy.destination_parameter, copy.destination
                if name not in numbers:
                    numbers[name] = len(parameters)
                    dtype = str(dtypes[element_size(copy)]).removeprefix("torch.")
                    parameters.append([name, shapes[name], dtype, 0])
                parameters[numbers[name]][-1] += copy.num_bytes
                copies.append(
                    (numbers[name], rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start, offset)
                )
            memory = {"holder": holder, "start": parcel.start, "bytes": parcel.num_bytes}
            parcels.append({"sender": parcel.peer, "tensor": parcel.copies[0].tensor, "copies": copies} | memory)
        buckets.append(parcels)
    return {"transport": transport, "parameters": parameters, "buckets": buckets}


def _parcels(plan: Plan, worker: int, places: Sequence[Place], transport: str) -> list[list[tuple[int, Parcel]]]:
    """For each bucket the worker's parcels and who holds each where the worker reads it: without shared memory its sender."""
    if transport in SHARED:
        memory = [memory_of(place, transport) for place in places]
        held = held_parcels(plan, worker, memory)
        return [[(holder, parcel) for holder, parcels in bucket.items() for parcel in parcels] for bucket in held]
    ranks = range(plan.source.num_ranks)
    workers = range(ranks.stop, ranks.stop + plan.destination.num_ranks)
    return [[(parcel.peer, parcel) for parcel in work.incoming] for work in bucket_work(plan, ranks, workers, worker)]
