"""Which transport brings the weights from trainer ranks to an engine's workers, by where these processes are."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.errors import ConfigError

PREFERENCE = ("cuda_ipc", "nccl", "shared_memory", "gloo")  # of auto: the first that is possible
SHARED = ("cuda_ipc", "shared_memory")  # a worker reads its parcels in memory that a trainer rank has written


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is. The workers' are made by rollout/engine_plugin/megarl_slice_sources.py.

    Attributes:
        host: the machine since it was started, and the process namespace (a container's own, if it has one) in it.
        gpu: UUID of its GPU, which ``CUDA_VISIBLE_DEVICES`` does not change; None on CPU.
    """

    host: str
    gpu: str | None


def own_place(device: torch.device) -> Place:
    """Of this process, which keeps its weights on ``device``."""
    host = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return Place(host, str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)


def memory_of(place: Place, transport: str) -> tuple[str, ...]:
    """What two processes must have in common to share memory by a transport of ``SHARED``."""
    return (place.host, place.gpu or "") if transport == "cuda_ipc" else (place.host,)


def choose_transport(asked: str, ranks: Sequence[Place], workers: Sequence[Place]) -> str:
    """The transport of ``rollout.weight_transfer.transport``; for auto the first of ``PREFERENCE`` that is possible.

    Raises:
        ConfigError: the one that was asked for is impossible.
    """
    if asked == "auto":
        return next(transport for transport in PREFERENCE if not _obstacle(transport, ranks, workers))
    if obstacle := _obstacle(asked, ranks, workers):
        raise ConfigError(f"rollout.weight_transfer.transport {asked} is impossible: {obstacle}; use auto")
    return asked


def _obstacle(transport: str, ranks: Sequence[Place], workers: Sequence[Place]) -> str:
    """Why a transport is impossible; empty when it is possible."""
    named = [(f"trainer rank {number}", place) for number, place in enumerate(ranks)]
    named += [(f"the engine's worker {number}", place) for number, place in enumerate(workers)]
    if transport in ("nccl", "cuda_ipc"):
        without = [name for name, place in named if place.gpu is None]
        if without:
            return f"{without[0]} has no GPU"
    if transport == "nccl":
        users: dict[str | None, str] = {}
        for name, place in named:
            if place.gpu in users:
                return f"{users[place.gpu]} and {name} share GPU {place.gpu}, of which NCCL takes only one into a group"
            users[place.gpu] = name
    if transport in SHARED:
        shared = {memory_of(place, transport) for place in ranks}
        for name, place in named[len(ranks) :]:
            if memory_of(place, transport) not in shared:
                if transport == "cuda_ipc":
                    return f"{name} is on GPU {place.gpu}, which no trainer rank of its machine and container uses"
                return f"{name} is on a machine, or in a container, where no trainer rank is"
    return ""
