"""The policy's weights into the workers of a running engine: every trainer rank sends its share of a plan straight to them."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from megarl.errors import TransferError
from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.parallel.placement import place
from megarl.reshard.balance import Machines
from megarl.reshard.engines import EngineLayout, engine_side
from megarl.reshard.meeting import first_line
from megarl.reshard.megatron import TransferSettings
from megarl.reshard.parcels import FlatPart, Parcel, bucket_work, digest, flat_parts
from megarl.reshard.plan import Copy, Plan, build_plan
from megarl.reshard.side import megatron_side, tensor_table
from megarl.weights.mapping import WeightMap
from megarl.weights.transfer import global_parameters


class EngineTransfer:
    """Sends the weights of a policy to the workers of one engine, as often as asked.

    Trainer ranks and workers are a gloo group of their own, the workers last; weights on a GPU go through host memory. A worker is
    told once, through the group's store, what it will get. Its end is rollout/engine_plugin/megarl_slice_receiver.py: what
    arrives changed, does not fit or does not come is an error there.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        source: tuple[list[CausalLM], Layout],
        engine: EngineLayout,
        dtype: torch.dtype,
        address: str,
        settings: TransferSettings,
    ) -> None:
        """Plan the transfer; collective over the trainer's world.

        Args:
            dtype: of the engine's weights.
            address: of rank 0's machine, for all ranks and workers.

        Raises:
            ConfigError: the engine's layout does not divide the model.
        """
        tensors = tensor_table(weight_map, dtype.itemsize)
        ranks = source[1].ranks
        trainer = place(source[1].config, len(ranks))
        self.plan = build_plan(
            megatron_side(weight_map, trainer, tensors),
            engine_side(weight_map.architecture, engine, tensors),
            tensors,
            Machines(gpus_per_node=settings.gpus_per_node),
            settings.bucket_bytes,
        )
        self._weight_map, self._source = weight_map, source
        self._dtypes = {4: torch.float32, dtype.itemsize: dtype}
        self._timeout = datetime.timedelta(seconds=settings.timeout_seconds)
        self._rank, self.first_worker = dist.get_rank(), dist.get_world_size()
        self.world_size = self.first_worker + engine.ranks_per_engine
        workers = range(self.first_worker, self.world_size)
        self._buckets = [work.outgoing for work in bucket_work(self.plan, ranks, workers, self._rank)]
        self._buffer = torch.empty(
            max((sum(parcel.num_bytes for parcel in bucket) for bucket in self._buckets), default=0), dtype=torch.uint8
        )
        self._group: Any = None
        self.host = address
        self._store = self._open_store([_order(self.plan, ranks, workers, worker, self._dtypes) for worker in workers])
        self.port = self._store.port

    @property
    def bytes_sent(self) -> int:
        """By this rank each time, digests included."""
        return sum(parcel.num_bytes for bucket in self._buckets for parcel in bucket)

    @property
    def is_joined(self) -> bool:
        """Whether the group stands."""
        return self._group is not None

    def join(self) -> None:
        """Wait until all trainer ranks and workers are in the group; once they are, nothing.

        Raises:
            TransferError: some did not come within the time-out.
        """
        if self.is_joined:
            return
        try:
            self._group = ProcessGroupGloo(PrefixStore("slices", self._store), self._rank, self.world_size, self._timeout)
        except RuntimeError as error:
            raise TransferError(f"rank {self._rank} did not meet the engine's workers: {first_line(error)}") from error

    @torch.no_grad()
    def send(self) -> None:
        """Send the weights as they are now; every trainer rank calls this while the workers receive.

        Raises:
            TransferError: a worker died or was too slow.
        """
        chunks, layout = self._source
        held = flat_parts(global_parameters(chunks, self._weight_map, layout))
        for number, bucket in enumerate(self._buckets):
            sending = []
            for parcel in bucket:
                self._pack(parcel, held)
                try:
                    sending.append((parcel, self._group.send([parcel.bytes_of(self._buffer)], parcel.peer, number)))
                except RuntimeError as error:
                    raise self._failure(parcel, error) from error
            for parcel, work in sending:
                try:
                    work.wait(self._timeout)
                except RuntimeError as error:
                    raise self._failure(parcel, error) from error

    def _pack(self, parcel: Parcel, held: dict[str, FlatPart]) -> None:
        values = [
            held[copy.source_parameter].region(copy.source).to("cpu", self._dtypes[_element_size(copy)]) for copy in parcel.copies
        ]
        torch._foreach_copy_(parcel.staged(self._buffer, values), values)
        words = parcel.bytes_of(self._buffer).view(torch.int64)
        words[-1] = digest(words[:-1])

    def _failure(self, parcel: Parcel, error: RuntimeError) -> TransferError:
        return TransferError(
            f"rank {self._rank} could not send {parcel} to worker {parcel.peer - self.first_worker} of the engine within "
            f"{self._timeout.total_seconds():g} s: {first_line(error)}"
        )

    def _open_store(self, orders: list[dict[str, Any]]) -> TCPStore:
        """The group's store, served by rank 0."""
        port = [0]
        store = None
        if self._rank == 0:
            store = TCPStore(self.host, 0, self.world_size, is_master=True, timeout=self._timeout, wait_for_workers=False)
            for worker, order in enumerate(orders, self.first_worker):
                store.set(f"order/{worker}", json.dumps(order))
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        return store or TCPStore(self.host, port[0], self.world_size, is_master=False, timeout=self._timeout)


def _element_size(copy: Copy) -> int:
    rows, columns = copy.source
    return copy.num_bytes // ((rows.stop - rows.start) * (columns.stop - columns.start))


def _order(plan: Plan, ranks: Sequence[int], workers: Sequence[int], worker: int, dtypes: dict[int, torch.dtype]) -> dict[str, Any]:
    """What a worker will get in each update, as its receiver reads it."""
    shapes = dict(zip(plan.destination.parameters, plan.destination.shapes, strict=True))
    numbers: dict[str, int] = {}
    parameters: list[list[Any]] = []
    buckets: list[list[dict[str, Any]]] = []
    for work in bucket_work(plan, ranks, workers, worker):
        parcels = []
        for parcel in work.incoming:
            copies = []
            for copy, offset in zip(parcel.copies, parcel.offsets, strict=True):
                name, (rows, columns) = copy.destination_parameter, copy.destination
                if name not in numbers:
                    numbers[name] = len(parameters)
                    dtype = str(dtypes[_element_size(copy)]).removeprefix("torch.")
                    parameters.append([name, shapes[name], dtype, 0])
                parameters[numbers[name]][-1] += copy.num_bytes
                copies.append(
                    (numbers[name], rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start, offset)
                )
            described = {"sender": parcel.peer, "bytes": parcel.num_bytes, "tensor": parcel.copies[0].tensor, "copies": copies}
            parcels.append(described)
        buckets.append(parcels)
    return {"parameters": parameters, "buckets": buckets}
