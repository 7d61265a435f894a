"""Plans carried out between forked gloo ranks: every element at its place on any set of ranks, and no failure goes unnoticed.

What each rank holds and must get is written with chunk and cat (slow_layouts), in integers that say which element they are.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.errors import RankError, TransferError
from megarl.parallel.launch import run_local_ranks
from megarl.reshard.packed_messages import flat_parts
from megarl.reshard.point_to_point import PointToPoint
from slow_layouts import EngineSizes, MegatronSizes
from transfers import Transfer, transfer

LAUNCH_SECONDS = 60
WORLD = 5


def move_twice(transfers: list[Transfer]) -> None:
    for case in transfers:
        transport = case.transport()
        for _ in range(2):
            held, got = case.fresh()
            transport.execute(flat_parts(held), flat_parts(got))
            case.check(got)


def test_any_ranks_on_either_side(tmp_path: Path) -> None:
    tp2pp2, moe = MegatronSizes(tp=2, pp=2), MegatronSizes(pp=2, ep=2, dp=2)
    transfers = [
        transfer(tmp_path, "qwen2", (MegatronSizes(tp=2), [0, 1]), (MegatronSizes(pp=2), [2, 3])),
        transfer(tmp_path, "qwen2", (MegatronSizes(pp=2), [0, 1]), (MegatronSizes(dp=4), [1, 2, 3, 4])),
        transfer(tmp_path, "llama", (tp2pp2, [3, 1, 0, 2]), (MegatronSizes(), [4])),
        transfer(tmp_path, "llama", (MegatronSizes(), [2]), (tp2pp2, [3, 1, 0, 2])),
        transfer(tmp_path, "qwen3_moe", (moe, [0, 1, 2, 3]), (EngineSizes(engine="vllm", tp=2, ep=2), [4, 3])),
        transfer(tmp_path, "mixtral", (moe, [1, 2, 3, 4]), (EngineSizes(engine="sglang", tp=2, replicas=2), [0, 1, 2, 3])),
    ]
    assert all(case.plan.num_buckets > 2 for case in transfers)
    run_local_ranks(move_twice, (transfers,), WORLD, LAUNCH_SECONDS)


def report(function: Callable[[], None], folder: Path) -> None:
    """Keep this rank's error for the test."""
    try:
        function()
    except TransferError as error:
        (folder / f"error{dist.get_rank()}").write_text(str(error))
        raise


def errors(folder: Path) -> dict[int, str]:
    return {int(path.name.removeprefix("error")): path.read_text() for path in folder.glob("error*")}


def four_ranks(folder: Path) -> Transfer:
    ranks = range(4)
    return transfer(folder, "qwen2", (MegatronSizes(tp=2, pp=2), ranks), (MegatronSizes(dp=4), ranks))


def execute(case: Transfer, timeout_seconds: float) -> None:
    held, got = case.fresh()
    case.transport(timeout_seconds).execute(flat_parts(held), flat_parts(got))


def test_a_changed_message_is_an_error_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = PointToPoint._pack

    def flip_a_bit(self, packed, source):
        pack(self, packed, source)
        if dist.get_rank() == 1 and packed.peer == 2 and packed.bucket == 1:
            self._send_buffer[packed.start + 100] ^= 4

    monkeypatch.setattr(PointToPoint, "_pack", flip_a_bit)
    case = four_ranks(tmp_path)
    with pytest.raises(TransferError):
        run_local_ranks(report, (lambda: execute(case, 20.0), tmp_path), 4, LAUNCH_SECONDS)
    found = errors(tmp_path)
    assert found.keys() == set(range(4)) and len(set(found.values())) == 1
    assert "rank 1 sent to rank 2 in bucket 1 (model." in found[0] and "arrived changed" in found[0]


@pytest.mark.parametrize("where", ["before", "between"])
def test_a_killed_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    post = PointToPoint._post

    def die(self, bucket):
        if dist.get_rank() == 3 and bucket is self._buckets[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return post(self, bucket)

    def run() -> None:
        if where == "before" and dist.get_rank() == 3:
            transport = case.transport(20.0)  # collective
            assert transport.buffer_bytes
            os.kill(os.getpid(), signal.SIGKILL)
        execute(case, 3.0)

    if where == "between":
        monkeypatch.setattr(PointToPoint, "_post", die)
    case = four_ranks(tmp_path)
    with pytest.raises(RankError, match=r"rank 3 of 4 .* was killed by SIGKILL"):
        run_local_ranks(report, (run, tmp_path), 4, LAUNCH_SECONDS)
    found = errors(tmp_path)
    assert found.keys() == {0, 1, 2}
    assert any("rank 3" in text or "ranks 3" in text for text in found.values()), found


def test_a_rank_that_hangs_is_named_with_bucket_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    post = PointToPoint._post

    def hang(self, bucket):
        if dist.get_rank() == 3 and bucket is self._buckets[1]:
            signal.pause()
        return post(self, bucket)

    monkeypatch.setattr(PointToPoint, "_post", hang)
    case = four_ranks(tmp_path)
    with pytest.raises(TransferError):
        run_local_ranks(report, (lambda: execute(case, 2.0), tmp_path), 4, LAUNCH_SECONDS)
    assert any("rank 3 bucket 1 (model." in text and "within 2 s" in text for text in errors(tmp_path).values())


def test_nothing_is_written_when_one_rank_holds_other_tensors(tmp_path: Path) -> None:
    case = four_ranks(tmp_path)

    def run(what: str) -> None:
        held, got = case.fresh()
        if dist.get_rank() == 2 and what == "type":
            held = {name: tensor.to(torch.int16) for name, tensor in held.items()}
        if dist.get_rank() == 2 and what == "name":
            held = dict(list(held.items())[1:])
        try:
            case.transport().execute(flat_parts(held), flat_parts(got))
        finally:
            assert not any(tensor.any() for tensor in got.values())

    for what, words in (("type", "torch.int16, which the plan does not fit"), ("name", "rank 2 has no decoder")):
        with pytest.raises(TransferError, match=words):
            run_local_ranks(report, (lambda what=what: run(what), tmp_path), 4, LAUNCH_SECONDS)
        assert errors(tmp_path).keys() == set(range(4))


def test_different_plans_are_refused(tmp_path: Path) -> None:
    ranks = range(2)
    sides = (MegatronSizes(tp=2), ranks), (MegatronSizes(pp=2), ranks)
    cases = [transfer(tmp_path, "qwen2", *sides, bucket_bytes=size) for size in (1 << 14, 1 << 15)]
    with pytest.raises(TransferError, match=r"ranks \[1\] have made another reshard plan than rank 0"):
        run_local_ranks(lambda: execute(cases[dist.get_rank()], 20.0), (), 2, LAUNCH_SECONDS)
