import asyncio
import os
import re
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megarl.config.schema import RewardsConfig
from megarl.errors import ConfigError, RewardError
from megarl.rewards.combine import RewardScorer
from megarl.types import GREEDY_INDEX, FinishReason, Prompt, Rollout


@pytest.fixture(autouse=True)
def user_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def worker_ids():
    """Processes that this one started and that still run."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = worker_ids()
    yield
    assert worker_ids() <= before


def rollout(text="four", reference=None):
    prompt = Prompt(prompt_id="train/3", token_ids=(1,), text="2+2?", reference=reference or {"answer": "four"}, task="train")
    return Rollout(
        prompt=prompt,
        sample_index=5,
        token_ids=(),
        from_policy=(),
        logprobs=(),
        weight_versions=(),
        finish_reason=FinishReason.STOP,
        text=text,
    )


def python(function, **settings):
    return {"type": "python", "name": function, "function": f"user_rewards:{function}", **settings}


def decode(token_ids):
    """Each token is one character, so that places in tokens and text are the same."""
    return "".join(map(chr, token_ids))


def make_scorer(scorers, task_scorers=None, **settings):
    own = {task: RewardsConfig(scorers=of_task).scorers for task, of_task in (task_scorers or {}).items()}
    return RewardScorer(RewardsConfig(scorers=scorers, **settings), own, decode)


def run(scorers, use, **settings):
    """What ``use(reward_scorer)`` returns; the workers are closed after it."""

    async def main():
        reward_scorer = make_scorer(scorers, **settings)
        try:
            return await use(reward_scorer)
        finally:
            await reward_scorer.close()

    return asyncio.run(main())


def score_one(scorers, **settings):
    return run(scorers, lambda reward_scorer: reward_scorer.score(rollout()), **settings)


def test_reward_is_the_weighted_sum_of_sync_and_async_scorers():
    scored = score_one(
        [
            {"type": "exact", "weight": 2.0},
            {"type": "regex", "pattern": "x", "weight": 100.0},
            python("noisy_length", weight=0.5),
            python("async_length", weight=-1.0),
            python("judge"),
        ]
    )
    assert scored.parts == {"exact": 1.0, "regex": 0.0, "noisy_length": 4.0, "async_length": 4.0, "judge": 2.0}
    assert scored.reward == 2.0 + 0.5 * 4 - 4 + 2
    assert scored.failures == ()


FAILURES = [
    ("raises", r"KeyError: 'two\\nlines'"),
    ("exits", "its worker process ended with code 3"),
    ("returns_text", "returned '1.0', not a finite number"),
    ("returns_nan", "returned nan, not a finite number"),
    ("reads_level", "KeyError: 'level'"),
    ("async_never", r"no score within rewards.timeout = 0.2 seconds"),
    ("async_raises", "TimeoutError: the judge is away"),
    ("async_lets_cancellation_out", "CancelledError"),
    ("async_cancels_itself", "CancelledError"),
    ("async_exits", "SystemExit: 3"),
    ("async_interrupts", "KeyboardInterrupt"),
    ("async_takes_no_reference", "TypeError: .*takes 1 positional argument"),
    ("async_swallows_cancellation", r"no score within rewards.timeout = 0.2 seconds"),
    ("async_leaves_processes", r"no score within rewards.timeout = 0.2 seconds"),
    ("async_fails_and_leaves_processes", "ValueError: no score"),
    ("exits_by_exception", "SystemExit: 3"),
    ("is_cancelled", "CancelledError"),
    ("interrupts", "KeyboardInterrupt"),
]
SHORT = ("async_never", "async_swallows_cancellation", "async_leaves_processes")


@pytest.mark.parametrize(("function", "reason"), FAILURES)
def test_failure_policies(function, reason, caplog):
    scorers = [python(function), python("length", weight=2.0)]
    scored = score_one(scorers, on_failure="zero", timeout=0.2 if function in SHORT else 10)
    assert scored.reward == 8.0
    assert scored.parts == {"length": 4.0}
    (failure,) = scored.failures
    assert failure.startswith(f"{function} failed on train/3 sample 5: ")
    assert re.search(reason, failure)
    assert failure in caplog.messages
    left = [process for process in psutil.process_iter(["cmdline", "status"]) if "65432" in (process.info["cmdline"] or ())]
    assert not [process for process in left if process.info["status"] != psutil.STATUS_ZOMBIE]


def test_drop_and_stop_and_the_count():
    async def twice(reward_scorer):
        dropped = [await reward_scorer.score(rollout()) for _ in range(2)]
        return dropped, reward_scorer.failure_counts

    assert run([python("raises"), python("length")], twice, on_failure="drop") == ([None, None], {"raises": 2})
    with pytest.raises(RewardError, match="scorer raises failed on train/3 sample 5: KeyError"):
        score_one([python("raises")], on_failure="stop")


def test_a_failure_on_a_greedy_response_says_so(caplog):
    greedy = replace(rollout(), sample_index=GREEDY_INDEX)
    assert run([python("raises")], lambda reward_scorer: reward_scorer.score(greedy), on_failure="drop") is None
    (failure,) = caplog.messages
    assert failure.startswith("raises failed on train/3 greedy response: KeyError")


def test_a_reference_that_cannot_be_sent_is_a_failure():
    async def use(reward_scorer):
        return await reward_scorer.score(rollout(reference={"answer": "four", "lambda": lambda: 0}))

    scored = run([python("length")], use, on_failure="zero")
    assert "the reference cannot be sent to a worker" in scored.failures[0]


@pytest.mark.parametrize("blocking", ["loop", "pattern"])
def test_a_scorer_that_never_returns_is_killed_and_the_next_one_scored(blocking, tmp_path):
    (tmp_path / "started").touch()
    others = worker_ids()
    scorers, stuck, good = {
        "loop": ([python("loops_on_request", name="scorer")], "loop", "fine"),
        "pattern": ([{"type": "regex", "name": "scorer", "pattern": "^(a+)+$"}], "a" * 60 + "b", "aaa"),
    }[blocking]

    async def use(reward_scorer):
        before = await reward_scorer.score(rollout(good))
        workers = worker_ids() - others
        failed = await reward_scorer.score(rollout(stuck, {"started": str(tmp_path / "started")}))
        assert workers and not workers & worker_ids()
        after = await reward_scorer.score(rollout(good))
        return before, failed, after

    before, failed, after = run(scorers, use, on_failure="zero", timeout=0.5, concurrency=1, sandbox={"writable": [tmp_path]})
    assert "no score within" in failed.failures[0]
    assert before.parts["scorer"] > 0
    assert after.parts["scorer"] > 0
    if blocking == "loop":
        assert before.parts["scorer"] != after.parts["scorer"]


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "started")
    return str(tmp_path / "started")


async def start_loop(reward_scorer, pipe):
    """A task that scores a response whose scorer is now in an endless loop."""
    task = asyncio.create_task(reward_scorer.score(rollout("loop", {"started": pipe})))
    await asyncio.to_thread(Path(pipe).read_bytes)
    return task


def test_a_stuck_scorer_does_not_hold_up_the_event_loop(pipe):
    async def use(reward_scorer):
        judge = make_scorer([python("async_length")])
        stuck = await start_loop(reward_scorer, pipe)
        judged = await asyncio.gather(*(judge.score(rollout("quick")) for _ in range(3)))
        return [scored.reward for scored in judged], stuck.done(), (await stuck).failures

    rewards, was_done, failures = run([python("loops_on_request")], use, timeout=1, on_failure="zero", sandbox={"readable": [pipe]})
    assert rewards == [5.0] * 3
    assert not was_done
    assert "no score within" in failures[0]


def test_a_cancelled_request_ends_its_worker_and_never_answers_the_next(pipe):
    async def use(reward_scorer):
        first = await reward_scorer.score(rollout("ok"))
        stuck = await start_loop(reward_scorer, pipe)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        second = await reward_scorer.score(rollout("ok"))
        return first.reward, second.reward

    first, second = run([python("loops_on_request")], use, concurrency=1, sandbox={"readable": [pipe]})
    assert first != second


def test_a_worker_ends_with_the_run_even_while_its_scorer_loops(pipe, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import asyncio, sys\n"
        "from megarl.config.schema import SandboxConfig\n"
        "from megarl.rewards.process_pool import WorkerPool\n"
        "from megarl.builtin.scorers import PythonScorer\n"
        "scorer = PythonScorer(function='user_rewards:loops_on_request')\n"
        f"pool = WorkerPool({{'s': scorer}}, 1, SandboxConfig(readable=[{pipe!r}]), ['user_rewards'])\n"
        f"asyncio.run(pool.score('s', 'loop', {{'started': {pipe!r}}}, 1000))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run_process = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)
    with open(pipe) as started:
        started.read()
    (worker,) = Path(f"/proc/{run_process.pid}/task").glob(f"{run_process.pid}/children")
    worker_file = os.pidfd_open(int(worker.read_text()))
    run_process.kill()
    run_process.wait()
    assert select.select([worker_file], [], [], 30)[0], "the worker outlives its run"
    os.close(worker_file)


def test_many_responses_share_few_workers_in_any_order():
    others = worker_ids()

    async def use(reward_scorer):
        texts = ["x" * length for length in range(200)]
        scored = await asyncio.gather(*(reward_scorer.score(rollout(text)) for text in texts))
        return [entry.reward for entry in scored], len(worker_ids() - others)

    rewards, num_workers = run([python("length")], use)
    assert rewards == list(range(200))
    assert num_workers <= len(os.sched_getaffinity(0))


def test_math_and_reasoning_gym_in_workers():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0]
    reference = {"answer": entry["answer"], "task": "chain_sum", "options": {}, "entry": entry}

    async def use(reward_scorer):
        right = await reward_scorer.score(rollout(f"Answer: {entry['answer']}", reference))
        wrong = await reward_scorer.score(rollout("Answer: 123456", reference))
        return right.reward, wrong.parts["math"]

    pattern = r"Answer: (.*)"
    assert run([{"type": "math", "pattern": pattern}, {"type": "reasoning_gym", "pattern": pattern}], use) == (2.0, 0.0)


def test_a_worker_that_cannot_start_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match="ended with code 1 while starting"):
        score_one([{"type": "exact"}], on_failure="zero")


def test_wrong_functions_and_names_are_found_at_construction():
    with pytest.raises(ConfigError, match=r"cannot import user_rewards:lenght: .*has no attribute 'lenght'"):
        make_scorer([python("lenght")])
    with pytest.raises(ConfigError, match="2 scorers have the name 'exact'"):
        make_scorer([{"type": "exact"}, {"type": "exact"}])
    with pytest.raises(ConfigError, match="2 scorers have the name 'regex'"):
        make_scorer([], {"sums": [{"type": "regex", "pattern": "a"}] * 2})


def in_task(task, text="four"):
    plain = rollout(text)
    return replace(plain, prompt=replace(plain.prompt, task=task))


def test_each_task_is_scored_by_its_own_scorers_and_the_others_by_the_default():
    task_scorers = {
        "letters": [{"type": "regex", "name": "exact", "pattern": "o", "weight": 3.0}],
        "long": [python("length", weight=0.5), python("judge")],
    }

    async def use(reward_scorer):
        return [await reward_scorer.score(in_task(task)) for task in ("train", "letters", "long")]

    default, letters, long = run([{"type": "exact"}], use, task_scorers=task_scorers)
    assert (default.reward, dict(default.parts)) == (1.0, {"exact": 1.0})
    assert (letters.reward, dict(letters.parts)) == (3.0, {"exact": 1.0})
    assert (long.reward, dict(long.parts)) == (4.0, {"length": 4.0, "judge": 2.0})


def test_a_failure_names_the_scorer_of_the_task(caplog):
    own = {"sums": [python("raises")]}
    assert run([], lambda scorer: scorer.score(in_task("sums")), task_scorers=own, on_failure="drop") is None
    (failure,) = caplog.messages
    assert failure.startswith("sums/raises failed on train/3 sample 5: KeyError")


def of_tokens(text):
    plain = rollout(text)
    return replace(plain, token_ids=tuple(map(ord, text)))


@pytest.mark.parametrize("function", ["step_lengths", "async_step_lengths"])
def test_rewards_of_steps_stand_at_their_last_tokens(function):
    scorers = [
        python(function, step_separator="\n\n", weight=2.0),
        python("step_lengths", name="lines", step_separator="\n", weight=-1.0),
        {"type": "exact", "weight": 10.0},
    ]
    scored = run(scorers, lambda scorer: scorer.score(of_tokens("ab\n\nc\nd")))
    # "ab\n\n" of 4 ends at 3, "c\nd" of 3 with the response at 6; lines: 4 at 3, "c\n" of 2 at 5, "d" of 1 at 6
    assert scored.step_rewards == ((3, 2.0 * 4 - 4), (5, -2.0), (6, 2.0 * 3 - 1))
    assert scored.parts == {function: 3.5, "lines": 7 / 3, "exact": 0.0}
    assert scored.reward == pytest.approx(2.0 * 3.5 - 7 / 3)
    empty = run(scorers, lambda scorer: scorer.score(of_tokens("")))
    assert (empty.step_rewards, empty.parts[function]) == ((), 0.0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("one_step_too_few", "returned 1 numbers, not a list with one number for each of 2 steps"),
        ("length", "returned 2, not a list with one number for each of 2 steps"),
        ("nan_of_a_step", "returned nan, not a finite number"),
    ],
)
def test_wrong_rewards_of_steps_are_failures(function, reason):
    scorers = [python(function, step_separator="\n")]
    scored = run(scorers, lambda scorer: scorer.score(of_tokens("a\nb")), on_failure="zero")
    assert reason in scored.failures[0]
    assert (scored.step_rewards, scored.reward) == ((), 0.0)
