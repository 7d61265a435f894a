"""A server in a process group of its own, watched and ended by its guard."""

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path

from megarl.errors import RolloutError

GUARD = Path(__file__).with_name("server_guard.py")
GRACE_SECONDS = 10.0
LOG_LINES_SHOWN = 3
LOG_LINE_LENGTH = 400  # characters shown of each


class ServerProcess:
    """One server started by the trainer.

    Between the trainer and the server stands a guard process (server_guard.py). It ends the server with all its children when the
    trainer closes it and also when the trainer is killed, which no clean-up code in the trainer could do.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log_path: Path) -> None:
        """Take the whole ``environment`` of the server; its output is written to ``log_path``, anew at each start."""
        self.name = name
        self.log_path = log_path
        self._command = command
        self._environment = environment
        self._guard: asyncio.subprocess.Process | None = None
        self.exited: asyncio.Task[int] | None = None

    async def start(self) -> None:
        """Start it; ``exited`` is then a task that ends with its exit code."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb") as log:
            self._guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(GUARD), str(os.getpid()), str(GRACE_SECONDS), *self._command),
                env=self._environment | {"PYTHONFAULTHANDLER": "1"},  # the guard makes use of it
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard reaches the trainer alone, which then closes the server
            )
        self.exited = asyncio.create_task(self._guard.wait())

    def death(self) -> RolloutError:
        """Return the error of a server that has exited."""
        assert self.exited is not None and self.exited.done()
        code = self.exited.result()
        killed_by = code - 128 if code > 128 else -code  # the server by its guard's account, or the guard itself
        how = f"was killed by {signal.Signals(killed_by).name}" if killed_by > 0 else f"exited with code {code}"
        return RolloutError(f"{self.name} {how}; its last words in {self.log_path}: {self.last_words()}")

    @property
    def guard_pid(self) -> int:
        """Process id of the guard, the parent of the server."""
        assert self._guard is not None
        return self._guard.pid

    async def close(self, *, write_stacks: bool = False) -> None:
        """End the server and all its children; returns when they are gone.

        Args:
            write_stacks: let each of its Python processes write first to the log what it is doing.
        """
        if self._guard is None or self.exited is None:
            return
        if not self.exited.done():
            self._guard.send_signal(signal.SIGUSR1 if write_stacks else signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self.exited), GRACE_SECONDS + 5)
        except TimeoutError:
            self._guard.kill()
            await self.exited

    def last_words(self) -> str:
        """Return the end of the log on one line; its lines that name errors where there are any."""
        lines = [line.strip() for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"[Ee]rror: ", line)]
        return " | ".join(line[:LOG_LINE_LENGTH] for line in (telling or lines)[-LOG_LINES_SHOWN:]) or "(nothing)"


def free_port(host: str, wanted: int, key: str) -> int:
    """Return ``wanted``, or a free port when it is 0.

    Raises:
        RolloutError: ``wanted``, the value of the configuration key ``key``, is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise RolloutError(
                f"port {wanted} of {host} cannot be used ({error.strerror}); set {key} to a free port, or to 0 for any"
            ) from error
        return int(probe.getsockname()[1])
