"""What responses that are executed can do: everything as a bare process, nothing in a worker."""

import asyncio
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym

from hostile import PROGRAMS
from megarl.builtin.scorers import BaseScorer, PythonScorer, ReasoningGymScorer
from megarl.builtin.scorers.reasoning_gym import READING_TASKS
from megarl.config.schema import SandboxConfig
from megarl.rewards.process_pool import ScorerFailure, WorkerPool
from megarl.workers.sandbox import find_sandbox

pytestmark = pytest.mark.timeout(120)

EVALUATING_TASKS = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
SMALL = SandboxConfig(memory_gib=1, processes=8)


@pytest.fixture(autouse=True)
def _user_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("MEGARL_TEST_SECRET", "secret")


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the programs want to get at."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "key").write_text("secret")
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    for server, address in zip(servers[1:], (f"{tmp_path}/socket", f"\0{tmp_path}"), strict=True):
        server.bind(address)
        server.listen()
    with subprocess.Popen(["sleep", "600"]) as victim:
        yield {"folder": str(tmp_path), "port": servers[0].getsockname()[1], "victim": victim.pid}
        victim.kill()
    for server in servers:
        server.close()


def test_this_machine_has_a_sandbox() -> None:
    assert find_sandbox().program is not None, f"{find_sandbox().reason}: apt install bubblewrap"


def hostile_pool(function: str, sandbox: SandboxConfig) -> WorkerPool:
    """One worker with one scorer, ``s``."""
    return WorkerPool({"s": PythonScorer(function=f"hostile:{function}")}, 1, sandbox, ["hostile"])


def scored(scorer: BaseScorer, requests: list[tuple[str, dict[str, Any]]], timeout: float = 30, **settings: Any) -> list[Any]:
    """The score of each response in turn by one worker, or the reason why there is none."""

    async def main() -> list[Any]:
        pool = WorkerPool({"s": scorer}, 1, SMALL.model_copy(update=settings), ["hostile"])
        results: list[Any] = []
        for response, reference in requests:
            try:
                results.append(await pool.score("s", response, reference, timeout))
            except ScorerFailure as failure:
                results.append(str(failure))
        await pool.close()
        return results

    return asyncio.run(main())


def execute_in_worker(*programs: str, values: dict[str, Any], timeout: float = 30, **settings: Any) -> list[Any]:
    return scored(PythonScorer(function="hostile:execute"), [(program, values) for program in programs], timeout, **settings)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_nothing(name: str, surroundings: dict[str, Any]) -> None:
    attempt, harmless = execute_in_worker(PROGRAMS[name], "succeeded = True", values=surroundings)
    assert attempt != 1.0, "the sandbox let it"
    assert not os.path.lexists(f"{surroundings['folder']}/fired")
    assert psutil.Process(surroundings["victim"]).status() != psutil.STATUS_ZOMBIE
    assert harmless == 1.0, "the next response pays for it"
    if name == "fork bomb":
        assert attempt == "its worker had more than rewards.sandbox.processes = 8 processes"
    if name == "memory bomb of several processes":
        assert attempt == "its worker used more than rewards.sandbox.memory_gib = 1 GiB"
    # the same as a bare process: it does work, so that the above says something
    code = f"values = {surroundings!r}\nexec({PROGRAMS[name]!r}, values)\nprint(values['succeeded'])"
    bare = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    line = bare.stdout.readline() if bare.stdout else ""
    os.killpg(bare.pid, signal.SIGKILL)
    bare.communicate()
    assert line == "True\n"


TASK_PAYLOADS = {
    "writes a file": "open('{folder}/fired', 'w')",
    "runs a program": "__import__('os').system('touch {folder}/fired')",
    "connects": "__import__('socket').create_connection(('127.0.0.1', {port})).send(b'fired')",
    "reads the environment": "open('{folder}/fired', 'w').write(__import__('os').environ['MEGARL_TEST_SECRET'])",
}


def test_the_answer_to_an_evaluating_task_does_nothing(
    surroundings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = {task: reasoning_gym.create_dataset(task, size=1, seed=3) for task in EVALUATING_TASKS}
    payloads = [payload.format(**surroundings) for payload in TASK_PAYLOADS.values()]
    wrong = "no answer at all"
    requests = []
    for task, dataset in datasets.items():
        reference = {"task": task, "options": {}, "entry": dataset[0], "answer": dataset[0]["answer"]}
        requests += [(answer, reference) for answer in (wrong, *payloads, takes_over(dataset), wrong)]
    results = iter(scored(ReasoningGymScorer(), requests, timeout=100))
    assert not (tmp_path / "fired").exists()
    for task, dataset in datasets.items():
        first, *attempts, last = (next(results) for _ in range(len(payloads) + 3))
        assert attempts == pytest.approx([first] * len(attempts), abs=0.06), task
        assert last == first < 0.1, task
        # in this process they do something
        monkeypatch.setattr(type(dataset), "score_answer", type(dataset).score_answer)
        dataset.score_answer(payloads[0], dataset[0])
        (tmp_path / "fired").unlink()
        dataset.score_answer(takes_over(dataset), dataset[0])
        assert dataset.score_answer(wrong, dataset[0]) == 1, task


def takes_over(dataset: Any) -> str:
    """An answer that makes every later one right, unless the process that it does so in is gone."""
    name = f"__import__('sys').modules['{type(dataset).__module__}'].{type(dataset).__name__}"
    return f"setattr({name}, 'score_answer', __import__('operator').is_not)"


def test_no_other_task_is_taken_for_one_that_only_reads() -> None:
    from reasoning_gym.factory import DATASETS

    assert set(DATASETS) - READING_TASKS == {*EVALUATING_TASKS, "composite"}
    assert not READING_TASKS - set(DATASETS)


FRAME_WRITERS = {
    "a pickle": "frame = pickled",
    "a huge length": "frame = (2**60).to_bytes(8, 'little') + b'x' * 100",
    "no JSON": "frame = (4).to_bytes(8, 'little') + b'xxxx'",
    "deep JSON": "frame = (50000).to_bytes(8, 'little') + b'[' * 50000",
    "another answer": "frame = (28).to_bytes(8, 'little') + b'{\"token\": 1, \"answer\": 1.0  }'",
}


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", FRAME_WRITERS)
def test_what_is_written_into_the_answers_is_not_taken_for_one(name: str, tmp_path: Path) -> None:
    payload = pickle.dumps(_Payload(f"{tmp_path}/fired"))
    program = f"""
import os, time
{FRAME_WRITERS[name]}
for number in range(3, 30):
    try:
        os.set_blocking(number, False)
        os.write(number, frame)
    except OSError:
        pass
succeeded = False
"""
    values = {"pickled": struct.pack("<Q", len(payload)) + payload}
    attempt, harmless = execute_in_worker(program, "succeeded = True", values=values)
    assert attempt != 1.0
    assert harmless == 1.0
    assert not (tmp_path / "fired").exists()
    pickle.loads(payload)  # the trainer of before did this
    assert (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("'x' * 10**6", "returned 'xxx"),
        ("10**400", "not a finite number"),
        ("float('nan')", "not a finite number"),
        ("[1.0]", "not a finite number"),
    ],
)
def test_an_answer_that_is_no_score_is_a_failure_in_one_short_line(value: str, reason: str) -> None:
    program = f"class F:\n    def __float__(self): raise TypeError({value!r})\n"
    program += f"import hostile\nhostile.float = lambda _: {value}\nsucceeded = 1"
    (attempt,) = execute_in_worker(program, values={})
    assert reason in attempt and len(attempt) <= 200 and attempt.isprintable()


def test_a_flood_of_prints_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    program = "for _ in range(2000): print('\\x1b[31mflood' * 10000)\nsucceeded = True"
    assert execute_in_worker(program, values={}) == [1.0]
    printed = capfd.readouterr()
    assert len(printed.err) + len(printed.out) < 200_000
    assert "\x1b" not in printed.err and "the rest is left out" in printed.err


def test_children_end_with_a_time_out_and_with_the_pool() -> None:
    program = """
import subprocess, time, os
for command in (["sleep", "54321"], ["setsid", "sleep", "54321"], ["sh", "-c", "setsid sleep 54321 & exit"]):
    subprocess.Popen(command)
succeeded = True
"""
    late, fine = execute_in_worker(program + "time.sleep(1000)", program, values={}, timeout=3)
    assert late == "no score within rewards.timeout = 3 seconds"
    assert fine == 1.0
    assert not [process for process in psutil.process_iter(["cmdline"]) if "54321" in (process.info["cmdline"] or [])]


def test_what_the_user_allows(surroundings: dict[str, Any], tmp_path: Path) -> None:
    allowed = {
        "network": True,
        "environment": ["MEGARL_TEST_SECRET"],
        "readable": [tmp_path / "run"],
        "writable": [tmp_path / "run"],
    }
    programs = [PROGRAMS[name] for name in ("connects to a port", "reads the environment", "reads a key")]
    programs.append("open(folder + '/run/written', 'w').write('x')\nsucceeded = True")
    assert execute_in_worker(*programs, values=surroundings, **allowed) == [1.0] * 4
    assert (tmp_path / "run" / "written").read_text() == "x"


def test_a_killed_worker_is_replaced_and_the_response_scored_again(tmp_path: Path) -> None:
    async def main(num_kills: int) -> tuple[Any, int]:
        for number in range(num_kills):
            (tmp_path / str(number)).touch()
        pool = hostile_pool("kill_worker", SandboxConfig(writable=[tmp_path]))
        try:
            return await pool.score("s", "four", {"folder": str(tmp_path)}, 30), pool.take_num_replaced()
        except ScorerFailure as failure:
            return str(failure), pool.take_num_replaced()
        finally:
            await pool.close()

    assert asyncio.run(main(2)) == (4.0, 2)
    assert asyncio.run(main(9)) == ("its worker process was killed by SIGKILL", 2)


def test_a_worker_that_is_killed_while_idle_is_replaced() -> None:
    async def main() -> tuple[float, float]:
        pool = hostile_pool("which_worker", SMALL)
        first = await pool.score("s", "", {}, 30)
        for process in psutil.Process().children(recursive=True):
            process.kill()
        second = await pool.score("s", "", {}, 30)
        await pool.close()
        return first, second  # type: ignore[return-value]

    first, second = asyncio.run(main())
    assert first != second
