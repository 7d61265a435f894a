"""What breaks during a live weight update is named, and nothing ever serves mixed weights."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from live_sync import LiveSync, live_sync, write_shuffled_model
from megarl.errors import MegaRLError, RolloutError
from megarl.parallel import launch
from megarl.parallel.launch import run_local_ranks
from megarl.reshard import barrier
from megarl.reshard.engine_transfer import EngineTransfer
from megarl.reshard.packed_messages import FlatPart, PackedMessage
from real_engines import server_processes
from tiny_rollout import generate_all, sampling, worst_gap

TIMEOUT = 280
PROMPTS = [(1, 2, 3), tuple(range(5, 95))]
LAYOUT = {"tp": 2, "pp": 2}
SIZES = {"hidden_size": 256, "intermediate_size": 512}  # 10 MB, for several buckets of 1 MiB

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def midway(transfer: EngineTransfer, rank: int, fault: Callable[[Tensor], None]) -> None:
    """Once, when ``rank`` has packed the second packed message of the update that is to come."""
    pack, done = transfer._pack, []

    def pack_with_fault(held: dict[str, FlatPart], packed: PackedMessage, data: Tensor) -> None:
        pack(held, packed, data)
        done.append(packed)
        if dist.get_rank() == rank and len(done) == 2:
            fault(data)

    transfer._pack = pack_with_fault


def flip_a_bit(data: Tensor) -> None:
    data[100] ^= 4


def kill_the_engine(live: LiveSync) -> Callable[[Tensor], None]:
    def fault(data: Tensor) -> None:
        assert live.engine is not None
        holder = max(server_processes(live.engine), key=lambda process: process.memory_info().rss)  # of the weights
        holder.kill()

    return fault


def update_with_fault(folder: Path, name: str, what: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "update", dtype=torch.float32).eval()
    transport = "gloo" if (name, what) == ("sglang", "changed bucket") else "shared_memory"
    transfer = {"method": "slices", "transport": transport, "bucket_mib": 1, "max_restarts": 1}
    with live_sync(folder, name, {"parallel": LAYOUT}, transfer) as live:
        live.sync.push(0)
        assert live.sync._transfer is not None and live.sync._transfer.plan.num_buckets > 5
        if what == "changed bucket":
            midway(live.sync._transfer, 1, flip_a_bit)
        elif what == "killed engine":
            midway(live.sync._transfer, 0, kill_the_engine(live))
        else:
            midway(live.sync._transfer, 3, lambda data: os.kill(os.getpid(), signal.SIGKILL))
        live.take(folder / "update")
        try:
            live.sync.push(1)
        except MegaRLError as error:
            (folder / f"error{dist.get_rank()}").write_text(str(error))
            if live.main is not None:
                with pytest.raises(RolloutError, match=r"cannot answer: its update to weight version 1 did not complete|killed"):
                    live.main.run(generate_all(live.engine, PROMPTS, sampling()))
            raise
        if live.main is not None:
            (folder / "warnings").write_text("\n".join(live.warnings))
            groups = live.main.run(generate_all(live.engine, PROMPTS, sampling()))
            assert {version for group in groups for one in group for version in one.weight_versions} == {1}
            assert worst_gap(model, PROMPTS, groups, 1.0) <= 1e-4
        dist.barrier()


def write_models(folder: Path) -> None:
    for seed, name in enumerate(("model", "update")):
        write_shuffled_model(folder / name, seed, "llama", **SIZES)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_changed_bucket_costs_the_engine_but_not_the_run(tmp_path: Path, name: str) -> None:
    write_models(tmp_path)
    run_local_ranks(update_with_fault, (tmp_path, name, "changed bucket"), 4, TIMEOUT)
    (warning,) = (tmp_path / "warnings").read_text().splitlines()
    print(warning)
    assert re.search(r"bucket \d \(model\..*\) from trainer rank 1 arrived changed", warning)
    assert (tmp_path / "engine.log").exists() and (tmp_path / "engine.2.log").exists()


def test_an_engine_killed_in_an_update_is_started_again(tmp_path: Path) -> None:
    write_models(tmp_path)
    run_local_ranks(update_with_fault, (tmp_path, "vllm", "killed engine"), 4, TIMEOUT)
    (warning,) = (tmp_path / "warnings").read_text().splitlines()
    print(warning)
    assert "vLLM" in warning and "bucket" in warning and "starting another vLLM" in warning


def test_a_killed_trainer_rank_is_named_and_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 120.0)  # as under srun, where no launcher ends the others at once
    monkeypatch.setattr(barrier, "ABSENCE_SECONDS", 40.0)
    with pytest.raises(MegaRLError):
        run_local_ranks(update_with_fault, (tmp_path, "vllm", "killed rank"), 4, TIMEOUT)
    found = {path.name: path.read_text() for path in tmp_path.glob("error*")}
    print(found)
    assert found.keys() == {"error0", "error1", "error2"}
    assert all("ranks 3" in text for text in found.values())
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or [])]
    assert psutil.wait_procs(left, timeout=15)[1] == []
