"""Weights over a real gloo group into the worker extension that vLLM runs, one thread for each worker."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megarl.rollout.vllm_server import PLUGIN_FOLDER
from megarl.rollout.weight_sender import BUCKET_BYTES, WeightSender, buckets


def load_plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("megarl_vllm_worker", PLUGIN_FOLDER / "megarl_vllm_worker.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Worker(load_plugin().MegaRLWorkerExtension):  # type: ignore[misc]
    """The part of a vLLM worker that the extension reads before it hands tensors to vLLM."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def receive(self, port: int) -> dict[str, Tensor]:
        self.megarl_join("127.0.0.1", port, 3, 20.0)
        return dict(self._megarl_incoming())


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
        received = [pool.submit(Worker(rank).receive, sender.port) for rank in range(2)]
        sender.join()
        messages = list(buckets(weights().items()))
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
        received = [pool.submit(Worker(rank).receive, sender.port) for rank in range(2)]
        sender.join()
        sender.send_bucket([("norm", torch.ones(3))])
        sender.send_abort("no space")
        for worker in received:
            with pytest.raises(RuntimeError, match="the trainer gave the update up: no space"):
                worker.result(timeout=20)


def test_the_plugin_needs_nothing_of_megarl() -> None:
    source = Path(PLUGIN_FOLDER / "megarl_vllm_worker.py").read_text()
    assert "import megarl" not in source and "from megarl" not in source
