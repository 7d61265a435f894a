"""Receives weights from the trainer; the other end is megarl/engines/weight_sender.py.

Runs in the workers of an engine, in the engine's own environment: imports only the standard library and torch.
"""

import json
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

CHUNK_BYTES = 64 << 20  # the same number as the sender's


class WeightReceiver:
    """One worker of the sender's group."""

    def __init__(self, host: str, port: int, world_size: int, rank: int, timeout: float) -> None:
        """Join the group; block until all have. ``timeout`` is in seconds, also for every message."""
        limit = timedelta(seconds=timeout)
        store = TCPStore(host, port, world_size, is_master=False, timeout=limit)
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, limit)
        self.held: dict[str, Tensor] = {}  # tensors that the engine can load only together with one of a later message

    def receive(self) -> list[tuple[str, Tensor]] | None:
        """Receive the next tensors, on CPU; None when the set is whole.

        Raises:
            RuntimeError: the sender gave up, or the bytes are not those that it sent.
        """
        length = torch.empty(1, dtype=torch.int64)
        self._broadcast(length)
        encoded = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(encoded)
        header = json.loads(encoded.numpy().tobytes())
        if header["kind"] == "end":
            return None
        if header["kind"] == "abort":
            raise RuntimeError(f"the trainer gave the update up: {header['reason']}")
        flat = torch.empty(header["bytes"], dtype=torch.uint8)
        for chunk in flat.split(CHUNK_BYTES):
            self._broadcast(chunk)
        digest = int(flat.view(torch.int64).sum())
        if digest != header["digest"]:
            raise RuntimeError(f"weights arrived with digest {digest}, sent was {header['digest']}")
        return [
            (name, flat[start:end].view(getattr(torch, dtype)).view(shape)) for name, dtype, shape, start, end in header["tensors"]
        ]

    def _broadcast(self, tensor: Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()
