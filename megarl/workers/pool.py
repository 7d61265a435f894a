"""A pool of worker processes, so that code of others that never returns can be killed, and does no harm (docs/sandbox.md).

Not multiprocessing: forking a process that holds torch, threads and a gloo group is unsafe, and its spawn would import the run's
main module, with torch, in every worker. These are plain subprocesses on the event loop.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from megarl.config.schema import SandboxConfig
from megarl.errors import MegaRLError, one_line
from megarl.workers.answers import BrokenAnswer, Failure, clean
from megarl.workers.process import WorkerProcess
from megarl.workers.process_tree import descendants, kill_tree, memory_of, resident_bytes
from megarl.workers.sandbox import find_sandbox, memory_bytes

_START_TIMEOUT = 120.0  # seconds; importing the libraries from a busy shared file system can take most of it
ATTEMPTS = 3  # a worker that is killed is replaced and asked again, but what kills it each time must not do so for ever
_WATCH_INTERVAL = 0.1  # seconds

logger = logging.getLogger(__name__)


class WorkerFailure(Exception):
    """What a worker was asked for raised, ran out of time, or ended its process; the message is the reason."""


class ProcessPool:
    """Up to ``num_workers`` processes, started when first needed and used from one event loop."""

    def __init__(
        self,
        build: str,
        argument: object,
        num_workers: int,
        *,
        kind: str,
        error: type[MegaRLError],
        sandbox: SandboxConfig,
        section: str,
        modules: Iterable[str] = (),
    ) -> None:
        """Say what the workers do.

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

    async def ask(self, request: object, timeout: float, late: str) -> Any:
        """Return the answer to a request, a JSON value; ``timeout`` seconds count from when a worker takes it.

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
        """Return how many workers ended before they had answered, and were replaced, since this was asked last."""
        taken, self._num_replaced = self._num_replaced, 0
        return taken

    async def close(self) -> None:
        """Kill all workers and wait for their end; calls of ``ask`` must have returned or been cancelled before."""
        self._idle.clear()
        await asyncio.gather(*(self._kill(worker) for worker in list(self._alive)))
        self._watch.close()

    async def _ask_once(self, request: object, timeout: float, late: str) -> Any:
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
        """End a worker; return why the watch ended it, empty if that did not."""
        self._alive.discard(worker)
        reason = self._watch.remove(worker.pid)
        await worker.kill()
        return reason


class Watch:
    """A thread that ends workers whose processes are too many or hold too much memory, until it is closed.

    The kernel bounds each process, but not all of a worker's together.

    Args:
        wrappers: how many of the processes below a root are the sandbox's own.
        memory: bytes that all processes of a worker may hold.
        processes: how many a worker may start at a time.
        section: of the configuration, for messages.
    """

    def __init__(self, *, wrappers: int, memory: int, processes: int, section: str) -> None:
        self._wrappers = wrappers
        self._memory = memory
        self._processes = processes
        self._section = section
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}  # by root: why it was ended, empty while it is well
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, root: int) -> None:
        """Watch the processes below ``root``."""
        with self._lock:
            self._reasons[root] = ""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="workers")
            self._thread.start()

    def remove(self, root: int) -> str:
        """Watch it no more, before it is reaped and its number is another's; why it was ended, empty if it was not from here."""
        with self._lock:
            return self._reasons.pop(root, "")

    def close(self) -> None:
        """End the watching thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._closing.clear()

    def _look(self) -> None:
        while not self._closing.wait(_WATCH_INTERVAL):
            for root in list(self._reasons):
                self._check(root, self._fault)

    def _check(self, root: int, fault: Callable[[int], str]) -> None:
        with self._lock:  # held while it is killed, so that it cannot be reaped meanwhile
            if self._reasons.get(root) == "" and (reason := fault(root)):
                self._reasons[root] = reason
                kill_tree(root)

    def _fault(self, root: int) -> str:
        below = descendants(root)
        if len(below) - self._wrappers > self._processes:
            return f"its worker had more than {self._section}.processes = {self._processes} processes"
        everything = [root, *below]
        if resident_bytes(everything) > self._memory and memory_of(everything) > self._memory:
            return f"its worker used more than {self._section}.memory_gib = {self._memory / 2**30:g} GiB"
        return ""
