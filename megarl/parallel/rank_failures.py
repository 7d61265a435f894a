"""From what is known of failed, killed and hanging ranks to the one line that names the cause."""

import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

import megarl.errors
from megarl.crash import where, write_crash
from megarl.errors import MegaRLError, RankError, TransferError, one_line, shortened
from megarl.parallel.rank_board import RankBoard, RankFailure, RankStatus, crash_name

# of gloo and NCCL, whose errors have no type of their own, when another rank is gone or late
_OTHERS_FAULT = re.compile(
    r"gloo[/\\]|Connection (closed|reset) by peer|Connection refused|Broken pipe|Timed out waiting|Socket closed|"
    r"remote process exited|Watchdog caught collective|NCCL (communicator|error)|wait timeout after|failed to recv",
    re.IGNORECASE,
)
_IN_TORCH_STORE = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
_MEMORY_HINT = "; the machine ran out of memory: lower max_tokens_per_micro_batch or the model's size, or use more ranks"
_KILL_HINT = ", as the system does when memory runs out"


def failure_of(error: BaseException, rank: int, phase: str, folder: Path | None) -> RankFailure:
    """Return what a rank says of the error that ends it; the traceback of one that is not ours goes to a file in ``folder``."""
    is_ours = isinstance(error, MegaRLError)
    log = "" if is_ours else str(write_crash(error, folder, crash_name(rank)))
    return RankFailure(
        rank=rank,
        phase=phase,
        reason=str(error) if is_ours else reason_of(error),
        # a TransferError names the rank that it missed, and the bucket
        is_consequence=not isinstance(error, TransferError) and any(_is_others_fault(one) for one in _chain(error)),
        error=type(error).__name__ if is_ours else "",
        mistakes=tuple(map(str, error.mistakes)) if isinstance(error, MegaRLError) else (),
        log=log,
    )


def reason_of(error: BaseException) -> str:
    """Return the type, message and place of an error that nobody foresaw, on one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({shortened(repr(error.code), 40)}) was called at {where(error)}"
    ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if ran_out:
        return f"{one_line(error, 60)} at {where(error)}{_MEMORY_HINT}"
    return f"{one_line(error, 120)} at {where(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those that it came from."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _is_others_fault(error: BaseException) -> bool:
    return isinstance(error, _IN_TORCH_STORE) or (
        isinstance(error, RuntimeError | MegaRLError) and bool(_OTHERS_FAULT.search(str(error)))
    )


def as_error(failure: RankFailure, status: RankStatus | None, world_size: int) -> MegaRLError:
    """Return the error to raise for a rank's own failure: its own where that is one of ours, else one that names the rank."""
    kind = getattr(megarl.errors, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, MegaRLError):
        return kind(*failure.mistakes)
    details = f"; the traceback is in {failure.log}" if failure.log else ""
    return RankError(f"{named(failure.rank, status, world_size)} failed{during(failure.phase)}: {failure.reason}{details}")


def named(rank: int, status: RankStatus | None, world_size: int) -> str:
    """Name a rank with its host and process."""
    where_it_is = f" ({status.host}, process {status.pid})" if status is not None else ""
    return f"rank {rank} of {world_size}{where_it_is}"


def during(phase: str | None) -> str:
    """Name a phase as a part of a sentence."""
    return f" in {phase}" if phase else ""


def explain_local(
    board: RankBoard, world_size: int, ended: Mapping[int, int], silent: list[int], timeout_seconds: float, folder: Path | None
) -> MegaRLError:
    """Return the error that names why the local ranks of a world ended.

    Args:
        board: what they said.
        world_size: how many there were.
        ended: exit codes of those that ended by themselves, minus a signal's number, in their order.
        silent: those that did not end.
        timeout_seconds: distributed_timeout.
        folder: of the run; None where there is none.
    """
    failures = board.failures()
    # a rank that was killed comes first: what others say then, even of their files, is for want of it
    killed = [rank for rank, code in ended.items() if code < 0]
    for rank in killed:
        if ended[rank] != -signal.SIGABRT:
            return _killed(rank, ended[rank], board.status(rank), world_size, folder)
    for failure in failures:
        if not failure.is_consequence:
            return as_error(failure, board.status(failure.rank), world_size)
    stopped = [rank for rank in silent if _state(board.status(rank)) == "T"]
    for rank in stopped:
        return _hanging(rank, board.status(rank), world_size, timeout_seconds, folder)
    for rank in killed:  # NCCL's watchdog aborts a process that waited too long, which is told after why it waited
        return _killed(rank, ended[rank], board.status(rank), world_size, folder)
    said = {failure.rank for failure in failures}
    for rank, code in sorted(ended.items(), key=lambda item: item[1] == 0):
        if rank not in said:
            status = board.status(rank)
            return RankError(
                f"{named(rank, status, world_size)} ended with exit code {code}{during(status.phase if status else 'its start')}, "
                f"without an error; {_go_on(folder)}"
            )
    for rank in silent:
        return _hanging(rank, board.status(rank), world_size, timeout_seconds, folder)
    return _all_late(failures, world_size, timeout_seconds)


def _killed(rank: int, code: int, status: RankStatus | None, world_size: int, folder: Path | None) -> RankError:
    hint = _KILL_HINT if -code == signal.SIGKILL else ""
    phase = during(status.phase if status else "its start")
    return RankError(f"{named(rank, status, world_size)} was killed by {_signal_name(-code)}{phase}{hint}; {_go_on(folder)}")


def _hanging(rank: int, status: RankStatus | None, world_size: int, timeout_seconds: float, folder: Path | None) -> RankError:
    is_stopped = _state(status) == "T"
    log = None if folder is None else folder / crash_name(rank)
    if is_stopped:
        how = "is stopped (SIGSTOP)"
    elif log is not None and log.exists():
        how = f"hangs (its stack is in {log})"
    else:
        how = "hangs"
    return RankError(
        f"{named(rank, status, world_size)} {how}{during(status.phase if status else 'its start')}: the others waited longer than "
        f"distributed_timeout {timeout_seconds:g} s for it; raise that where so long is right"
    )


def _all_late(failures: list[RankFailure], world_size: int, timeout_seconds: float) -> MegaRLError:
    phases = ", ".join(f"rank {failure.rank}{during(failure.phase)}" for failure in failures[:3])
    first = failures[0] if failures else None
    details = f": {first.reason}; the traceback is in {first.log}" if first is not None and first.log else ""
    return RankError(
        f"the {world_size} ranks lost each other or waited longer than distributed_timeout {timeout_seconds:g} s ({phases})"
        f"{shortened(details, 160)}"
    )


def explain_launched(board: RankBoard, failure: RankFailure, world_size: int, address: str, grace_seconds: float) -> MegaRLError:
    """Return the error that a rank which a launcher placed ends with, when another rank's end or silence is all that it knows of.

    Args:
        board: what the ranks said.
        failure: this rank's own, posted already.
        world_size: ranks of the world.
        address: of the store.
        grace_seconds: how long others have to say what became of them.
    """
    ends = f"rank {failure.rank}{during(failure.phase)} ends because "
    try:
        before = board.beats()
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline:
            for other in board.failures():
                if not other.is_consequence:
                    status = board.status(other.rank)
                    return RankError(
                        f"{ends}{named(other.rank, status, world_size)} failed{during(other.phase)}: {shortened(other.reason, 140)}"
                    )
            time.sleep(0.2)
        after = board.beats()
        left = {other.rank for other in board.failures()}
        gone = [rank for rank in range(world_size) if rank not in left and after[rank] == before[rank]]
        late = [rank for rank in range(world_size) if rank not in left and rank not in gone]
        for rank, how in [*((rank, "is gone or stopped") for rank in gone), *((rank, "hangs or is late") for rank in late)]:
            status = board.status(rank)
            return RankError(f"{ends}{named(rank, status, world_size)} {how}{during(status.phase if status else 'its start')}")
        return RankError(f"{ends}the ranks lost each other: {shortened(failure.reason, 140)}; the traceback is in {failure.log}")
    except (RuntimeError, OSError):
        return RankError(f"{ends}rank 0 at {address}, which serves the store of the ranks, is gone; see what it printed last")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _state(status: RankStatus | None) -> str:
    """Return the letter of a local process's state, T for one that is stopped; empty for others."""
    if status is None or status.host != socket.gethostname():
        return ""
    try:
        return (Path("/proc") / str(status.pid) / "stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def _go_on(folder: Path | None) -> str:
    return "start the command again" if folder is None else "go on from the last checkpoint with --resume"
