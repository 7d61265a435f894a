"""A process that has imported the command once and runs each job in a fork of it, two at a time.

``python warm_process.py`` reads a JSON list of jobs on one line of standard input and answers with a JSON list of what became of
each on one line, until its input ends. It is a process of its own, so that forks hold nothing of pytest and nothing of other tests.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRACE_SECONDS = 3.0  # for what ends with a job by itself
AT_ONCE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command to run.

    Attributes:
        arguments: the command's, after its name.
        program: ``megarl``, or the file of a tool.
        folder: where it runs, and where ``stdout`` and ``stderr`` go.
        seconds: its time limit.
        environment: variables beside this process's own.
    """

    arguments: list[str]
    program: str
    folder: str
    seconds: float
    environment: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a job.

    Attributes:
        status: exit status; minus the signal that killed it; None when its time was over.
        leftover: command names of processes that outlived it, which are dead now.
    """

    status: int | None
    seconds: float
    leftover: list[str]


def main() -> None:
    """Import, then serve."""
    import datasets
    import reasoning_gym  # noqa: F401
    import torch
    from torch.utils import tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import megarl.cli
    import megarl.loop.launch
    import megarl.weights.files.convert  # noqa: F401

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for line in sys.stdin:
        ended = run_all([Job(**job) for job in json.loads(line)])
        print(json.dumps([asdict(one) for one in ended]), flush=True)


def run_all(jobs: list[Job]) -> list[Ended]:
    """Run the jobs, in their order, a few at a time."""
    ended: dict[int, Ended] = {}
    running: dict[int, tuple[int, float]] = {}  # pid: index of the job, start
    waiting = list(enumerate(jobs))[::-1]
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            index, job = waiting.pop()
            running[start(job)] = (index, time.monotonic())
        time.sleep(0.005)
        for pid, (index, since) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - since
            if not done and seconds < jobs[index].seconds:
                continue
            leftover = end_session(pid, spare_leader=not done)
            code = os.waitstatus_to_exitcode(status) if done else None
            if not done:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            ended[index] = Ended(status=code, seconds=seconds, leftover=leftover if done else [])
            del running[pid]
    return [ended[index] for index in range(len(jobs))]


def start(job: Job) -> int:
    """Fork a process that runs the job in a session of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code: Any = 70
    try:
        os.setsid()
        os.chdir(job.folder)
        os.environ.update(job.environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = run_command(job)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def run_command(job: Job) -> int:
    """Run the command in this process as its entry point does; its exit status."""
    sys.argv = [job.program, *job.arguments]
    try:
        if job.program == "megarl":
            from megarl.cli import main as command

            command()
        else:
            import runpy

            runpy.run_path(job.program, run_name="__main__")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end_session(leader: int, *, spare_leader: bool) -> list[str]:
    """Kill the processes of a job's session that do not end by themselves; the names of those beside its leader.

    What ends with its parent does so a moment after it: the kernel's signal, or the end of a pipe, has to reach it first.
    """
    deadline = time.monotonic() + (0 if spare_leader else GRACE_SECONDS)
    while (members := members_of(leader, spare_leader=spare_leader)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(members.values())


def members_of(leader: int, *, spare_leader: bool) -> dict[int, str]:
    """The names of a session's living processes, by pid."""
    members = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, fields = (entry / "stat").read_text().rpartition(") ")
            state, _, _, session = fields.split()[:4]
            if int(session) == leader and state not in "ZX" and not (spare_leader and int(entry.name) == leader):
                members[int(entry.name)] = name.partition("(")[2]
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return members


if __name__ == "__main__":
    main()
