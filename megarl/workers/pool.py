"""A pool of worker processes, so that code of others that never returns can be killed.

Not multiprocessing: forking a process that holds torch, threads and a gloo group is unsafe, and its spawn would import the
run's main module, with torch, in every worker. These are plain subprocesses on the event loop.
"""

import asyncio
import contextlib
import os
import pickle
import sys
from typing import Any

from megarl.errors import MegaRLError, one_line
from megarl.workers.worker import FRAME_LENGTH, pack_frame

_START_TIMEOUT = 120.0  # seconds; importing the libraries from a busy shared file system can take most of it
_BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; from {module} import {function} as build; "
    "from megarl.workers.worker import main; main(build)"
)


class WorkerFailure(Exception):
    """What a worker was asked for raised, ran out of time, or ended its process; the message is the reason."""


class ProcessPool:
    """Up to ``num_workers`` processes, started when first needed and used from one event loop."""

    def __init__(self, build: str, argument: Any, num_workers: int, *, kind: str, error: type[MegaRLError]) -> None:
        """What the workers do.

        Args:
            build: ``module:function``, called in each worker with ``argument``; gives the function that answers requests.
            argument: can be pickled.
            num_workers: most processes.
            kind: what messages call them, e.g. ``"a scorer"``.
            error: raised when no worker can be started.
        """
        self._module, self._function = build.split(":")
        self._argument = argument
        self._kind = kind
        self._error = error
        self._free = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()

    async def ask(self, request: Any, timeout: float, late: str) -> Any:
        """The answer to a request; ``timeout`` seconds count from when a worker takes it.

        Raises:
            WorkerFailure: the answering function raised, ended its process, or ran out of time; ``late`` is then the reason.
            MegaRLError: of the pool's kind: no worker can be started.
        """
        try:
            frame = pack_frame(request)
        except Exception as error:  # an object of the dataset that cannot be pickled
            raise WorkerFailure(f"the reference cannot be sent to a worker: {one_line(error)}") from error
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            reusable = False
            try:
                async with asyncio.timeout(timeout):
                    answer, failure = await worker.ask(frame)
                reusable = True
            except TimeoutError:
                raise WorkerFailure(late) from None
            except asyncio.IncompleteReadError:
                raise WorkerFailure(f"its worker process ended with code {await worker.exit_code()}") from None
            finally:
                if reusable:
                    self._idle.append(worker)
                else:  # it may be stuck, or answer this request when the next one waits
                    await self._kill(worker)
        if failure is not None:
            raise WorkerFailure(failure)
        return answer

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``ask`` must have returned or been cancelled before."""
        self._idle.clear()
        await asyncio.gather(*(self._kill(worker) for worker in list(self._alive)))

    async def _start(self) -> "_Worker":
        worker = await _Worker.spawn(_BOOTSTRAP.format(path=sys.path, module=self._module, function=self._function))
        self._alive.add(worker)
        started = False
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                refusal = await worker.ask(pack_frame(self._argument))
            if refusal is not None:
                raise self._error(f"{self._kind} worker cannot start: {refusal}")
            started = True
        except TimeoutError:
            raise self._error(
                f"{self._kind} worker did not start in {_START_TIMEOUT:g} seconds; are its modules slow to import?"
            ) from None
        except asyncio.IncompleteReadError:
            code = await worker.exit_code()
            raise self._error(f"{self._kind} worker ended with code {code} while starting; its error output is above") from None
        finally:
            if not started:
                await self._kill(worker)
        return worker

    async def _kill(self, worker: "_Worker") -> None:
        self._alive.discard(worker)
        await worker.kill()


class _Worker:
    """One worker process; it answers one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def spawn(cls, program: str) -> "_Worker":
        # One thread each: workers are many and share their cores with the ranks.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment
        )
        return cls(process)

    async def ask(self, frame: bytes) -> Any:
        """Send a frame and wait for the answer; asyncio.IncompleteReadError when the process ends instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(frame)
        try:
            await stdin.drain()
        except ConnectionError as error:
            raise asyncio.IncompleteReadError(b"", None) from error
        (length,) = FRAME_LENGTH.unpack(await stdout.readexactly(FRAME_LENGTH.size))
        return pickle.loads(await stdout.readexactly(length))

    async def exit_code(self) -> int:
        return await self._process.wait()

    async def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended on its own in between
                self._process.kill()
        await self._process.wait()
