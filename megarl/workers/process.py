"""One worker process as the trainer's event loop sees it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from megarl.config.schema import SandboxConfig
from megarl.workers.answers import BrokenAnswer, check_length, clean, new_token, unpack_answer
from megarl.workers.process_tree import kill_tree
from megarl.workers.sandbox import find_sandbox, memory_bytes, worker_environment
from megarl.workers.worker import FRAME_LENGTH, pack_request

_BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; from megarl.workers.worker import main; from {module} import {function} as build; "
    "main(build, memory={memory}, processes={processes}, is_apart={is_apart})"
)
_MAX_PRINTED = 65536  # bytes of what one worker prints that are shown; responses decide how much that is


def interpreter_arguments(build: str, sandbox: SandboxConfig) -> list[str]:
    """Return the arguments that make Python a worker, which answers with what ``build``, ``module:function``, gives."""
    module, function = build.split(":")
    program = _BOOTSTRAP.format(
        path=[os.path.abspath(entry) for entry in sys.path],
        module=module,
        function=function,
        memory=memory_bytes(sandbox),
        processes=sandbox.processes,
        is_apart=find_sandbox().program is not None,
    )
    return ["-c", program]


class WorkerProcess:
    """One worker process; it answers one request at a time.

    Attributes:
        last_words: the end of what it printed.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process = process
        self._requests, self._answers = process.stdin, process.stdout
        self._printing = asyncio.create_task(self._show(process.stderr))
        self.last_words = ""

    @classmethod
    async def start(cls, build: str, sandbox: SandboxConfig, modules: Iterable[str]) -> "WorkerProcess":
        """Start one worker process."""
        command = find_sandbox().command(interpreter_arguments(build, sandbox), sandbox, modules)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=worker_environment(sandbox), start_new_session=True
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process that was started, which is the sandbox's where there is one."""
        return self._process.pid

    async def ask(self, request: object) -> Any:
        """Send a request and wait for the answer.

        Raises:
            Failure: the answering function raised.
            BrokenAnswer: the process ended instead, or wrote something else.
        """
        token = new_token()
        frame = pack_request(token, request)
        try:
            self._requests.write(frame)
            await self._requests.drain()
            (length,) = FRAME_LENGTH.unpack(await self._answers.readexactly(FRAME_LENGTH.size))
            payload = await self._answers.readexactly(check_length(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise BrokenAnswer(told_end(await self._exit_code())) from None
        return unpack_answer(payload, token)

    async def kill(self) -> None:
        """End it with all that it started."""
        if self._process.returncode is None:
            await asyncio.to_thread(kill_tree, self._process.pid)
        await self._process.wait()
        if find_sandbox().program is None:  # its own end leaves children to others; those of its session die
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._printing.cancel()
        await asyncio.gather(self._printing, return_exceptions=True)

    async def _exit_code(self) -> int:
        code = await self._process.wait()
        await asyncio.wait({self._printing}, timeout=1)  # its last words
        return code

    async def _show(self, stream: asyncio.StreamReader) -> None:
        """Print what it prints, up to a limit and without control characters."""
        num_shown = 0
        while chunk := await stream.read(65536):
            text = chunk.decode(errors="replace")
            self.last_words = (self.last_words + text)[-200:]
            if num_shown < _MAX_PRINTED:
                for line in text[: _MAX_PRINTED - num_shown].splitlines():
                    print(clean(line), file=sys.stderr)
                num_shown += len(text)
                if num_shown >= _MAX_PRINTED:
                    print(f"(a worker has printed {_MAX_PRINTED} characters; the rest is left out)", file=sys.stderr)


def told_end(code: int) -> str:
    """Tell what became of a process that ended with this code."""
    number = -code if code < 0 else code - 128  # bubblewrap ends with 128 and the signal that ended the worker
    if 0 < number < signal.NSIG:
        with contextlib.suppress(ValueError):
            return f"its worker process was killed by {signal.Signals(number).name}"
    return f"its worker process ended with code {code}"
