"""Sends weights from the trainer's rank 0 to every worker of an engine over a stand-alone gloo group."""

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo

from megarl.sockets import serve_store

BUCKET_BYTES = 64 << 20  # the receiver cuts broadcasts at the same number
ALIGNMENT = 16  # bytes; a view of a buffer as another dtype must start at a multiple of its item size


class WeightSender:
    """Rank 0 of a group of its own, independent of the trainer's default process group.

    Everything blocks; run it in a thread. Messages: header length (int64), JSON header (uint8), then the header's number of
    bytes in broadcasts of at most BUCKET_BYTES. The header's digest, the sum of the bytes as int64 numbers (wrapping), tells the
    receiver that these are the bytes meant.
    """

    def __init__(self, host: str, num_workers: int, timeout: float) -> None:
        """Open the store that the workers find the group by; ``port`` is then known. ``timeout`` is in seconds."""
        self.world_size = 1 + num_workers
        self._timeout = timedelta(seconds=timeout)
        self._store = serve_store(host, 0, self.world_size, self._timeout)
        self.host = host
        self.port: int = self._store.port
        self._group: Any = None

    def join(self) -> None:
        """Wait until every worker has joined; RuntimeError (torch's) after the time-out."""
        self._group = ProcessGroupGloo(PrefixStore("weights", self._store), 0, self.world_size, self._timeout)

    def send_bucket(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Send tensors that together, or alone when there is only one, make one message."""
        tensors, start = [], 0
        for name, tensor in bucket:
            end = start + tensor.numel() * tensor.element_size()
            tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), start, end))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        flat = torch.empty(start, dtype=torch.uint8)
        for (_, tensor), (_, _, _, begin, end) in zip(bucket, tensors, strict=True):
            flat[begin:end] = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        digest = int(flat.view(torch.int64).sum())
        self._send_header({"kind": "tensors", "bytes": start, "tensors": tensors, "digest": digest})
        for chunk in flat.split(BUCKET_BYTES):
            self._broadcast(chunk)

    def send_end(self) -> None:
        """Tell the workers that the set is whole."""
        self._send_header({"kind": "end"})

    def send_abort(self, reason: str) -> None:
        """Tell the workers that the rest will not come."""
        self._send_header({"kind": "abort", "reason": reason})

    def _send_header(self, header: dict[str, object]) -> None:
        encoded = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([encoded.numel()]))
        self._broadcast(encoded)

    def _broadcast(self, tensor: Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()


def in_buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterable[list[tuple[str, Tensor]]]:
    """Group consecutive tensors up to BUCKET_BYTES; a larger one is alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if bucket and size + tensor_bytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor_bytes
    if bucket:
        yield bucket
