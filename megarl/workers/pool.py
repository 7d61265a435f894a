"""A pool of worker processes, so that code of others that never returns can be killed, and does no harm (docs/sandbox.md).

Not multiprocessing: forking a process that holds torch, threads and a gloo group is unsafe, and its spawn would import the run's
main module, with torch, in every worker. These are plain subprocesses on the event loop.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from megarl.config.schema import SandboxConfig
from megarl.errors import MegaRLError, one_line
from megarl.workers.answers import BrokenAnswer, Failure, clean
from megarl.workers.process import WorkerProcess
from megarl.workers.sandbox import find_sandbox, memory_bytes
from megarl.workers.watch import Watch

_START_TIMEOUT = 120.0  # seconds; importing the libraries from a busy shared file system can take most of it
ATTEMPTS = 3  # a worker that is killed is replaced and asked again, but what kills it each time must not do so for ever

logger = logging.getLogger(__name__)


class WorkerFailure(Exception):
    """What a worker was asked for raised, ran out of time, or ended its process; the message is the reason."""


class ProcessPool:
    """Up to ``num_workers`` processes, started when first needed and used from one event loop."""

    def __init__(
        self,
        build: str,
        argument: Any,
        num_workers: int,
        *,
        kind: str,
        error: type[MegaRLError],
        sandbox: SandboxConfig,
        section: str,
        modules: Iterable[str] = (),
    ) -> None:
        """What the workers do.

        Args:
            build: ``module:function``, called in each worker with ``argument``; gives the function that answers requests with what
                JSON has.
            argument: can be pickled.
            num_workers: most processes.
            kind: what messages call them, e.g. ``"a scorer"``.
            error: raised when no worker can be started.
            sandbox: what they may do.
            section: where that is configured, for messages.
            modules: of the user, that they import.
        """
        self._build = build
        self._argument = argument
        self._kind = kind
        self._error = error
        self._sandbox = sandbox
        self._section = section
        self._modules = tuple(modules)
        self._free = asyncio.Semaphore(num_workers)
        self._idle: list[WorkerProcess] = []
        self._alive: set[WorkerProcess] = set()
        self._watch = Watch(
            wrappers=find_sandbox().num_wrappers,
            memory=memory_bytes(sandbox),
            processes=sandbox.processes,
            section=section,
        )
        self._num_replaced = 0

    async def ask(self, request: Any, timeout: float, late: str) -> Any:
        """The answer to a request, a JSON value; ``timeout`` seconds count from when a worker takes it.

        A worker that ends before it has answered is replaced and the new one asked, ``ATTEMPTS`` times in all.

        Raises:
            WorkerFailure: the answering function raised, ended its process each time, or ran out of time, then for reason ``late``.
            MegaRLError: of the pool's kind: no worker can be started.
        """
        async with self._free:
            for _ in range(ATTEMPTS - 1):
                try:
                    return await self._ask_once(request, timeout, late)
                except BrokenAnswer as broken:
                    self._num_replaced += 1
                    logger.warning("%s worker is replaced and asked again: %s", self._kind, broken)
            try:
                return await self._ask_once(request, timeout, late)
            except BrokenAnswer as broken:
                raise WorkerFailure(str(broken)) from broken

    async def check(self) -> None:
        """Start one worker, so that what keeps workers from starting is known before it costs anything.

        Raises:
            MegaRLError: of the pool's kind: it cannot be started.
        """
        if not self._alive:
            self._idle.append(await self._start())

    def take_num_replaced(self) -> int:
        """How many workers ended before they had answered, and were replaced, since this was asked last."""
        taken, self._num_replaced = self._num_replaced, 0
        return taken

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``ask`` must have returned or been cancelled before."""
        self._idle.clear()
        await asyncio.gather(*(self._kill(worker) for worker in list(self._alive)))
        self._watch.close()

    async def _ask_once(self, request: Any, timeout: float, late: str) -> Any:
        worker = self._idle.pop() if self._idle else await self._start()
        reusable = False
        reason = ""
        try:
            async with asyncio.timeout(timeout):
                answer = await worker.ask(request)
            reusable = True
            return answer
        except Failure as failure:
            reusable = True
            raise WorkerFailure(str(failure)) from None
        except TimeoutError:
            raise WorkerFailure(late) from None
        except BrokenAnswer as broken:
            reason = str(broken)
        except Exception as error:  # an object of the dataset that cannot be pickled
            reusable = True
            raise WorkerFailure(f"the reference cannot be sent to a worker: {one_line(error)}") from error
        finally:
            if reusable:
                self._idle.append(worker)
            else:  # it may be stuck, or answer this request when the next one waits
                ended_because = await self._kill(worker)
        if ended_because:
            raise WorkerFailure(ended_because)
        raise BrokenAnswer(reason)

    async def _start(self) -> WorkerProcess:
        worker = await WorkerProcess.start(self._build, self._sandbox, self._modules)
        self._alive.add(worker)
        self._watch.add(worker.pid)
        started = False
        reason = ""
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await worker.ask(self._argument)
            started = True
        except Failure as failure:
            reason = f"cannot start: {failure}"
        except TimeoutError:
            reason = f"did not start in {_START_TIMEOUT:g} seconds; are its modules slow to import?"
        except BrokenAnswer as broken:
            reason = f"{str(broken).removeprefix('its worker process ')} while starting"
        finally:
            if not started:
                reason = await self._kill(worker) or reason
        if not started:
            printed = f" ({clean(worker.last_words)})" if worker.last_words else ""
            raise self._error(f"{self._kind} worker {reason}{printed}; see docs/sandbox.md for what {self._section} lets it do")
        return worker

    async def _kill(self, worker: WorkerProcess) -> str:
        """Its end; why the watch ended it, empty if that did not."""
        self._alive.discard(worker)
        reason = self._watch.remove(worker.pid)
        await worker.kill()
        return reason
