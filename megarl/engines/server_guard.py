"""Runs a server so that none of its processes outlives the trainer.

    python -I server_guard.py PARENT_PID GRACE_SECONDS COMMAND...

The server leads a process group of its own. The guard ends that group (TERM, then KILL) when it gets TERM itself, when its parent
is gone for whatever reason, SIGKILL included, and when the server has died and left children behind. USR1 ends it too, but first
lets every Python process of the group write what it is doing. It exits with the server's exit code. Standard library only.
"""

import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.5
STACKS_SECONDS = 2.0  # for each process


def main() -> int:
    """Run the server to its end; its exit code, or as in a shell 128 + the signal that killed it."""
    parent, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    watched = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    # Blocked and collected with sigtimedwait, so that no signal falls between the checks of the loop.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    server = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: _unblock(watched),  # noqa: PLW1509 (the guard has one thread)
    )
    while server.poll() is None and os.getppid() == parent:
        received = signal.sigtimedwait(watched, POLL_SECONDS)
        # a launcher sends SIGUSR1 to every process of a job, and means the trainer, which asks for stacks with it
        is_for_all = received is not None and received.si_signo == signal.SIGUSR1 and received.si_pid != parent
        if received is not None and received.si_signo != signal.SIGCHLD and not is_for_all:
            if received.si_signo == signal.SIGUSR1:
                write_stacks(server)
            break
    end_group(server, grace)
    code = server.wait()
    return code if code >= 0 else 128 - code


def _unblock(watched: set[signal.Signals]) -> None:
    """Unblock signals in the server; SIGUSR1 is not for it, and would end it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)


def end_group(server: subprocess.Popen[bytes], grace: float) -> None:
    """End the server's process group by SIGTERM, and by SIGKILL what is left of it after ``grace`` seconds."""
    deadline = time.monotonic() + grace
    try:
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            server.poll()  # reaps it: a zombie would keep the group alive
            os.killpg(server.pid, 0)
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the group is empty


def write_stacks(server: subprocess.Popen[bytes]) -> None:
    """Abort the group: with PYTHONFAULTHANDLER set each Python process then writes the stacks of all its threads to its stderr."""
    for process in [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]:
        try:
            if os.getpgid(process) == server.pid:
                resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))  # no core file as large as the model
                ended = os.pidfd_open(process)
                os.kill(process, signal.SIGABRT)
                select.select([ended], [], [], STACKS_SECONDS)  # one after the other, else they write into each other's lines
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.exit(main())
