"""Where a worker gets its packed messages from: messages of a group, or memory that it shares with a trainer rank.

Runs in the workers of an engine, in the engine's own environment: imports only the standard library and torch. The other ends are
megarl/reshard/engine_transports.py and transport_choice.py.
"""

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

HANDLE_BYTES = 2048  # the same number as the sender's
PackedMessage = dict[str, Any]  # a part of a worker's receive plan


class SliceSource(Protocol):
    """What brings a worker's packed messages, of which each has ``bytes`` from ``start`` on in the memory that it is read from."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the source around an update."""

    def arriving(self, number: int, bucket: list[PackedMessage]) -> Iterator[tuple[PackedMessage, Tensor]]:
        """Yield the packed messages of a bucket and their bytes, which are valid until the next one is asked for."""


def own_location(device: torch.device) -> dict[str, str | None]:
    """Return where this process is: the machine since it was started with the process namespace in it, and the UUID of the GPU."""
    host = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return {"host": host, "gpu": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None}


def described(packed: PackedMessage, number: int) -> str:
    """Describe a packed message of bucket ``number``, for messages to people."""
    return f"bucket {number} ({packed['tensor']} …) from trainer rank {packed['sender']}"


class GroupSource:
    """Messages from all trainer ranks: by gloo into host memory, or by NCCL into the memory of the GPU."""

    def __init__(
        self, group: Any, transport: str, buckets: list[list[PackedMessage]], device: torch.device, timeout: timedelta
    ) -> None:
        self._group, self._in_one_batch, self._timeout = group, transport == "nccl", timeout
        size = max(packed["start"] + packed["bytes"] for bucket in buckets for packed in bucket)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device if transport == "nccl" else None)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Do nothing: the buffer stays."""
        yield

    def arriving(self, number: int, bucket: list[PackedMessage]) -> Iterator[tuple[PackedMessage, Tensor]]:
        """Ask for all of a bucket's messages at once."""
        views = [(packed, self._buffer[packed["start"] : packed["start"] + packed["bytes"]]) for packed in bucket]
        works = []
        if self._in_one_batch and bucket:  # NCCL's must be started together, or they wait for each other
            with _naming(bucket[0], number, self._timeout):
                self._group._start_coalescing()
                for packed, data in views:
                    self._group.recv([data], packed["sender"], number)
                self._group._end_coalescing().wait(self._timeout)
            yield from views
            return
        for packed, data in views:
            with _naming(packed, number, self._timeout):
                works.append(self._group.recv([data], packed["sender"], number))
        for (packed, data), work in zip(views, works, strict=True):
            with _naming(packed, number, self._timeout):
                work.wait(self._timeout)
            yield packed, data


class SharedSource:
    """Memory that trainer ranks on this machine, or on this GPU, fill: a packed message is read where its ``holder`` has put it.

    Over a gloo group a holder sends the handle of its buffer at the start of every update, then for each bucket a word when it is
    filled; the answer, that all of it is read, lets it be filled again. After an update nothing is held open.
    """

    def __init__(self, group: Any, buckets: list[list[PackedMessage]], device: torch.device, timeout: timedelta) -> None:
        self._group, self._device, self._timeout = group, device, timeout
        first_uses = [(packed["holder"], packed, number) for number, bucket in enumerate(buckets) for packed in bucket]
        self._first_uses = {holder: (packed, number) for holder, packed, number in reversed(first_uses)}
        self._buffers: dict[int, Tensor] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the buffers of all holders."""
        try:
            for holder, (packed, number) in sorted(self._first_uses.items()):
                handle = torch.empty(HANDLE_BYTES, dtype=torch.uint8)
                with _naming(packed, number, self._timeout):
                    self._group.recv([handle], holder, 0).wait(self._timeout)
                    self._buffers[holder] = open_handle(json.loads(handle.numpy().tobytes()), self._device)
            yield
        finally:
            self._buffers.clear()

    def arriving(self, number: int, bucket: list[PackedMessage]) -> Iterator[tuple[PackedMessage, Tensor]]:
        """Yield the messages of one holder after those of another."""
        for holder, group in groupby(bucket, key=lambda packed: packed["holder"]):
            packed_messages, word = list(group), torch.zeros(1, dtype=torch.int64)
            with _naming(packed_messages[0], number, self._timeout):
                self._group.recv([word], holder, number + 1).wait(self._timeout)
            for packed in packed_messages:
                yield packed, self._buffers[holder][packed["start"] : packed["start"] + packed["bytes"]]
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the copies out of the buffer are done
            with _naming(packed_messages[0], number, self._timeout):
                self._group.send([word], holder, number + 1).wait(self._timeout)


def open_handle(handle: dict[str, Any], device: torch.device) -> Tensor:
    """Open the memory of a trainer's ``SharedBuffer``, [bytes], uint8, until the last tensor on it is gone."""
    if "path" in handle:
        with open(handle["path"], "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), handle["bytes"]), dtype=torch.uint8)
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle["cuda"]]
    # the number of the GPU is this process's own: CUDA_VISIBLE_DEVICES may be another than the trainer's
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def join(
    store: Store, rank: int, world_size: int, receive_plan: dict[str, Any], device: torch.device, timeout: timedelta
) -> SliceSource:
    """Join the group that the receive plan asks for; block until all have."""
    transport, buckets = receive_plan["transport"], receive_plan["buckets"]
    group: Any = ProcessGroupGloo(PrefixStore("slices", store), rank, world_size, timeout)
    if transport in ("cuda_ipc", "shared_memory"):
        return SharedSource(group, buckets, device, timeout)
    if transport == "nccl":
        group = _nccl_group(store, rank, world_size, device, timeout)
    return GroupSource(group, transport, buckets, device, timeout)


def _nccl_group(store: Store, rank: int, world_size: int, device: torch.device, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL  # not in every build of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # of its watchdog, which ends the process; what waits here comes first
    group: Any = ProcessGroupNCCL(PrefixStore("nccl", store), rank, world_size, options)
    # the communicator of all: messages alone would each make one of two ranks
    group.allreduce([torch.zeros(1, device=device)]).wait(timeout)
    return group


@contextmanager
def _naming(packed: PackedMessage, number: int, timeout: timedelta) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{described(packed, number)} did not come within {timeout.total_seconds():g} s: "
            f"{str(error).splitlines()[0].split(' This is typically')[0]}"
        ) from error
