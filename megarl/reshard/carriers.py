"""What brings packed parcels from trainer ranks to an engine's workers: messages of a group, or memory that both sides share.

The workers' ends are in rollout/engine_plugin/megarl_slice_sources.py.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from megarl.errors import TransferError
from megarl.reshard.meeting import PROBLEMS_SHOWN, first_line
from megarl.reshard.parcels import Parcel, bucket_work
from megarl.reshard.plan import Plan
from megarl.reshard.routes import end_of, held_parcels, holder_of
from megarl.reshard.shared_buffer import SharedBuffer
from megarl.reshard.transport_choice import Place, memory_of

Pack = Callable[[Parcel, Tensor], None]  # writes a parcel with its digest into its bytes


@dataclass(frozen=True, slots=True)
class Crew:
    """All who take part in a transfer, as one of its trainer ranks sees them.

    Attributes:
        plan: the ranks of its source side are the trainer's world, those of its destination side the workers.
        rank: this one's, in the world and in the group.
        control: gloo group of all trainer ranks and, after them, all workers.
        device: of the staging buffers.
        timeout: of each bucket.
    """

    plan: Plan
    rank: int
    control: Any
    device: torch.device
    timeout: datetime.timedelta

    @property
    def ranks(self) -> range:
        """Trainer ranks in the group."""
        return range(self.plan.source.num_ranks)

    @property
    def workers(self) -> range:
        """Workers in the group."""
        return range(self.plan.source.num_ranks, self.plan.source.num_ranks + self.plan.destination.num_ranks)

    @contextmanager
    def naming(self, task: str, parcels: Sequence[Parcel]) -> Iterator[None]:
        """Make a failure of torch.distributed say what this rank could not do; ``task`` takes the rank that a parcel names."""
        try:
            yield
        except RuntimeError as error:
            moves = ", ".join(task.format(parcel=parcel, peer=self._name(parcel.peer)) for parcel in parcels[:PROBLEMS_SHOWN])
            raise TransferError(
                f"rank {self.rank} could not {moves} within {self.timeout.total_seconds():g} s: {first_line(error)}"
            ) from error

    def _name(self, peer: int) -> str:
        return f"worker {peer - self.workers.start} of the engine" if peer in self.workers else f"rank {peer}"


class Carrier(Protocol):
    """Brings the parcels of one update to the workers."""

    def carry(self, pack: Pack) -> None:
        """Bring all parcels of this rank; raises TransferError when a worker, or another rank, died or was too slow."""

    def close(self) -> None:
        """End what may still be under way after a failure."""


class GroupCarrier:
    """Messages of the group of all: gloo from host memory, or NCCL from the memory of GPUs, of which no two processes share one."""

    def __init__(self, crew: Crew, store: Store, transport: str) -> None:
        """Collective over the group."""
        self._crew = crew
        self._nccl = _nccl_group(crew, store) if transport == "nccl" else None
        self._buckets = [work.outgoing for work in bucket_work(crew.plan, crew.ranks, crew.workers, crew.rank)]
        size = max((sum(parcel.num_bytes for parcel in bucket) for bucket in self._buckets), default=0)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=crew.device)

    def carry(self, pack: Pack) -> None:
        """Send the parcels, bucket by bucket."""
        for number, bucket in enumerate(self._buckets):
            if self._nccl is None:
                self._send(number, bucket, pack)
            elif bucket:
                self._send_in_one_batch(self._nccl, number, bucket, pack)

    def close(self) -> None:
        """Stop kernels that wait for a worker that is gone."""
        if self._nccl is not None:
            self._nccl.abort()

    def _send(self, number: int, bucket: list[Parcel], pack: Pack) -> None:
        crew, sending = self._crew, []
        for parcel in bucket:
            pack(parcel, parcel.bytes_of(self._buffer))
            with crew.naming("send {parcel} to {peer}", [parcel]):
                sending.append((parcel, crew.control.send([parcel.bytes_of(self._buffer)], parcel.peer, number)))
        for parcel, work in sending:
            with crew.naming("send {parcel} to {peer}", [parcel]):
                work.wait(crew.timeout)

    def _send_in_one_batch(self, group: Any, number: int, bucket: list[Parcel], pack: Pack) -> None:
        for parcel in bucket:
            pack(parcel, parcel.bytes_of(self._buffer))
        with self._crew.naming("send {parcel} to {peer}", bucket):  # started one by one, they would wait for each other
            group._start_coalescing()
            for parcel in bucket:
                group.send([parcel.bytes_of(self._buffer)], parcel.peer, number)
            group._end_coalescing().wait(self._crew.timeout)


class SharedCarrier:
    """Buffers that workers read where a trainer rank has filled them: by CUDA IPC on one GPU, or on one machine.

    A worker reads only in the memory of trainer ranks that share its own. What another rank has for it goes to one of these over
    the trainer's own process group (in which every GPU is once, as NCCL asks), straight into the worker's buffer. A buffer lives
    for one update, and is filled again when its worker has answered that it has read it.
    """

    def __init__(self, crew: Crew, places: Sequence[Place], transport: str) -> None:
        """``places``: of all ranks and workers."""
        self._crew = crew
        memory = [memory_of(place, transport) for place in places]
        neighbours = [worker for worker in crew.workers if memory[worker] == memory[crew.rank]]
        held = {worker: held_parcels(crew.plan, worker, memory) for worker in neighbours}
        self._held = {worker: [bucket.get(crew.rank, []) for bucket in buckets] for worker, buckets in held.items()}
        self._sizes = {worker: max(map(end_of, buckets), default=0) for worker, buckets in self._held.items()}
        self._sizes = {worker: size for worker, size in self._sizes.items() if size}
        work = bucket_work(crew.plan, crew.ranks, crew.workers, crew.rank)
        self._passed_on = [[parcel for parcel in bucket.outgoing if memory[parcel.peer] != memory[crew.rank]] for bucket in work]
        self._holders = {worker: holder_of(crew.plan, worker, memory) for worker in crew.workers}
        self._send_buffer = torch.empty(
            max((sum(p.num_bytes for p in bucket) for bucket in self._passed_on), default=0), dtype=torch.uint8, device=crew.device
        )

    def carry(self, pack: Pack) -> None:
        """Fill the buffers and have them read, bucket by bucket."""
        with ExitStack() as stack:
            buffers = {worker: SharedBuffer(size, self._crew.device) for worker, size in self._sizes.items()}
            for buffer in buffers.values():
                stack.callback(buffer.close)
            for worker, buffer in buffers.items():
                handle = torch.frombuffer(bytearray(buffer.handle()), dtype=torch.uint8)
                first = next(bucket[0] for bucket in self._held[worker] if bucket)
                with self._crew.naming("share the memory of {parcel}", [first]):
                    self._crew.control.send([handle], worker, 0).wait(self._crew.timeout)
            for number in range(self._crew.plan.num_buckets):
                self._fill(number, {worker: buffer.data for worker, buffer in buffers.items()}, pack)
                self._have_read(number)

    def close(self) -> None:
        """Nothing is under way: every update closes its buffers."""

    def _fill(self, number: int, buffers: dict[int, Tensor], pack: Pack) -> None:
        """Put this rank's parcels, and those that others have for its neighbours, into the neighbours' buffers."""
        crew, operations = self._crew, []
        for worker, buffer in buffers.items():
            for parcel in self._held[worker][number]:
                if parcel.peer == crew.rank:
                    pack(parcel, parcel.bytes_of(buffer))
                else:
                    receiving = dist.P2POp(dist.irecv, parcel.bytes_of(buffer), parcel.peer, tag=worker)
                    operations.append((receiving, "receive {parcel} from {peer}", parcel))
        start = 0
        for parcel in self._passed_on[number]:
            data = self._send_buffer[start : start + parcel.num_bytes]
            start += parcel.num_bytes
            pack(parcel, data)
            holder = self._holders[parcel.peer](crew.rank)
            sending = dist.P2POp(dist.isend, data, holder, tag=parcel.peer)
            operations.append((sending, f"send {{parcel}} for {{peer}} to rank {holder}", parcel))
        # NCCL's must be started together, or they wait for each other
        batches = [operations] if crew.device.type == "cuda" and operations else [[operation] for operation in operations]
        works = []
        for batch in batches:
            task, parcels = batch[0][1], [parcel for _, _, parcel in batch]
            with crew.naming(task, parcels):
                works += [(work, task, parcels) for work in dist.batch_isend_irecv([operation for operation, _, _ in batch])]
        for work, task, parcels in works:
            with crew.naming(task, parcels):
                work.wait(crew.timeout)

    def _have_read(self, number: int) -> None:
        """Tell the neighbours that the bucket is there, and wait until they have read it."""
        crew = self._crew
        if crew.device.type == "cuda":
            torch.cuda.synchronize(crew.device)  # what was packed and received is in the memory
        handed = []
        for worker, buckets in self._held.items():
            for parcel in buckets[number][:1]:
                word, answer = torch.zeros(2, 1, dtype=torch.int64)
                named = replace(parcel, peer=worker)
                with crew.naming("hand {parcel} to {peer}", [named]):
                    telling = crew.control.send([word], worker, number + 1)
                    handed.append((named, telling, crew.control.recv([answer], worker, number + 1)))
        for named, telling, hearing in handed:
            with crew.naming("hand {parcel} to {peer}", [named]):
                telling.wait(crew.timeout)
            with crew.naming("hear that {peer} has read {parcel}", [named]):
                hearing.wait(crew.timeout)


def _nccl_group(crew: Crew, store: Store) -> Any:
    """All trainer ranks and workers; collective over them."""
    from torch.distributed import ProcessGroupNCCL  # not in every build of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * crew.timeout  # of its watchdog; what waits here comes first
    # Else the watchdog ends this process when a worker dies. A group reads it when it is made; there is no other way to say it.
    before = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"  # clean up only
    try:
        group: Any = ProcessGroupNCCL(PrefixStore("nccl", store), crew.rank, crew.workers.stop, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        else:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = before
    # the communicator of all: messages alone would each make one of two ranks
    group.allreduce([torch.zeros(1, device=crew.device)]).wait(crew.timeout)
    return group
