"""Weights over a real gloo group into the receiver that runs in engines, one thread for each worker."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine_plugin import load_plugin
from megarl.engines.server_launch import PLUGIN_FOLDER
from megarl.engines.weight_sender import BUCKET_BYTES, WeightSender, in_buckets

WeightReceiver = load_plugin("megarl_weight_receiver").WeightReceiver


def receive(rank: int, port: int) -> dict[str, Tensor]:
    receiver = WeightReceiver("127.0.0.1", port, 3, 1 + rank, 20.0)
    received: dict[str, Tensor] = {}
    while (tensors := receiver.receive()) is not None:
        received |= dict(tensors)
    return received


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"norm": (7,), "scalar": (), "odd": (3, 5, 1), "larger than a bucket": (BUCKET_BYTES // 4 + 1001,), "last": (4, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    tensors["odd"] = tensors["odd"].bfloat16()
    tensors["transposed"] = torch.randn(6, 2, generator=generator).T
    return tensors


def test_every_worker_gets_every_tensor_bit_for_bit() -> None:
    sender = WeightSender("127.0.0.1", 2, 20.0)
    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(receive, rank, sender.port) for rank in range(2)]
        sender.join()
        messages = list(in_buckets(weights().items()))
        for bucket in messages:
            sender.send_bucket(bucket)
        sender.send_end()
        for worker in received:
            tensors = worker.result(timeout=20)
            assert list(tensors) == list(weights())
            for name, tensor in weights().items():
                assert tensors[name].dtype == tensor.dtype
                assert torch.equal(tensors[name], tensor), name
    assert [[name for name, _ in bucket] for bucket in messages] == [
        ["norm", "scalar", "odd"],
        ["larger than a bucket"],
        ["last", "transposed"],
    ]


def test_an_update_given_up_raises_in_the_workers() -> None:
    sender = WeightSender("127.0.0.1", 2, 20.0)
    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(receive, rank, sender.port) for rank in range(2)]
        sender.join()
        sender.send_bucket([("norm", torch.ones(3))])
        sender.send_abort("no space")
        for worker in received:
            with pytest.raises(RuntimeError, match="the trainer gave the update up: no space"):
                worker.result(timeout=20)


def test_other_bytes_than_those_sent_raise_in_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = WeightSender("127.0.0.1", 2, 20.0)
    broadcast = sender._broadcast

    def broadcast_damaged(tensor: Tensor) -> None:
        if tensor.numel() == 16:  # the weights' own bytes
            tensor = tensor.clone()
            tensor[3] ^= 1
        broadcast(tensor)

    monkeypatch.setattr(sender, "_broadcast", broadcast_damaged)
    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(receive, rank, sender.port) for rank in range(2)]
        sender.join()
        sender.send_bucket([("norm", torch.ones(4))])
        for worker in received:
            with pytest.raises(RuntimeError, match=r"weights arrived with digest -?\d+, sent was"):
                worker.result(timeout=20)


def test_the_plugins_need_nothing_of_megarl() -> None:
    for path in PLUGIN_FOLDER.glob("*.py"):
        source = path.read_text()
        assert "import megarl\n" not in source and "from megarl." not in source and "import megarl." not in source
