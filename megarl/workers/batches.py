"""Work that is shared out to processes of our own code, in batches, once: checks before a run begins.

Unlike the workers of a pool these run no code of others. They are plain subprocesses, as a process that holds torch and threads
cannot be forked safely.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from megarl.errors import MegaRLError, one_line

_BOOTSTRAP = "import sys; sys.path[:] = {path!r}; from megarl.workers.batches import serve; serve()"


def in_processes(build: str, argument: object, batches: Sequence[object], report: Callable[[int], None]) -> list[Any]:
    """Answer each batch, in their order, with as many processes as this one may use cores, up to 16.

    Args:
        build: ``module:function``, called with ``argument`` in each process; gives the function that answers a batch.
        argument: a JSON value.
        batches: JSON values; so are the answers.
        report: called with the number of batches that are answered, whenever one is.

    Raises:
        MegaRLError: a process could not answer, or ended.
    """
    num_processes = min(len(os.sched_getaffinity(0)), 16, len(batches))
    answers: list[object] = [None] * len(batches)
    numbers = iter(range(len(batches)))
    lock = threading.Lock()
    num_answered = 0

    def work(process: subprocess.Popen[bytes]) -> None:
        nonlocal num_answered
        _ask(process, {"build": build, "argument": argument})
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            answers[number] = _ask(process, batches[number])
            with lock:
                num_answered += 1
                report(num_answered)

    processes = [_start() for _ in range(num_processes)]
    try:
        with ThreadPoolExecutor(num_processes) as threads:
            for done in [threads.submit(work, process) for process in processes]:
                done.result()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return answers


def serve() -> None:
    """Be such a process: build the function of the first line of stdin, and answer each line after it, until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get among the answers
    function: Callable[[object], object] | None = None
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            if function is None:
                module, _, name = request["build"].partition(":")
                function = getattr(importlib.import_module(module), name)(request["argument"])
                answer: dict[str, object] = {"answer": None}
            else:
                answer = {"answer": function(request)}
        except Exception as error:  # whatever it is belongs to the parent, which names what was asked
            answer = {"failure": str(error) if isinstance(error, MegaRLError) else one_line(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = [sys.executable, "-c", _BOOTSTRAP.format(path=sys.path)]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _ask(process: subprocess.Popen[bytes], request: object) -> Any:
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    _send(stdin, request)
    line = stdout.readline()
    if not line:
        raise MegaRLError(f"a process that checks rows ended with code {process.wait()}; is there enough memory?")
    answer = json.loads(line)
    if "failure" in answer:
        raise MegaRLError(answer["failure"])
    return answer["answer"]


def _send(stdin: IO[bytes], request: object) -> None:
    try:
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, which reading its answer tells
