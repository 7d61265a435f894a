"""Runs a server so that none of its processes outlives the trainer.

    python -I server_guard.py PARENT_PID GRACE_SECONDS COMMAND...

The server leads a process group of its own. The guard ends that group (TERM, then KILL) when it gets TERM itself, when its parent
is gone for whatever reason, SIGKILL included, and when the server has died and left children behind. It exits with the
server's exit code. Standard library only.
"""

import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5


def main() -> int:
    """Run the server to its end; its exit code, or as in a shell 128 + the signal that killed it."""
    parent, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    watched = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    # Blocked and collected with sigtimedwait, so that no signal falls between the checks of the loop.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    server = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, watched),  # noqa: PLW1509 (the guard has one thread)
    )
    while server.poll() is None and os.getppid() == parent:
        received = signal.sigtimedwait(watched, POLL_SECONDS)
        if received is not None and received.si_signo != signal.SIGCHLD:
            break
    end_group(server, grace)
    code = server.wait()
    return code if code >= 0 else 128 - code


def end_group(server: subprocess.Popen[bytes], grace: float) -> None:
    """TERM the server's process group, KILL what is left of it after ``grace`` seconds."""
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


if __name__ == "__main__":
    sys.exit(main())
