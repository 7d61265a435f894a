"""One worker for code that is not on an event loop: it waits for each answer."""

import os
import select
import subprocess
import time
import weakref
from typing import Any

from megarl.config.schema import SandboxConfig
from megarl.workers.answers import BrokenAnswer, Failure, check_length, new_token, unpack_answer
from megarl.workers.process import interpreter_arguments, told_end
from megarl.workers.process_tree import kill_tree
from megarl.workers.sandbox import find_sandbox, worker_environment
from megarl.workers.worker import FRAME_LENGTH, pack_request

_START_TIMEOUT = 120.0  # seconds


class CallTimeout(Exception):
    """No answer came in time."""


class Client:
    """Asks one worker, which is started when it is first needed and again after it was killed or this process was forked."""

    def __init__(self, build: str, argument: object, sandbox: SandboxConfig) -> None:
        """Take ``build`` and ``argument`` as ProcessPool does."""
        self._build = build
        self._argument = argument
        self._sandbox = sandbox
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started the worker
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def ask(self, request: object, timeout: float) -> Any:
        """Return the answer to a request, a JSON value.

        Raises:
            Failure: the answering function raised, or could not be made.
            BrokenAnswer: the worker ended without an answer, also a second one.
            CallTimeout: it did not answer within ``timeout`` seconds; it has been killed.
        """
        try:
            return self._ask_once(request, timeout)
        except BrokenAnswer:  # perhaps its thread here has ended, or something else has killed it
            return self._ask_once(request, timeout)

    def close(self) -> None:
        """End the worker, if one runs."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = None

    def _ask_once(self, request: object, timeout: float) -> Any:
        answered = False
        try:
            if self._worker is None or self._owner != os.getpid():
                self._start()
            answer = self._exchange(request, timeout)
            answered = True
            return answer
        except Failure:
            answered = True
            raise
        finally:
            if not answered:
                self.close()

    def _start(self) -> None:
        command = find_sandbox().command(interpreter_arguments(self._build, self._sandbox), self._sandbox, [])
        self._worker = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=worker_environment(self._sandbox),
            start_new_session=True,
        )
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._worker, self._owner)
        try:
            self._exchange(self._argument, _START_TIMEOUT)
        except Failure:
            self.close()
            raise

    def _exchange(self, request: object, timeout: float) -> Any:
        worker = self._worker
        assert worker is not None and worker.stdin is not None and worker.stdout is not None
        deadline = time.monotonic() + timeout
        token = new_token()
        frame = memoryview(pack_request(token, request))
        try:
            while frame:
                _wait(worker.stdin.fileno(), deadline, is_writing=True)
                frame = frame[os.write(worker.stdin.fileno(), frame[: select.PIPE_BUF]) :]
            (length,) = FRAME_LENGTH.unpack(self._read(worker, FRAME_LENGTH.size, deadline))
            payload = self._read(worker, check_length(length), deadline)
        except BrokenPipeError:
            raise BrokenAnswer(told_end(worker.wait())) from None
        return unpack_answer(payload, token)

    def _read(self, worker: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert worker.stdout is not None
        parts: list[bytes] = []
        while size:
            _wait(worker.stdout.fileno(), deadline, is_writing=False)
            part = os.read(worker.stdout.fileno(), min(size, 2**20))
            if not part:
                raise BrokenAnswer(told_end(worker.wait()))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _wait(file: int, deadline: float, *, is_writing: bool) -> None:
    poll = select.poll()
    poll.register(file, select.POLLOUT if is_writing else select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise CallTimeout


def _end(worker: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker, but not from a fork of the owner, whose worker it is not."""
    if os.getpid() == owner:
        if worker.poll() is None:
            kill_tree(worker.pid)
            worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                stream.close()
