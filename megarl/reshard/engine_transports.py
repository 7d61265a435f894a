"""What brings packed messages from trainer ranks to an engine's workers: messages of a group, or shared memory.

The workers' ends are in engines/plugin/megarl_slice_sources.py; ``open_handle`` there opens a SharedBuffer.
"""

import datetime
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from megarl.errors import TransferError
from megarl.reshard.barrier import PROBLEMS_SHOWN, first_line
from megarl.reshard.packed_messages import PackedMessage, bucket_work
from megarl.reshard.plan.plan import Plan
from megarl.reshard.receive_plan import end_of, held_messages, holder_of
from megarl.reshard.transport_choice import Location, shared_memory_of

HANDLE_BYTES = 2048  # a handle travels as JSON, filled up with spaces; the receiver's number too
Pack = Callable[[PackedMessage, Tensor], None]  # writes a packed message with its digest into its bytes


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
    def uses_nccl(self) -> bool:
        """Whether packed messages go between GPUs, where they go as messages."""
        return self.device.type == "cuda"

    @property
    def ranks(self) -> range:
        """Trainer ranks in the group."""
        return range(self.plan.source.num_ranks)

    @property
    def workers(self) -> range:
        """Workers in the group."""
        return range(self.plan.source.num_ranks, self.plan.source.num_ranks + self.plan.destination.num_ranks)

    @contextmanager
    def naming(self, *tasks: str) -> Iterator[None]:
        """Make a failure of torch.distributed say what this rank could not do."""
        try:
            yield
        except RuntimeError as error:
            raise TransferError(
                f"rank {self.rank} could not {', '.join(tasks[:PROBLEMS_SHOWN])} within {self.timeout.total_seconds():g} s: "
                f"{first_line(error)}"
            ) from error

    def name(self, member: int) -> str:
        """Name a rank or worker, for messages to people."""
        return f"worker {member - self.workers.start} of the engine" if member in self.workers else f"rank {member}"


class Transport(Protocol):
    """Brings the packed messages of one update to the workers."""

    def send(self, pack: Pack) -> None:
        """Bring all packed messages of this rank; raises TransferError when a worker, or another rank, died or was too slow."""

    def close(self) -> None:
        """End what may still be under way after a failure."""


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes to a peer, or from it; ``task`` is what cannot be done when they do not go."""

    task: str
    data: Tensor
    peer: int
    tag: int
    is_incoming: bool = False


class Messages:
    """Sends and receives of a group of the transfer's own, which a failure may break without harm to the trainer's."""

    def __init__(self, crew: Crew, store: Store, size: int) -> None:
        """Connect the first ``size`` of the crew: gloo's from host memory, NCCL's from GPUs; collective over them."""
        self._crew = crew
        self._is_nccl = crew.uses_nccl
        self._group = _nccl_group(crew, store, size) if self._is_nccl else crew.control

    def exchange(self, moves: Iterable[Move]) -> None:
        """Make all moves at the same time; those of gloo start as they are asked for."""
        if self._is_nccl:
            self._exchange_in_one_batch(list(moves))
            return
        started = []
        for move in moves:
            with self._crew.naming(move.task):
                started.append((move, self._start(move)))
        for move, work in started:
            with self._crew.naming(move.task):
                work.wait(self._crew.timeout)

    def close(self) -> None:
        """Stop kernels that wait for a peer that is gone."""
        if self._is_nccl:
            self._group.abort()

    def _exchange_in_one_batch(self, moves: list[Move]) -> None:
        """Start NCCL's moves together, or they wait for each other."""
        if not moves:
            return
        with self._crew.naming(*[move.task for move in moves]):
            self._group._start_coalescing()
            for move in moves:
                self._start(move)
            self._group._end_coalescing().wait(self._crew.timeout)

    def _start(self, move: Move) -> Any:
        call = self._group.recv if move.is_incoming else self._group.send
        return call([move.data], move.peer, move.tag)


class GroupTransport:
    """Messages of the group of all: gloo from host memory, or NCCL from the memory of GPUs, of which no two processes share one."""

    def __init__(self, crew: Crew, store: Store) -> None:
        """Allocate what the transport needs; collective over the group."""
        self._crew = crew
        self._messages = Messages(crew, store, crew.workers.stop)
        self._buckets = [work.outgoing for work in bucket_work(crew.plan, crew.ranks, crew.workers, crew.rank)]
        size = max((sum(packed.num_bytes for packed in bucket) for bucket in self._buckets), default=0)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=crew.device)

    def send(self, pack: Pack) -> None:
        """Send the packed messages, bucket by bucket."""
        for bucket in self._buckets:
            self._messages.exchange(self._packed(packed, pack) for packed in bucket)

    def close(self) -> None:
        """End what may still be under way after a failure."""
        self._messages.close()

    def _packed(self, packed: PackedMessage, pack: Pack) -> Move:
        data = packed.bytes_of(self._buffer)
        pack(packed, data)
        return Move(f"send {packed} to {self._crew.name(packed.peer)}", data, packed.peer, packed.bucket)


class SharedBuffer:
    """A staging buffer for one reader. On a GPU it is opened by CUDA IPC, else by its file, which has no name to leave behind.

    Attributes:
        data: [num_bytes], uint8. Whoever still uses it keeps the memory.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._file: int | None = None
        if device.type == "cuda":
            self.data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        self._file = os.memfd_create("megarl-weights")
        os.ftruncate(self._file, num_bytes)
        self.data = torch.frombuffer(mmap.mmap(self._file, num_bytes), dtype=torch.uint8)

    def handle(self) -> bytes:
        """Return what one other process opens the buffer with, once: CUDA counts a reader for every handle made."""
        described: dict[str, object]
        if self._file is not None:
            described = {"path": f"/proc/{os.getpid()}/fd/{self._file}", "bytes": self.data.numel()}
        else:
            # (device, memory, bytes, offset, reference counter, its offset, event, whether to wait for the event)
            parts = self.data.untyped_storage()._share_cuda_()
            described = {"cuda": [part.hex() if isinstance(part, bytes) else part for part in parts[1:]]}
        handle = json.dumps(described).encode().ljust(HANDLE_BYTES)
        assert len(handle) == HANDLE_BYTES
        return handle

    def close(self) -> None:
        """Give the memory up, which lives on until its reader has closed it too."""
        del self.data
        if self._file is not None:
            os.close(self._file)
            self._file = None
        else:
            torch.cuda.ipc_collect()


class SharedTransport:
    """Buffers that workers read where a trainer rank has filled them: by CUDA IPC on one GPU, or on one machine.

    A worker reads only in the memory of trainer ranks that share its own. What another rank has for it goes to one of these as a
    message between trainer ranks (which have a GPU each, as NCCL asks), straight into the worker's buffer. A buffer lives for one
    update, and is filled again when its worker has answered that it has read it.
    """

    def __init__(self, crew: Crew, store: Store, locations: Sequence[Location], transport: str) -> None:
        """Collective over the trainer ranks; ``locations``: of all ranks and workers."""
        self._crew = crew
        self._messages = Messages(crew, store, crew.ranks.stop)
        memory = [shared_memory_of(location, transport) for location in locations]
        neighbours = [worker for worker in crew.workers if memory[worker] == memory[crew.rank]]
        held = {worker: held_messages(crew.plan, worker, memory) for worker in neighbours}
        # of the workers that read here, for each bucket what they read
        self._held = {worker: [bucket.get(crew.rank, []) for bucket in buckets] for worker, buckets in held.items()}
        self._held = {worker: buckets for worker, buckets in self._held.items() if any(buckets)}
        work = bucket_work(crew.plan, crew.ranks, crew.workers, crew.rank)
        self._passed_on = [[packed for packed in bucket.outgoing if memory[packed.peer] != memory[crew.rank]] for bucket in work]
        self._holders = {worker: holder_of(crew.plan, worker, memory)(crew.rank) for worker in crew.workers}
        size = max((sum(packed.num_bytes for packed in bucket) for bucket in self._passed_on), default=0)
        self._send_buffer = torch.empty(size, dtype=torch.uint8, device=crew.device)

    def send(self, pack: Pack) -> None:
        """Fill the buffers and have them read, bucket by bucket."""
        crew = self._crew
        with ExitStack() as stack:
            buffers = {}
            for worker, buckets in self._held.items():
                buffer = SharedBuffer(max(map(end_of, buckets)), crew.device)
                stack.callback(buffer.close)
                buffers[worker] = buffer
                handle = torch.frombuffer(bytearray(buffer.handle()), dtype=torch.uint8)
                first = next(bucket[0] for bucket in buckets if bucket)
                with crew.naming(f"share the memory of {first} with {crew.name(worker)}"):
                    crew.control.send([handle], worker, 0).wait(crew.timeout)
            for number in range(crew.plan.num_buckets):
                self._messages.exchange(self._filling(number, {worker: one.data for worker, one in buffers.items()}, pack))
                self._have_read(number)

    def close(self) -> None:
        """End what may still be under way after a failure; every update closes its buffers."""
        self._messages.close()

    def _filling(self, number: int, buffers: dict[int, Tensor], pack: Pack) -> Iterator[Move]:
        """Put this rank's packed messages, and those that others have for its neighbours, into the neighbours' buffers."""
        crew, start = self._crew, 0
        for worker, buffer in buffers.items():
            for packed in self._held[worker][number]:
                if packed.peer == crew.rank:
                    pack(packed, packed.bytes_of(buffer))
                else:
                    task = f"receive {packed} for {crew.name(worker)} from rank {packed.peer}"
                    yield Move(task, packed.bytes_of(buffer), packed.peer, worker, is_incoming=True)
        for packed in self._passed_on[number]:
            data = self._send_buffer[start : start + packed.num_bytes]
            start += packed.num_bytes
            pack(packed, data)
            holder = self._holders[packed.peer]
            yield Move(f"send {packed} for {crew.name(packed.peer)} to rank {holder}", data, holder, packed.peer)

    def _have_read(self, number: int) -> None:
        """Tell the neighbours that the bucket is there, and wait until they have read it."""
        crew = self._crew
        if crew.device.type == "cuda":
            torch.cuda.synchronize(crew.device)  # what was packed and received is in the memory
        handed = []
        for worker, buckets in self._held.items():
            for packed in buckets[number][:1]:
                word, answer = torch.zeros(2, 1, dtype=torch.int64)
                with crew.naming(f"hand {packed} to {crew.name(worker)}"):
                    telling = crew.control.send([word], worker, number + 1)
                    handed.append((packed, worker, telling, crew.control.recv([answer], worker, number + 1)))
        for packed, worker, telling, hearing in handed:
            with crew.naming(f"hand {packed} to {crew.name(worker)}"):
                telling.wait(crew.timeout)
            with crew.naming(f"hear that {crew.name(worker)} has read {packed}"):
                hearing.wait(crew.timeout)


def _nccl_group(crew: Crew, store: Store, size: int) -> Any:
    """Form a group of the first ``size`` of the crew; collective over them."""
    from torch.distributed import ProcessGroupNCCL  # not in every build of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * crew.timeout  # of its watchdog; what waits here comes first
    # Else the watchdog ends this process when a worker dies. A group reads it when it is made; there is no other way to say it.
    before = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"  # clean up only
    try:
        group: Any = ProcessGroupNCCL(PrefixStore("nccl", store), crew.rank, size, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
        else:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = before
    # one communicator: messages alone would make one for each pair
    group.allreduce([torch.zeros(1, device=crew.device)]).wait(crew.timeout)
    return group
