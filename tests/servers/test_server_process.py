"""Servers, their guard and their ports, with small real processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl.engines.environment import COMPLETE_MARKER, default_python, engine_folder
from megarl.engines.server_process import ServerProcess, free_port
from megarl.errors import RolloutError

# A server with a child of its own; both ignore TERM when told to. It writes the process ids once all are up.
SERVER = """
import os, signal, subprocess, sys, time
deaf, path = sys.argv[1] == "deaf", sys.argv[2]
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the child
child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
child.stdout.readline()
with open(path + ".tmp", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(path + ".tmp", path)
time.sleep(600)
"""

TRAINER = """
import asyncio, sys
from pathlib import Path
from megarl.engines.server_process import ServerProcess
async def main():
    folder = Path(sys.argv[1])
    command = [sys.executable, "-c", sys.argv[2], "polite", str(folder / "pids")]
    await ServerProcess("server", command, {}, folder / "log").start()
    await asyncio.sleep(600)
asyncio.run(main())
"""


def started_processes(path: Path) -> list[psutil.Process]:
    """The server and its child, once they are up."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for pid in path.read_text().split()]


def all_gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=10)[1] == []


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_close_ends_the_server_and_its_children(tmp_path: Path, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarl.engines.server_process.GRACE_SECONDS", 0.5)

    async def run() -> list[psutil.Process]:
        server = ServerProcess("server", [sys.executable, "-c", SERVER, manner, str(tmp_path / "pids")], {}, tmp_path / "log")
        await server.start()
        processes = await asyncio.to_thread(started_processes, tmp_path / "pids")
        await server.close()
        return processes

    assert all_gone(asyncio.run(run()))


def test_a_late_server_writes_what_its_processes_do(tmp_path: Path) -> None:
    async def run() -> list[psutil.Process]:
        server = ServerProcess("server", [sys.executable, "-c", SERVER, "deaf", str(tmp_path / "pids")], {}, tmp_path / "log")
        await server.start()
        processes = await asyncio.to_thread(started_processes, tmp_path / "pids")
        await server.close(write_stacks=True)
        return processes

    processes = asyncio.run(run())
    assert all_gone(processes)
    stacks = (tmp_path / "log").read_text()
    assert stacks.count("Fatal Python error: Aborted") == len(processes) == 2
    assert f'File "<string>", line {SERVER.splitlines().index("time.sleep(600)") + 1} in <module>' in stacks
    assert not list(tmp_path.glob("core*"))


def test_a_killed_trainer_leaves_no_server_behind(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path), SERVER]) as trainer:
        processes = started_processes(tmp_path / "pids")
        os.kill(trainer.pid, signal.SIGKILL)
    assert all_gone(processes)


def test_a_killed_server_takes_its_children_along_and_is_named(tmp_path: Path) -> None:
    async def run() -> tuple[list[psutil.Process], RolloutError]:
        server = ServerProcess("server", [sys.executable, "-c", SERVER, "polite", str(tmp_path / "pids")], {}, tmp_path / "log")
        await server.start()
        processes = await asyncio.to_thread(started_processes, tmp_path / "pids")
        processes[0].kill()
        assert server.exited is not None
        await server.exited
        return processes, server.death()

    processes, death = asyncio.run(run())
    assert all_gone(processes)
    assert str(death).startswith("server was killed by SIGKILL; ")


def test_a_server_that_dies_is_quoted_in_one_line(tmp_path: Path) -> None:
    program = "print('loading'); raise ValueError('block size 7 is odd')"

    async def run() -> RolloutError:
        server = ServerProcess("server", [sys.executable, "-c", program], {}, tmp_path / "log")
        await server.start()
        assert server.exited is not None
        await server.exited
        await server.close()
        return server.death()

    message = str(asyncio.run(run()))
    assert message == f"server exited with code 1; its last words in {tmp_path / 'log'}: ValueError: block size 7 is odd"


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            RolloutError,
            match=rf"port {port} of 127\.0\.0\.1 cannot be used \(Address already in use\); set a\.port to ",
        ):
            free_port("127.0.0.1", port, "a.port")
    assert free_port("127.0.0.1", port, "a.port") == port
    assert free_port("127.0.0.1", 0, "a.port") > 0


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_only_a_finished_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = engine_folder(engine)
    assert folder.is_relative_to(tmp_path)
    with pytest.raises(RolloutError, match=f"run make engine-{engine}"):
        default_python(engine)
    (folder / "bin").mkdir(parents=True)
    with pytest.raises(RolloutError, match=f"run make engine-{engine}"):
        default_python(engine)  # interrupted before the marker was written
    (folder / COMPLETE_MARKER).touch()
    assert default_python(engine) == folder / "bin" / "python"
