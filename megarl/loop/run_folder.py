"""The run folder: who may write into it, and the config that says what run it holds."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.config.checks.resume import check_resume
from megarl.config.load import load_config, save_config
from megarl.config.redaction import redacted
from megarl.config.schema import Config
from megarl.errors import CheckpointError, ConfigError, MegaRLError, writes
from megarl.weights.checkpoint import whole_checkpoints
from megarl.weights.manifest import read_manifest

CONFIG = "config.yaml"
PENDING_CONFIG = "config.yaml.pending"  # of a run that is not accepted yet
LOCK = "run.lock"
CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without flock


@contextmanager
def run_folder(config: Config, *, resume: bool) -> Iterator[None]:
    """Keep other runs out of the folder, and refuse a config that does not belong to what it holds; nothing there is changed.

    Raises:
        ConfigError: another run writes there, there is another run than the config's, or the folder cannot be used.
        CheckpointError: there is nothing to go on from.
    """
    folder = config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run_dir {folder} cannot be made: {error}") from error
    with _locked(folder):
        _check(config, resume=resume)
        save_config(redacted(config), folder / PENDING_CONFIG)
        try:
            yield
        finally:
            (folder / PENDING_CONFIG).unlink(missing_ok=True)


def accept_config(folder: Path) -> None:
    """Make the config that ``run_folder`` was given the run's, once the checkpoint and the data are accepted."""
    pending = folder / PENDING_CONFIG
    if pending.exists():
        os.replace(pending, folder / CONFIG)


def _check(config: Config, *, resume: bool) -> None:
    folder = config.run_dir
    checkpoints = folder / "checkpoints"
    if checkpoints.is_symlink():
        raise ConfigError(
            f"{checkpoints} is a symbolic link to {checkpoints.readlink()}, where old checkpoints would be deleted; put run_dir "
            "itself there"
        )
    if not resume:
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(f"run_dir {folder} already holds a run; add --resume to go on with it or choose another --run-dir")
        return
    whole = whole_checkpoints(checkpoints)
    if not whole:
        raise CheckpointError(f"--resume: {checkpoints} has no finished checkpoint; start without --resume in another --run-dir")
    read_manifest(whole[-1])  # before models are built
    try:
        saved = load_config(folder / CONFIG)
    except MegaRLError:
        return  # of another version, or copied without it: the checkpoint's own checks remain
    failures = list(check_resume(config, saved))
    if failures:
        raise ConfigError("\n".join(failures))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with this process however that ends.

    The kernel keeps it (flock), so that nothing stays behind a killed run. The file says who holds it, for the one who meets it;
    where the file system has no flock, a living process of this machine is refused by that alone.
    """
    path = folder / LOCK
    held = [_open_lock(folder, path)]
    # ranks and workers are forks of this process: one that outlives it must not keep the lock
    os.register_at_fork(after_in_child=lambda: _close_all(held))
    try:
        with writes(path):
            os.ftruncate(held[0], 0)
            os.pwrite(held[0], json.dumps(_this_process()).encode() + b"\n", 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        _close_all(held)


def _open_lock(folder: Path, path: Path) -> int:
    """Lock the file; raises ConfigError where another run has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"run_dir {folder} cannot be written ({error.strerror}); choose another --run-dir") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in CANNOT_LOCK or _is_alive(_holder(path)):
                os.close(descriptor)
                raise ConfigError(_in_use(folder, _holder(path))) from error
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # the run that had it has just ended and removed it


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _holder(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    """Tell whether it is a process of this machine that still runs."""
    process = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    return _start_of(process) == holder.get("started")


def _start_of(process: int) -> str | None:
    """When it began, in the kernel's ticks since the machine did; with its id that names it. None when there is none (proc(5))."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _in_use(folder: Path, holder: dict[str, object]) -> str:
    who = f"host {holder.get('host', 'unknown')}, pid {holder.get('pid', 'unknown')}"
    return f"run_dir {folder} is in use by another run ({who}); wait until it ends, stop it, or choose another --run-dir"
