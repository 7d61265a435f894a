"""Receives a worker's own slices of new weights from the trainer's ranks; the other end is megarl/reshard/engine_transfer.py.

Runs in the workers of an engine, in the engine's own environment: imports only the standard library and torch.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import prod
from typing import Protocol

import torch
from megarl_slice_sources import PackedMessage, described, join, own_location
from torch import Tensor
from torch.distributed import TCPStore

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Parameters(Protocol):
    """The engine's parameters, as slices are written into them."""

    def open(self, name: str) -> Tensor:
        """Return the contiguous tensor to write a parameter into; called once in an update, before its first slice."""

    def finish(self, name: str) -> None:
        """Take note that all of the parameter is written."""


class SliceReceiver:
    """One worker in a group with all ranks of the trainer, which told it once what it will get in each update, and where that goes.

    The trainer's receive plan has ``transport``; ``parameters``, a list of (name, shape, dtype, bytes that come); and ``buckets``,
    each a list of packed messages with their ``sender``, the ``holder`` that they are read from, ``start`` and ``bytes`` there,
    ``tensor`` (the first one in it, for error texts) and ``copies``: (number of the parameter, first row, rows, first column,
    columns, offset in the packed message). A packed message ends with the sum of its bytes as int64 numbers (wrapping). Parameters
    are seen as matrices: [product of the leading dimensions, last one], a vector as one column.
    """

    def __init__(self, host: str, port: int, world_size: int, rank: int, timeout: float, device: torch.device) -> None:
        """Tell the trainer where this worker is and join; blocks until all have.

        Args:
            timeout: seconds, also for every bucket.
            device: of the engine's weights.
        """
        limit = timedelta(seconds=timeout)
        store = TCPStore(host, port, world_size, is_master=False, timeout=limit)
        store.set(f"location/{rank}", json.dumps(own_location(device)))
        receive_plan = json.loads(store.get(f"receive_plan/{rank}"))
        self.parameters: list[tuple[str, list[int], str, int]] = receive_plan["parameters"]
        self._buckets: list[list[PackedMessage]] = receive_plan["buckets"]
        # no transport: the trainer has found none, and says so itself
        self._source = join(store, rank, world_size, receive_plan, device, limit) if receive_plan["transport"] else None

    @torch.no_grad()
    def receive(self, parameters: Parameters) -> None:
        """Fill all parameters.

        Raises:
            RuntimeError: a sender died or was too slow, bytes arrived changed, or a parameter is not what the trainer expects or
                does not hold what came.
        """
        if self._source is None:
            raise RuntimeError("the trainer found no transport to this worker")
        update = _Update(self.parameters, parameters)
        with _one_thread(), self._source.opened():
            for number, bucket in enumerate(self._buckets):
                for packed, data in self._source.arriving(number, bucket):
                    words = data.view(torch.int64)
                    if int(words[:-1].sum()) != int(words[-1]):
                        raise RuntimeError(f"{described(packed, number)} arrived changed")
                    for copy in packed["copies"]:
                        update.write(data, *copy)
        update.check_all_finished()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: more do not copy and sum faster, and those of all workers took three times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Update:
    """What has been written of each parameter. A parameter must end up with the sum of the bits that came, and nothing else."""

    def __init__(self, expected: list[tuple[str, list[int], str, int]], parameters: Parameters) -> None:
        self._expected = expected
        self._parameters = parameters
        self._tensors: dict[int, Tensor] = {}
        self._left = [num_bytes for *_, num_bytes in expected]
        self._sums = [torch.zeros((), dtype=torch.int64)] * len(expected)  # on the device that the values come to

    def write(self, data: Tensor, number: int, row: int, rows: int, column: int, columns: int, offset: int) -> None:
        name, shape, dtype_name, _ = self._expected[number]
        dtype: torch.dtype = getattr(torch, dtype_name)
        num_bytes = rows * columns * dtype.itemsize
        values = data[offset : offset + num_bytes].view(dtype).view(rows, columns)
        if number not in self._tensors:
            self._tensors[number] = self._open(number)
        matrix = self._tensors[number].view(-1, shape[-1] if len(shape) > 1 else 1)
        matrix[row : row + rows, column : column + columns].copy_(values)
        self._sums[number] = self._sums[number].to(values.device) + _sum_of_bits(values)
        self._left[number] -= num_bytes
        if self._left[number] == 0:
            # an engine may keep a parameter in a wider type than it is sent in
            if int(_sum_of_bits(self._tensors.pop(number).to(dtype))) != int(self._sums[number]):
                raise RuntimeError(f"{name} does not hold what was written into it")
            self._parameters.finish(name)

    def check_all_finished(self) -> None:
        unfinished = [self._expected[number][0] for number, left in enumerate(self._left) if left]
        if unfinished:
            raise RuntimeError(f"no or not all values came for {unfinished[:5]} ({len(unfinished)} parameters)")

    def _open(self, number: int) -> Tensor:
        name, shape, dtype_name, num_bytes = self._expected[number]
        tensor = self._parameters.open(name)
        if list(tensor.shape) != shape or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " (not contiguous)"
            raise RuntimeError(f"{name} has the shape {list(tensor.shape)}{layout} in this engine, the trainer's plan says {shape}")
        if num_bytes < prod(shape) * getattr(torch, dtype_name).itemsize:
            tensor.zero_()  # rows that pad a vocabulary do not come
        return tensor


def _sum_of_bits(values: Tensor) -> Tensor:
    return values.view(INTEGERS[values.element_size()]).sum(dtype=torch.int64)
