"""The transport that auto takes for ranks and workers at made-up places, and what is said of one that cannot be."""

import pytest
import torch

from megarl.config.schema import Config
from megarl.errors import ConfigError
from megarl.loop.weight_sync import check_transport
from megarl.reshard.transport_choice import Location, choose_transport


def locations(text: str) -> list[Location]:
    """``host:gpu`` of each process; a host alone is a process on CPU."""
    return [Location(host, gpu or None) for host, _, gpu in (name.partition(":") for name in text.split())]


@pytest.mark.parametrize(
    ("ranks", "workers", "expected"),
    [
        ("a a", "a", "shared_memory"),
        ("a b", "b b", "shared_memory"),
        ("a a", "b", "gloo"),
        ("a b", "b c", "gloo"),
        ("a:0 a:1", "a:1", "cuda_ipc"),
        ("a:0 a:1 b:2", "b:2 a:0", "cuda_ipc"),
        ("a:0 a:1", "a:2 a:3", "nccl"),
        ("a:0 a:1", "b:4", "nccl"),
        ("a:0 a:1", "a:1 a:2", "shared_memory"),
        ("a:0 a:1", "a:1 b:4", "gloo"),
        ("a:0 a:1", "a:2 a:2", "shared_memory"),  # two workers on one GPU
        ("a:0 a:1", "a2:1", "gloo"),  # the same GPU in another container
        ("a:0 a:1", "a", "shared_memory"),  # an engine on CPU
        ("a", "a:0", "shared_memory"),
        ("a", "b:0", "gloo"),
    ],
)
def test_auto(ranks: str, workers: str, expected: str) -> None:
    assert choose_transport("auto", locations(ranks), locations(workers)) == expected
    assert choose_transport(expected, locations(ranks), locations(workers)) == expected
    assert choose_transport("gloo", locations(ranks), locations(workers)) == "gloo"


@pytest.mark.parametrize(
    ("asked", "ranks", "workers", "reason"),
    [
        ("nccl", "a:0 a", "a:1", "trainer rank 1 has no GPU"),
        ("nccl", "a:0", "b", "the engine's worker 0 has no GPU"),
        (
            "nccl",
            "a:0 a:1",
            "a:2 a:1",
            "trainer rank 1 and the engine's worker 1 share GPU 1, of which NCCL takes only one into a group",
        ),
        ("cuda_ipc", "a", "a:1", "trainer rank 0 has no GPU"),
        ("cuda_ipc", "a:0", "b:4", "the engine's worker 0 is on GPU 4, which no trainer rank of its machine and container uses"),
        ("cuda_ipc", "a:0", "a2:0", "the engine's worker 0 is on GPU 0, which no trainer rank of its machine and container uses"),
        ("shared_memory", "a", "a b", "the engine's worker 1 is on a machine, or in a container, where no trainer rank is"),
    ],
)
def test_an_impossible_one_is_refused(asked: str, ranks: str, workers: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose_transport(asked, locations(ranks), locations(workers))
    assert str(refusal.value) == f"rollout.weight_transfer.transport {asked} is impossible: {reason}; use auto"


@pytest.mark.parametrize("transport", ["auto", "gloo", "shared_memory", "nccl", "cuda_ipc"])
def test_gpus_that_are_not_there_are_missed_before_an_engine_starts(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rollout = {"engine": "vllm", "weight_transfer": {"transport": transport}}
    data = {"train": {"type": "reasoning_gym", "task": "chain_sum"}}
    config = Config.model_validate({"kind": "rl", "steps": 1, "model": {"path": "absent"}, "data": data, "rollout": rollout})
    if transport not in ("nccl", "cuda_ipc"):
        check_transport(config)
        return
    with pytest.raises(ConfigError, match=rf"transport: {transport} goes between GPUs, and training has none; use auto"):
        check_transport(config)
