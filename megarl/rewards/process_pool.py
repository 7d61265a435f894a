"""Worker processes for scorers, so that one that never returns can be killed.

Not multiprocessing: forking a process that holds torch, threads and a gloo group is unsafe, and its spawn would import the
run's main module, with torch, in every worker. These are plain subprocesses on the event loop.
"""

import asyncio
import contextlib
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.errors import RewardError
from megarl.rewards.scorers import ScorerSpec, one_line
from megarl.rewards.worker import FRAME_LENGTH, pack_frame

_START_TIMEOUT = 120.0  # seconds; importing the scorers' libraries from a busy shared file system can take most of it
_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from megarl.rewards.worker import main; main()"


class ScorerFailure(Exception):
    """A scorer raised, ran out of time, or ended its process; the message is the reason."""


class WorkerPool:
    """Up to ``num_workers`` processes, started when first needed and used from one event loop."""

    def __init__(self, specs: Sequence[ScorerSpec], num_workers: int) -> None:
        self._specs = list(specs)
        self._free = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()

    async def score(self, name: str, response: str, reference: Mapping[str, Any], timeout: float) -> Any:
        """The score of the scorer of that name: a number, or a RuleScore of type document_qa.

        ``timeout`` seconds count from when a worker takes the request.

        Raises:
            ScorerFailure: the scorer raised, ran out of time or ended its process.
            RewardError: no worker can be started.
        """
        try:
            request = pack_frame((name, response, dict(reference)))
        except Exception as error:  # an object of the dataset that cannot be pickled
            raise ScorerFailure(f"the reference cannot be sent to a worker: {one_line(error)}") from error
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            reusable = False
            try:
                async with asyncio.timeout(timeout):
                    score, failure = await worker.ask(request)
                reusable = True
            except TimeoutError:
                raise ScorerFailure(f"no score within rewards.timeout = {timeout:g} seconds") from None
            except asyncio.IncompleteReadError:
                raise ScorerFailure(f"its worker process ended with code {await worker.exit_code()}") from None
            finally:
                if reusable:
                    self._idle.append(worker)
                else:  # it may be stuck, or answer this request when the next one waits
                    await self._kill(worker)
        if failure is not None:
            raise ScorerFailure(failure)
        return score

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``score`` must have returned or been cancelled before."""
        self._idle.clear()
        await asyncio.gather(*(self._kill(worker) for worker in list(self._alive)))

    async def _start(self) -> "_Worker":
        worker = await _Worker.spawn()
        self._alive.add(worker)
        started = False
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                refusal = await worker.ask(pack_frame(self._specs))
            if refusal is not None:
                raise RewardError(f"a scorer worker cannot start: {refusal}")
            started = True
        except TimeoutError:
            raise RewardError(
                f"a scorer worker did not start in {_START_TIMEOUT:g} seconds; are its modules slow to import?"
            ) from None
        except asyncio.IncompleteReadError:
            code = await worker.exit_code()
            raise RewardError(f"a scorer worker ended with code {code} while starting; its error output is above") from None
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
    async def spawn(cls) -> "_Worker":
        # One thread each: workers are many and share their cores with the ranks.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _BOOTSTRAP.format(path=sys.path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
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
