"""Starts the ranks of a run and joins them into one world."""

import datetime
import gc
import os
import socket
from collections.abc import Callable
from multiprocessing import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarl.death_signal import end_with_parent_in_forks
from megarl.errors import ConfigError, MegaRLError

LOCALHOST = "127.0.0.1"
GRACE_SECONDS = 5.0  # for the other ranks to end by themselves when one has failed


def started_by_launcher() -> bool:
    """True when torchrun has placed this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_world(timeout_seconds: float) -> None:
    """Join the world described by torchrun's environment variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK)."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ.get("MASTER_ADDR", LOCALHOST), int(os.environ.get("MASTER_PORT", "29500"))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # under torchrun the agent already serves the store on that port
    serves_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, world_size, is_master=serves_store, timeout=timeout)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"rank {rank} cannot use {address}:{port} for the rendezvous: {error}; set MASTER_PORT to a free port"
        ) from error
    _join(store, rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), timeout)


def _join(store: dist.Store, rank: int, world_size: int, local_rank: int, timeout: datetime.timedelta) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("megarl", store), rank=rank, world_size=world_size, timeout=timeout)


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    timeout_seconds: float,
    user_errors: "SimpleQueue[MegaRLError]",
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    end_with_parent_in_forks()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(LOCALHOST, port, world_size, is_master=False, timeout=timeout)
    _join(store, rank, world_size, rank, timeout)
    try:
        function(*args)
        dist.barrier()
    except MegaRLError as error:
        user_errors.put(error)  # before the group ends: the ranks that then fail for want of this one say nothing useful
        raise
    finally:
        dist.destroy_process_group()


def run_local_ranks(function: Callable[..., None], args: tuple[Any, ...], num_ranks: int, timeout_seconds: float) -> None:
    """Fork ``num_ranks`` ranks of one world on this machine and run ``function(*args)`` on each.

    The ranks share this process's imports, so they start in a moment. When one fails the others are ended.

    Raises:
        MegaRLError: a rank met a user error; the first one is raised here.
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: a rank failed otherwise or was killed.
    """
    # port 0: the system picks a free port and no other program can take it in between; early ranks wait in the backlog
    listener = socket.create_server((LOCALHOST, 0), backlog=num_ranks)
    port = listener.getsockname()[1]
    user_errors: SimpleQueue[MegaRLError] = mp.get_context("fork").SimpleQueue()
    # A rank must never collect this process's garbage: destructors of stores would wait for threads that a fork does not copy.
    gc.collect()
    gc.freeze()
    try:
        context = mp.start_processes(
            _run_rank,
            args=(num_ranks, port, timeout_seconds, user_errors, function, args),
            nprocs=num_ranks,
            join=False,
            start_method="fork",
        )
    finally:
        gc.unfreeze()
    # only now: its server is a thread, and a rank forked while that holds a lock would wait for it for ever
    store = dist.TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    try:
        while not context.join(timeout=1.0, grace_period=GRACE_SECONDS):
            pass
    except (mp.ProcessRaisedException, mp.ProcessExitedException):
        if user_errors.empty():
            raise
        raise user_errors.get() from None
    finally:
        del store
        for process in context.processes:
            if process.is_alive():
                process.terminate()
                process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()
