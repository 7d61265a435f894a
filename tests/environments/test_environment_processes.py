"""Environments in worker processes and on the event loop: what they answer, and how each of their failures is told."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.builtin.environments import PythonEnvironment
from megarl.builtin.environments.protocol import Step
from megarl.environments.run import EnvironmentFailure, Environments, open_environments
from megarl.errors import ConfigError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _user_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def worker_ids() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = worker_ids()
    yield
    assert worker_ids() <= before


def run(name: str, use: Callable[[Environments], Awaitable[Any]], **settings: Any) -> Any:
    config = PythonEnvironment.model_validate({"function": f"user_environments:{name}"} | settings)

    async def main() -> Any:
        environments = open_environments(config)
        try:
            return await use(environments)
        finally:
            await environments.close()

    return asyncio.run(main())


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize("name", ["Counting", "AsyncCounting"])
def test_episodes_at_the_same_time_keep_their_own_state(name: str, in_process: bool) -> None:
    async def use(environments: Environments) -> list[Any]:
        async def episode(number: int) -> list[Any]:
            state, seen = await environments.reset(f"prompt {number}", {"answer": number}, number + 100)
            answers = [seen]
            for word in ["go"] * number + ["stop"]:
                state, step = await environments.step(state, word)
                answers.append(step)
            return answers

        return await asyncio.gather(*(episode(number) for number in range(4)))

    for number, answers in enumerate(run(name, use, in_process=in_process, options={"bonus": 0.5})):
        expected: list[Any] = [f"prompt {number} {number} {number + 100}"]
        expected += [Step(observation=f"{turn}: go", reward=turn + 0.5, done=False) for turn in range(1, number + 1)]
        assert answers == [*expected, Step(observation=f"{number + 1}: stop", reward=number + 1.5, done=True)]


FAILURES = {
    "raises": r"^KeyError: 'two\\nlines'$",
    "nan": r"the reward nan, not a finite number or None$",
    "text_reward": r"the reward '1', not a finite number or None$",
    "number": r"the observation 3, not a text or None$",
    "pair": r"returned \('x', 1\.0\), not \(observation, reward, done\)$",
    "done_is_text": r"returned 'yes' for done, not True or False$",
    "nothing": r"no observation although the episode goes on$",
}
IN_WORKERS = {"exits": r"^its worker process ended with code 3$", "hangs": r"^no answer within rollout\.environment\.timeout = 1 s"}


@pytest.mark.parametrize(
    ("how", "in_process"), [(how, place) for how in FAILURES for place in (False, True)] + [(how, False) for how in IN_WORKERS]
)
def test_a_failure_has_its_reason_and_costs_no_other_episode_anything(how: str, in_process: bool) -> None:
    async def use(environments: Environments) -> str:
        other, _ = await environments.reset("", {}, 0)
        state, _ = await environments.reset("", {}, 0)
        state, first = await environments.step(state, "go")
        with pytest.raises(EnvironmentFailure) as failure:
            await environments.step(state, "now")
        _, after = await environments.step(other, "go")
        assert after.observation is not None
        is_same_process = after.observation == first.observation
        assert is_same_process == (how not in IN_WORKERS) or len(os.sched_getaffinity(0)) > 1
        return str(failure.value)

    reason = run("Bad", use, in_process=in_process, options={"how": how}, timeout=1 if how == "hangs" else 20)
    assert re.search(FAILURES.get(how) or IN_WORKERS[how], reason), reason


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Bad", {"options": {"how": "reset_number"}}, r"reset returned 3, not a text or None"),
        ("Bad", {"options": {"how": "unpicklable"}}, r"cannot be pickled between turns .*; set rollout.environment.in_process to"),
        ("AsyncCancelled", {"in_process": True}, "CancelledError"),
        ("AsyncExits", {"in_process": True}, "SystemExit: 3"),
        ("AsyncCancelled", {}, "CancelledError"),
        ("AsyncExits", {}, "SystemExit: 3"),
        ("AsyncHanging", {"in_process": True, "timeout": 0.1}, r"no answer within rollout\.environment\.timeout = 0\.1 seconds"),
    ],
)
def test_other_failures(name: str, settings: dict[str, Any], reason: str) -> None:
    async def use(environments: Environments) -> None:
        state, _ = await environments.reset("", {}, 0)
        await environments.step(state, "go")

    with pytest.raises(EnvironmentFailure, match=reason):
        run(name, use, **settings)


def test_a_reference_that_cannot_be_sent_is_a_failure() -> None:
    with pytest.raises(EnvironmentFailure, match="the reference cannot be sent to a worker"):
        run("Counting", lambda environments: environments.reset("", {"answer": lambda: 0}, 0))


def test_a_cancelled_step_ends_its_worker_and_never_answers_the_next() -> None:
    async def use(environments: Environments) -> Any:
        state, _ = await environments.reset("", {}, 0)
        stuck = asyncio.create_task(environments.step(state, "now"))
        await asyncio.wait({stuck}, timeout=0.2)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        return [(await environments.step(state, "go"))[1].done for _ in range(3)]

    assert run("Bad", use, options={"how": "hangs"}) == [False] * 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Missing", {}, r"cannot import user_environments:Missing: AttributeError"),
        ("NoStep", {}, r"user_environments:NoStep has no reset and step"),
        ("Bad", {"when": 1}, r"user_environments:Bad refuses options \{'when': 1\}: TypeError"),
    ],
)
def test_wrong_classes_and_options_are_found_at_the_start(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_environments(PythonEnvironment(function=f"user_environments:{name}", options=options))
