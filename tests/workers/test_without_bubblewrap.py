"""Workers on a machine that has no bubblewrap, or one that does not work: less is kept from them, and what needs it is refused."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym
import yaml

from hostile import PROGRAMS
from megarl.builtin.scorers import BaseScorer, PythonScorer, ReasoningGymScorer
from megarl.config.load import load_config
from megarl.config.schema import SandboxConfig
from megarl.errors import ConfigError
from megarl.rewards.process_pool import ScorerFailure, WorkerPool
from megarl.rewards.start_checks import refuse_evaluating_tasks
from megarl.workers.sandbox import find_sandbox

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True, params=["absent", "refused"])
def _no_bubblewrap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    if request.param == "refused":
        program = tmp_path / "bwrap"
        program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MEGARL_TEST_SECRET", "secret")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    find_sandbox.cache_clear()
    yield
    find_sandbox.cache_clear()
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def score(scorer: BaseScorer, response: str, reference: dict[str, Any], **settings: Any) -> Any:
    async def main() -> Any:
        pool = WorkerPool({"s": scorer}, 1, SandboxConfig(**settings), ["hostile"])
        try:
            return await pool.score("s", response, reference, 10)
        except ScorerFailure as failure:
            return str(failure)
        finally:
            await pool.close()

    return asyncio.run(main())


EXECUTE = PythonScorer(function="hostile:execute")


def test_it_says_so() -> None:
    sandbox = find_sandbox()
    assert sandbox.program is None
    assert "WITHOUT a sandbox" in sandbox.describe() and "install bubblewrap" in sandbox.describe()
    assert ("No permissions to create new namespace" in sandbox.reason) != ("no bubblewrap (bwrap) on PATH" in sandbox.reason)


@pytest.mark.parametrize("task", ["countdown", "spiral_matrix", "composite"])
def test_tasks_that_execute_answers_are_refused_at_the_start(task: str, tmp_path: Path) -> None:
    source = {"type": "reasoning_gym", "task": task}
    values: dict[str, Any] = {
        "kind": "rl",
        "steps": 1,
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "/model"},
        "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
        "evaluation": {"data": {"type": "mixture", "tasks": [{"name": "a", "source": source}]}},
        "rewards": {"scorers": [{"type": "exact"}]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    refuse_evaluating_tasks(load_config(path, []))  # nothing is executed by exact
    values["rewards"] = {"scorers": [{"type": "reasoning_gym"}]}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ConfigError, match=rf"^evaluation\.data\.tasks\.0\.source\.task: scoring {task} executes the answer"
    ) as error:
        refuse_evaluating_tasks(load_config(path, []))
    assert len(str(error.value)) <= 300 and "bubblewrap" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["binary_matrix", "puzzle24", "chain_sum"])
def test_an_answer_that_would_be_executed_is_not_scored(task: str, tmp_path: Path) -> None:
    entry = reasoning_gym.create_dataset(task, size=1, seed=0)[0]
    reference = {"task": task, "options": {}, "entry": entry, "answer": entry["answer"]}
    result = score(ReasoningGymScorer(), f"open('{tmp_path}/fired', 'w')", reference)
    assert not (tmp_path / "fired").exists()
    if task == "chain_sum":
        assert result == 0
    else:
        assert f"scoring {task} executes the answer, which needs bubblewrap" in result


def test_memory_environment_and_processes_are_bounded() -> None:
    assert score(EXECUTE, PROGRAMS["reads the environment"], {}) == 0.0
    assert "MemoryError" in score(EXECUTE, PROGRAMS["memory bomb"], {}, memory_gib=1)
    assert score(EXECUTE, PROGRAMS["fork bomb"], {}) == "its worker had more than rewards.sandbox.processes = 8 processes"


def test_children_end_with_the_worker(tmp_path: Path) -> None:
    program = """
import os, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sleep, ["sleep", "76543"])
        os._exit(0)
succeeded = True
"""
    assert score(EXECUTE, program, {"sleep": "/bin/sleep"}) == 1.0
    assert "no score within" in score(EXECUTE, program + "time.sleep(1000)", {"sleep": "/bin/sleep"})
    left = [process for process in psutil.process_iter(["cmdline", "status"]) if "76543" in (process.info["cmdline"] or ())]
    assert not [process for process in left if process.info["status"] != psutil.STATUS_ZOMBIE]
