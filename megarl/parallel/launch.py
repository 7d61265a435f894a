"""Starts the ranks of a run and joins them into one world."""

import ctypes
import datetime
import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarl.config.layout_text import MOST_RANKS
from megarl.death_signal import end_with_parent_in_forks
from megarl.errors import ConfigError, quoted
from megarl.parallel.rank_board import Heart, RankBoard, set_announcer
from megarl.parallel.rank_failures import as_error, explain_launched, explain_local, failure_of
from megarl.sockets import LOCALHOST, address_towards, gloo_kept_to, is_loopback, keep_gloo_to, listen, serve_store

GRACE_SECONDS = 5.0  # for the other ranks to end by themselves when one has failed
ANSWER_SECONDS = 2.0  # that rank 0 stays after its own failure, for the others to read of it
LARGEST_PORT = 65535
OMP_PAUSE_SOFT = 1  # omp_pause_resource_t of OpenMP 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """This process as one rank of a world that a launcher has placed.

    Attributes:
        rank: in the world.
        world_size: ranks of the world.
        local_rank: on this machine; the number of its GPU.
        address, port: where rank 0 serves the rendezvous.
        agent_serves_store: True when torchrun's agent already serves it there.
        spans_machines: True when the launcher says that the world has ranks on other machines too.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    agent_serves_store: bool
    spans_machines: bool


def launched_rank(environment: Mapping[str, str] = os.environ) -> LaunchedRank | None:
    """Return the rank that torchrun (RANK, WORLD_SIZE, …) or srun with several tasks (SLURM_PROCID, …) made of this process, if
    any.

    MASTER_ADDR and MASTER_PORT go before what is derived from SLURM: the first node of the step, and a port by job and step.

    Raises:
        ConfigError: a variable is not what a launcher sets it to.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world_size = _whole(environment, "WORLD_SIZE", 1, MOST_RANKS)
        return LaunchedRank(
            rank=_whole(environment, "RANK", 0, world_size - 1),
            world_size=world_size,
            local_rank=_whole(environment, "LOCAL_RANK", 0, MOST_RANKS, "0"),
            address=environment.get("MASTER_ADDR", LOCALHOST),
            port=_whole(environment, "MASTER_PORT", 0, LARGEST_PORT, "29500"),
            agent_serves_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            spans_machines=_whole(environment, "LOCAL_WORLD_SIZE", 1, world_size, str(world_size)) < world_size,
        )
    # one task starts its ranks itself (--nproc), as does a batch script, which has SLURM_PROCID but is no step
    if _whole(environment, "SLURM_STEP_NUM_TASKS", 1, MOST_RANKS, "1") == 1:
        return None
    job, step = (_whole(environment, name, 0, 2**63) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    world_size = _whole(environment, "SLURM_STEP_NUM_TASKS", 1, MOST_RANKS)
    return LaunchedRank(
        rank=_whole(environment, "SLURM_PROCID", 0, world_size - 1),
        world_size=world_size,
        local_rank=_whole(environment, "SLURM_LOCALID", 0, MOST_RANKS),
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        port=_whole(environment, "MASTER_PORT", 0, LARGEST_PORT, str(15000 + (job * 16 + step) % 15000)),
        agent_serves_store=False,
        spans_machines=_whole(environment, "SLURM_STEP_NUM_NODES", 1, MOST_RANKS, "1") > 1,
    )


def _whole(environment: Mapping[str, str], name: str, least: int, most: int, default: str = "") -> int:
    """Read a launcher's variable; raises ConfigError where it is no whole number from ``least`` to ``most``."""
    text = environment.get(name) or default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ConfigError(
            f"{name} in the environment: is {quoted(text, 40)}, but has to be a whole number from {least} to {most}; "
            "correct it, or unset RANK and WORLD_SIZE to start the ranks with --nproc"
        )
    return int(text)


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: ``gpu[007-009,12],login1`` gives ``gpu007``."""
    match = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", node_list)
    assert match is not None  # every part may be empty
    return "".join(part or "" for part in match.groups())


def join_world(launched: LaunchedRank, timeout_seconds: float) -> dist.TCPStore:
    """Join the world as the rank that a launcher made of this process; its store.

    Raises:
        ConfigError: the address of the rendezvous cannot be used, or only by ranks of rank 0's machine.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = _store_of_launched_ranks(launched, timeout)
        keep_gloo_to(address_towards(launched.address, launched.port))
    except (OSError, dist.DistNetworkError) as error:
        raise ConfigError(
            f"rank {launched.rank} cannot use {launched.address}:{launched.port} for the rendezvous: {str(error).splitlines()[0]}; "
            "set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port of it"
        ) from error
    _join(store, launched.rank, launched.world_size, launched.local_rank, timeout)
    return store


def _store_of_launched_ranks(launched: LaunchedRank, timeout: datetime.timedelta) -> dist.TCPStore:
    """Open the store of the rendezvous, which rank 0 serves on MASTER_ADDR alone where no agent does."""
    if launched.rank != 0 or launched.agent_serves_store:
        return dist.TCPStore(launched.address, launched.port, launched.world_size, is_master=False, timeout=timeout)
    if launched.spans_machines and is_loopback(launched.address):
        raise ConfigError(
            f"MASTER_ADDR {launched.address} is this machine's own loopback address on rank 0, where ranks of other machines "
            "cannot reach it; set it to an address of rank 0's machine that they can"
        )
    return serve_store(launched.address, launched.port, launched.world_size, timeout, waits=True)


def _join(store: dist.Store, rank: int, world_size: int, local_rank: int, timeout: datetime.timedelta) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("megarl", store), rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def single_rank_world() -> Iterator[None]:
    """Make a world of this process alone, for what megatron-core does only with one."""
    with gloo_kept_to(LOCALHOST):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    timeout_seconds: float,
    crash_folder: Path | None,
    function: Callable[..., None],
    args: tuple[object, ...],
) -> None:
    end_with_parent_in_forks()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    keep_gloo_to(LOCALHOST)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(LOCALHOST, port, world_size, is_master=False, timeout=timeout)
    try:
        with _watched(store, rank, world_size, crash_folder):
            _join(store, rank, world_size, rank, timeout)
            function(*args)
            dist.barrier()
    except (Exception, SystemExit):
        # The starting process tells why, from what this rank posted. Threads, children and groups of a failed rank are not waited
        # for: they may wait for a rank that is lost. Children end with this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


@contextmanager
def _watched(store: dist.TCPStore, rank: int, world_size: int, crash_folder: Path | None) -> Iterator[RankBoard]:
    """Have this rank give signs of life in the block, tell its phases, and post the error that ends it before others miss it."""
    board = RankBoard(store, world_size)
    phase = "its start"

    def announce(name: str) -> None:
        nonlocal phase
        phase = name
        board.announce(rank, name)

    announce(phase)
    set_announcer(announce)
    heart = Heart(store.clone(), rank, world_size, crash_folder)  # type: ignore[attr-defined]  # missing in torch's stubs
    try:
        yield board
    except (Exception, SystemExit) as error:
        # before the group ends: the ranks that then fail for want of this one say nothing useful
        with suppress(RuntimeError):  # the store is gone with the rank or process that serves it
            board.post(failure_of(error, rank, phase, crash_folder))
        raise
    finally:
        set_announcer(None)
        heart.stop()


def run_ranks(
    function: Callable[..., None],
    args: tuple[object, ...],
    launched: LaunchedRank | None,
    num_ranks: int,
    timeout_seconds: float,
    crash_folder: Path | None = None,
) -> None:
    """Run ``function(*args)`` as the rank ``launched`` or, when no launcher placed this process, on ``num_ranks`` local ranks.

    Args:
        function, args: what each rank runs.
        launched: of this process.
        num_ranks: local ranks.
        timeout_seconds: of collectives.
        crash_folder: where tracebacks go; None for the system's temporary folder.

    Raises:
        MegaRLError: a user's error, or which rank failed, was killed or hangs.
    """
    if launched is None:
        run_local_ranks(function, args, num_ranks, timeout_seconds, crash_folder)
        return
    store = join_world(launched, timeout_seconds)
    try:
        with _watched(store, launched.rank, launched.world_size, crash_folder):
            function(*args)
    except (Exception, SystemExit) as error:
        raise _error_of_launched_rank(error, launched, store, crash_folder) from error
    finally:
        dist.destroy_process_group()


def _error_of_launched_rank(
    error: BaseException, launched: LaunchedRank, store: dist.TCPStore, crash_folder: Path | None
) -> BaseException:
    """Return what this rank ends with: its own error, or the line that names the rank which it lost."""
    board = RankBoard(store, launched.world_size)
    try:
        failure = next(one for one in board.failures() if one.rank == launched.rank)
    except (RuntimeError, OSError, StopIteration):
        failure = failure_of(error, launched.rank, "", crash_folder)
    if failure.is_consequence:
        return explain_launched(board, failure, launched.world_size, launched.address, GRACE_SECONDS)
    if launched.rank == 0 and not launched.agent_serves_store:
        time.sleep(ANSWER_SECONDS)  # the store ends with this process, and the others ask it why this rank left
    return as_error(failure, board.status(launched.rank), launched.world_size)


def _end_openmp_threads() -> None:
    """End OpenMP's idle threads; it starts new ones when they are needed.

    A fork copies the list of them and not the threads: a rank that computes with several would wait for them for ever.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(OMP_PAUSE_SOFT)


def run_local_ranks(
    function: Callable[..., None],
    args: tuple[object, ...],
    num_ranks: int,
    timeout_seconds: float,
    crash_folder: Path | None = None,
) -> None:
    """Fork ``num_ranks`` ranks of one world on this machine and run ``function(*args)`` on each.

    The ranks share this process's imports, so they start in a moment. When one fails the others are ended.

    Raises:
        MegaRLError: a rank met a user error; the first one is raised here. A RankError says which rank failed otherwise, was killed
            or hangs, and where its traceback is.
    """
    # port 0: the system picks a free port and no other program can take it in between; early ranks wait in the backlog
    listener = listen(LOCALHOST, 0, backlog=num_ranks)
    port = listener.getsockname()[1]
    # A rank must never collect this process's garbage: destructors of stores would wait for threads that a fork does not copy.
    # What is frozen is not collected; to collect it first would take longer than all the rest of the start.
    gc.freeze()
    _end_openmp_threads()
    try:
        context = mp.start_processes(
            _run_rank,
            args=(num_ranks, port, timeout_seconds, crash_folder, function, args),
            nprocs=num_ranks,
            join=False,
            start_method="fork",
        )
    finally:
        gc.unfreeze()
    # only now: its server is a thread, and a rank forked while that holds a lock would wait for it for ever
    store = dist.TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    try:
        ended = _wait_for(context.processes)
        if any(ended.values()) or len(ended) < num_ranks:
            silent = [rank for rank in range(num_ranks) if rank not in ended]
            raise explain_local(RankBoard(store, num_ranks), num_ranks, ended, silent, timeout_seconds, crash_folder)
    finally:
        del store
        _end(context.processes)


def _wait_for(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Wait until all ranks have ended or, when one has failed, a little longer; their exit codes, in the order of their ends."""
    ended: dict[int, int] = {}
    deadline = math.inf
    while len(ended) < len(processes) and time.monotonic() < deadline:
        running = [process.sentinel for rank, process in enumerate(processes) if rank not in ended]
        wait(running, timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        ended |= {
            rank: process.exitcode for rank, process in enumerate(processes) if rank not in ended and process.exitcode is not None
        }
        if deadline == math.inf and any(ended.values()):
            deadline = time.monotonic() + GRACE_SECONDS
    return ended


def _end(processes: Sequence[BaseProcess]) -> None:
    """Kill what is left: ranks only take note of SIGTERM (a run saves then), and one that is stopped would never see it."""
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
