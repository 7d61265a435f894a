"""Plans carried out through files: every element at its place, and nothing half-written or changed is read."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megarl.errors import TransferError
from megarl.parallel.launch import run_local_ranks
from megarl.reshard import disk
from megarl.reshard.disk import latest_version, read_version, write_version
from megarl.reshard.parcels import flat_parts
from slow_layouts import EngineSizes, MegatronSizes
from transfers import Transfer, transfer


@pytest.fixture
def case(tmp_path: Path) -> Transfer:
    target = EngineSizes(engine="vllm", tp=2, ep=2, replicas=2)
    return transfer(tmp_path, "qwen3_moe", (MegatronSizes(pp=2, dp=2), range(4)), (target, range(4)))


def write(case: Transfer, folder: Path, version: int) -> None:
    write_version(case.plan, flat_parts(case.held[dist.get_rank()]), folder, version)


def read(case: Transfer, folder: Path, version: int) -> None:
    for rank, needed in enumerate(case.needed):
        got = {name: torch.zeros_like(tensor) for name, tensor in needed.items()}
        read_version(case.plan, rank, flat_parts(got), folder, version)
        assert all(torch.equal(got[name], tensor) for name, tensor in needed.items())


def test_every_rank_reads_what_it_needs(tmp_path: Path, case: Transfer) -> None:
    assert latest_version(tmp_path) is None
    for version in (9, 10, 10):
        run_local_ranks(write, (case, tmp_path, version), 4, 60)
    assert latest_version(tmp_path) == 10
    read(case, tmp_path, 10)
    stored = [tensor.nbytes for path in tmp_path.glob("weights_v10/rank_*") for tensor in load_file(path).values()]
    # each part once, though two engines need it; only key-value heads that ranks of an engine share are parts of their own
    assert 1 <= sum(stored) / sum(tensor.nbytes for tensor in case.values.values()) < 1.02


def test_changed_files_are_refused(tmp_path: Path, case: Transfer) -> None:
    run_local_ranks(write, (case, tmp_path, 1), 4, 60)
    file = tmp_path / "weights_v1" / "rank_00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(TransferError, match=r"rank_00002.safetensors: model\..* is not what was written"):
        read(case, tmp_path, 1)
    file.write_bytes(b"\xff" * len(data))
    with pytest.raises(TransferError, match=r"rank_00002.safetensors is corrupt"):
        read(case, tmp_path, 1)
    file.write_bytes(data[:-1])
    with pytest.raises(TransferError, match=r"rank_00002.safetensors has \d+ bytes, its manifest.json says"):
        read(case, tmp_path, 1)
    other = transfer(tmp_path, "qwen3_moe", (MegatronSizes(pp=4), range(4)), (MegatronSizes(dp=4), range(4)))
    with pytest.raises(TransferError, match="another reshard plan"):
        read(other, tmp_path, 1)


def test_a_version_that_a_rank_cannot_write_does_not_exist(tmp_path: Path, case: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file = disk._write_file

    def full(path: Path, *args: object) -> dict[str, str]:
        if path.name == "rank_00003.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        return write_file(path, *args)

    monkeypatch.setattr(disk, "_write_file", full)
    with pytest.raises(TransferError, match=r"rank 3 cannot write .*No space left"):
        run_local_ranks(write, (case, tmp_path, 1), 4, 60)
    assert latest_version(tmp_path) is None
    with pytest.raises(TransferError, match="no whole version"):
        read(case, tmp_path, 1)
    monkeypatch.undo()
    run_local_ranks(write, (case, tmp_path, 1), 4, 60)  # what was left of it is no hindrance
    read(case, tmp_path, 1)
