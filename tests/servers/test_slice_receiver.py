"""The receiver of slices that runs in engines, over a real gloo group, with a trainer rank written by hand."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from engine_plugin import load_plugin

SliceReceiver = load_plugin("megarl_slice_receiver").SliceReceiver
SECONDS = 20.0
# a matrix of 4 rows whose last is padding, in two slices of two buckets; a vector in float32 kept as float64
FIRST = {"sender": 0, "holder": 0, "start": 0}
RECEIVE_PLAN: dict[str, Any] = {
    "transport": "gloo",
    "parameters": [("matrix", [4, 3], "bfloat16", 18), ("vector", [2], "float32", 8)],
    "buckets": [
        [{"tensor": "a", "copies": [(0, 0, 3, 0, 2, 0)], "bytes": 24} | FIRST],
        [{"tensor": "b", "copies": [(0, 0, 3, 2, 1, 0), (1, 0, 2, 0, 1, 8)], "bytes": 24} | FIRST],
    ],
}


class Parameters:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.finished: list[str] = []

    def open(self, name: str) -> Tensor:
        return self.tensors[name]

    def finish(self, name: str) -> None:
        self.finished.append(name)


def packed(*parts: Tensor) -> Tensor:
    """Parts at multiples of 8 bytes, then the digest."""
    data = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes().ljust(-(-part.nbytes // 8) * 8, b"\0") for part in parts)
    words = torch.frombuffer(bytearray(data), dtype=torch.int64)
    return torch.cat([words, words.sum()[None]]).view(torch.uint8)


def send(receive_plan: dict[str, Any], packed_messages: list[Tensor], parameters: Parameters, timeout: float = SECONDS) -> None:
    """Give a receiver its order and the packed messages; raises what it raises."""
    limit = timedelta(seconds=SECONDS)
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=limit, wait_for_workers=False)
    store.set("receive_plan/1", json.dumps(receive_plan))
    join: Callable[[], Any] = lambda: SliceReceiver("127.0.0.1", store.port, 2, 1, timeout, torch.device("cpu"))  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        receiver: Future[Any] = pool.submit(join)
        group = ProcessGroupGloo(PrefixStore("slices", store), 0, 2, limit)
        receiving = pool.submit(receiver.result(SECONDS).receive, parameters)
        for number, bucket in enumerate(packed_messages):
            group.send([bucket], 1, number).wait()
        receiving.result(SECONDS)


MATRIX, VECTOR = torch.arange(9, dtype=torch.bfloat16).view(3, 3), torch.tensor([0.1, -2.5])


def fresh() -> Parameters:
    return Parameters(matrix=torch.full((4, 3), 7.0, dtype=torch.bfloat16), vector=torch.full((2,), 7.0, dtype=torch.float64))


def test_slices_arrive_where_they_belong_and_padding_is_zero() -> None:
    parameters = fresh()
    send(RECEIVE_PLAN, [packed(MATRIX[:, :2].contiguous()), packed(MATRIX[:, 2].contiguous(), VECTOR)], parameters)
    assert torch.equal(parameters.tensors["matrix"], torch.cat([MATRIX, torch.zeros(1, 3, dtype=torch.bfloat16)]))
    assert torch.equal(parameters.tensors["vector"], VECTOR.double())
    assert parameters.finished == ["matrix", "vector"]


def test_a_changed_bit_is_an_error() -> None:
    changed = packed(MATRIX[:, :2].contiguous())
    changed[3] ^= 1
    with pytest.raises(RuntimeError, match=r"bucket 0 \(a …\) from trainer rank 0 arrived changed"):
        send(RECEIVE_PLAN, [changed], fresh())


def test_a_parameter_of_another_shape_is_refused() -> None:
    parameters = Parameters(matrix=torch.zeros(4, 2, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"matrix has the shape \[4, 2\] in this engine, the trainer's plan says \[4, 3\]"):
        send(RECEIVE_PLAN, [packed(MATRIX[:, :2].contiguous())], parameters)


def test_a_parameter_that_does_not_hold_what_came_is_an_error() -> None:
    column_again = {"tensor": "b", "copies": [(0, 0, 3, 0, 1, 0)], "bytes": 16} | FIRST  # and the last one never
    receive_plan = {
        "transport": "gloo",
        "parameters": RECEIVE_PLAN["parameters"][:1],
        "buckets": [RECEIVE_PLAN["buckets"][0], [column_again]],
    }
    with pytest.raises(RuntimeError, match="matrix does not hold what was written into it"):
        send(receive_plan, [packed(MATRIX[:, :2].contiguous()), packed(MATRIX[:, 0].contiguous())], fresh())


def test_a_parameter_of_which_a_part_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no or not all values came for \['matrix', 'vector'\]"):
        send(RECEIVE_PLAN | {"buckets": RECEIVE_PLAN["buckets"][:1]}, [packed(MATRIX[:, :2].contiguous())], fresh())


def test_a_sender_that_is_silent_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"bucket 0 \(a …\) from trainer rank 0 did not come within 1 s"):
        send(RECEIVE_PLAN, [], fresh(), timeout=1.0)
