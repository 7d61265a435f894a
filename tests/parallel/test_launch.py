"""Which rank a launcher made of a process, and ranks started here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarl.parallel.launch import LaunchedRank, first_host, launched_rank, run_local_ranks

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29511"}


def test_srun_task_is_a_rank() -> None:
    place = launched_rank(SRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.address) == (9, 16, 1, "node3")
    assert not place.agent_serves_store
    # every task of a step finds the same port, two steps of a job do not
    assert launched_rank(SRUN | {"SLURM_PROCID": "0"}).port == place.port  # type: ignore[union-attr]
    assert launched_rank(SRUN | {"SLURM_STEP_ID": "3"}).port != place.port  # type: ignore[union-attr]
    assert 1024 < place.port < 32768


def test_master_address_goes_before_slurm() -> None:
    place = launched_rank(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert place is not None
    assert (place.address, place.port) == ("10.0.0.1", 4000)


def test_torchrun_goes_before_srun() -> None:
    expected = LaunchedRank(
        rank=5, world_size=8, local_rank=1, address="head", port=29511, agent_serves_store=True, spans_machines=False
    )
    assert launched_rank(SRUN | TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_otherwise_ranks_are_started_here(environment: dict[str, str]) -> None:
    assert launched_rank(environment) is None


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node1,node7", "node1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("rack2-[3,5]-ib", "rack2-3-ib"),
        ("a-b[10]", "a-b10"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def multiply_with_threads() -> None:
    torch.set_num_threads(2)
    matrix = torch.ones(300, 300, dtype=torch.float64)
    assert (matrix @ matrix).sum() == 300**3


def compute_then_start_ranks() -> None:
    multiply_with_threads()
    run_local_ranks(multiply_with_threads, (), 1, 60)
    multiply_with_threads()


def test_ranks_of_a_process_that_computed_with_threads_do_so_too() -> None:
    """In a process of its own, which can be killed: without the threads that a fork does not copy, the rank waits for ever."""
    program = f"import {Path(__file__).stem} as module; module.compute_then_start_ranks()"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, timeout=60)
