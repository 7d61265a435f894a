"""Where the processes of a job listen: on the job's address, and nowhere else."""

import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from megarl.errors import ConfigError
from megarl.parallel.launch import LaunchedRank, join_world, launched_rank, run_local_ranks, single_rank_world
from megarl.sockets import address_towards, serve_store

LIMIT = datetime.timedelta(seconds=20)


def listening(*processes: psutil.Process) -> set[str]:
    """Addresses that the processes accept TCP connections on."""
    connections = [one for process in processes for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return {one.laddr.ip for one in connections}


def other_address() -> str:
    """An address of this machine that is not its loopback."""
    found = [
        one.address for addresses in psutil.net_if_addrs().values() for one in addresses
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]  # fmt: skip
    if not found:
        pytest.skip("this machine has its loopback alone")
    return found[0]


def report(folder: Path) -> None:
    """Use every kind of group that a run has, and write where this rank and the one that started it listen."""
    group = dist.new_group([0, 1])
    own_store = dist.FileStore(str(folder / "store"), 2)
    of_weights = ProcessGroupGloo(own_store, dist.get_rank(), 2, LIMIT)
    dist.all_reduce(torch.ones(1), group=group)
    own = psutil.Process()
    (folder / f"rank{dist.get_rank()}").write_text(" ".join(sorted(listening(own))))
    (folder / f"parent{dist.get_rank()}").write_text(" ".join(sorted(listening(own.parent()))))
    dist.barrier()
    del of_weights


def found_in(folder: Path, kind: str) -> list[str]:
    return [(folder / f"{kind}{rank}").read_text() for rank in range(2)]


def test_ranks_of_this_machine_listen_on_its_loopback(tmp_path: Path) -> None:
    run_local_ranks(report, (tmp_path,), 2, 60)
    assert found_in(tmp_path, "rank") == ["127.0.0.1", "127.0.0.1"]
    assert found_in(tmp_path, "parent") == ["127.0.0.1", "127.0.0.1"]  # of this process; it has served the store


def launched(folder: Path) -> None:
    place = launched_rank()
    assert place is not None
    join_world(place, 60)
    report(folder)
    dist.destroy_process_group()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "other"])
def test_launched_ranks_listen_on_the_address_of_the_job(tmp_path: Path, address: str) -> None:
    address = other_address() if address == "other" else address
    with socket.create_server((address, 0)) as probe:
        port = probe.getsockname()[1]
    program = f"import {Path(__file__).stem} as module, pathlib; module.launched(pathlib.Path({str(tmp_path)!r}))"
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", program]
        ranks.append(subprocess.Popen(command, cwd=Path(__file__).parent, env=os.environ | place))
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    expected = "127.0.0.1" if address == "localhost" else address
    assert found_in(tmp_path, "rank") == [expected, expected]


def test_a_world_of_one_leaves_no_trace() -> None:
    before = dict(os.environ)
    with single_rank_world():
        assert listening(psutil.Process()) <= {"127.0.0.1"}
    assert dict(os.environ) == before


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "other"])
def test_a_store_listens_on_one_address(address: str) -> None:
    address = other_address() if address == "other" else address
    before = listening(psutil.Process())
    store = serve_store(address, 0, 2, LIMIT)
    assert listening(psutil.Process()) - before <= {socket.gethostbyname(address)}
    assert dist.TCPStore(address, store.port, 2, is_master=False, timeout=LIMIT).add("n", 1) == 1


def test_the_loopback_is_no_place_for_ranks_of_several_machines() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.1.1", "MASTER_PORT": "29500"}
    place = launched_rank(environment)
    assert place is not None and place.spans_machines
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR 127\.0\.1\.1 is this machine's own loopback"):
        join_world(place, 5)


def test_an_address_of_another_machine_is_refused_at_once() -> None:
    place = LaunchedRank(
        rank=0, world_size=2, local_rank=0, address="198.51.100.7", port=29500, agent_serves_store=False, spans_machines=True
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^rank 0 cannot use 198\.51\.100\.7:29500 for the rendezvous: .* set MASTER_ADDR to "):
        join_world(place, 5)


def test_the_address_that_packets_leave_by() -> None:
    assert address_towards("localhost", 80) == "127.0.0.1"
    assert address_towards(other_address(), 80) == other_address()
