"""Which transport brings the weights from trainer ranks to an engine's workers, by where these processes are."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.errors import ConfigError

PREFERENCE = ("cuda_ipc", "nccl", "shared_memory", "gloo")  # of auto: the first that is possible
SHARED = ("cuda_ipc", "shared_memory")  # a worker reads its packed messages in memory that a trainer rank has written


@dataclass(frozen=True, slots=True)
class Location:
    """Where a process is. The workers' are made by engines/plugin/megarl_slice_sources.py.

    Attributes:
        host: the machine since it was started, and the process namespace (a container's own, if it has one) in it.
        gpu: UUID of its GPU, which ``CUDA_VISIBLE_DEVICES`` does not change; None on CPU.
    """

    host: str
    gpu: str | None


def own_location(device: torch.device) -> Location:
    """Return the location of this process, which keeps its weights on ``device``."""
    host = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return Location(host, str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)


def shared_memory_of(location: Location, transport: str) -> tuple[str, ...]:
    """Return what two processes must have in common to share memory by a transport of ``SHARED``."""
    return (location.host, location.gpu or "") if transport == "cuda_ipc" else (location.host,)


def choose_transport(asked: str, ranks: Sequence[Location], workers: Sequence[Location]) -> str:
    """Choose the transport of ``rollout.weight_transfer.transport``; for auto the first of ``PREFERENCE`` that is possible.

    Raises:
        ConfigError: the one that was asked for is impossible.
    """
    if asked == "auto":
        return next(transport for transport in PREFERENCE if not _obstacle(transport, ranks, workers))
    if obstacle := _obstacle(asked, ranks, workers):
        raise ConfigError(f"rollout.weight_transfer.transport {asked} is impossible: {obstacle}; use auto")
    return asked


def _obstacle(transport: str, ranks: Sequence[Location], workers: Sequence[Location]) -> str:
    """Return why a transport is impossible; empty when it is possible."""
    named = [(f"trainer rank {number}", location) for number, location in enumerate(ranks)]
    named += [(f"the engine's worker {number}", location) for number, location in enumerate(workers)]
    if transport in ("nccl", "cuda_ipc"):
        without = [name for name, location in named if location.gpu is None]
        if without:
            return f"{without[0]} has no GPU"
    if transport == "nccl":
        users: dict[str | None, str] = {}
        for name, location in named:
            if location.gpu in users:
                return f"{users[location.gpu]} and {name} share GPU {location.gpu}, of which NCCL takes only one into a group"
            users[location.gpu] = name
    if transport in SHARED:
        shared = {shared_memory_of(location, transport) for location in ranks}
        for name, location in named[len(ranks) :]:
            if shared_memory_of(location, transport) not in shared:
                if transport == "cuda_ipc":
                    return f"{name} is on GPU {location.gpu}, which no trainer rank of its machine and container uses"
                return f"{name} is on a machine, or in a container, where no trainer rank is"
    return ""
