"""The collector over a real embedded engine, and over one that fails where a test wants it to."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megarl.config.schema import Config, EmbeddedEngineConfig
from megarl.data.packing import pack_groups
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation, SamplingParams
from megarl.errors import RolloutError
from megarl.rollout.collect_result import CollectResult
from megarl.rollout.collector import Collector
from megarl.types import GREEDY_INDEX, FinishReason, PackedBatch, Prompt, Rollout, RolloutGroup, ScoredRollout
from tiny_rollout import exported_weights, make_tiny_model, weight_shapes


class FailingEngine:
    """Answers with the prompt's first token; ``fail(first_token, attempt)`` may raise or wait first."""

    def __init__(self, fail: Callable[[int, int], Any] = lambda token, attempt: None) -> None:
        self.fail = fail
        self.dead = ""
        self.attempts: dict[int, int] = {}
        self.now = self.most = 0

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None: ...

    async def health(self) -> None:
        if self.dead:
            raise RolloutError(self.dead)

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        token = prompt_token_ids[0]
        self.attempts[token] = self.attempts.get(token, 0) + 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            waiting = self.fail(token, self.attempts[token])
            await (waiting if waiting is not None else asyncio.sleep(0))
        finally:
            self.now -= 1
        one = Generation(token_ids=(token,), logprobs=(-0.5,), weight_versions=(0,), finish_reason=FinishReason.STOP)
        return [one] * sampling.num_samples


class PromptSource:
    """Endless prompts ``task/0``, ``task/1`` ... whose first token is their number."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __call__(self, count: int, held: Mapping[str, int]) -> list[Prompt]:
        start = sum(self.taken)
        self.taken.append(count)
        return [make_prompt(number) for number in range(start, start + count)]


def make_prompt(number: int) -> Prompt:
    return Prompt(prompt_id=f"task/{number}", token_ids=(number % 90, 1, 2), text=str(number), reference={}, task="task")


def scored(rollout: Rollout, reward: float) -> ScoredRollout:
    return ScoredRollout(rollout=rollout, reward=reward, parts={}, step_rewards=(), failures=())


async def score_by_length(rollout: Rollout) -> ScoredRollout:
    return scored(rollout, float(len(rollout.token_ids)))


def make_config(
    *,
    stall: float = 60.0,
    dynamic: bool = False,
    over_sampling: float = 1.0,
    max_surplus_age: int = 1,
    tasks: Sequence[str] = (),
    evaluation: dict[str, Any] | None = None,
    **rollout: Any,
) -> Config:
    rows: dict[str, Any] = {"type": "jsonl", "path": "unused.jsonl"}
    data: dict[str, Any] = {"train": rows}
    if tasks:
        data["train"] = {"type": "mixture", "tasks": [{"name": name, "source": rows} for name in tasks]}
        data["sampling"] = {"mixture": "balanced"}
    leftover = {"over_sampling": over_sampling, "max_surplus_age": max_surplus_age}
    settings = {"prompts_per_step": 6, "samples_per_prompt": 4, "max_new_tokens": 6, "request_timeout": 30.0, "max_retries": 2}
    return Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "seed": 7,
            "model": {"path": "unused"},
            "data": data,
            "algorithm": {"max_sampling_waves": 5, "dynamic_sampling": dynamic} | leftover,
            "observe": {"stall_warning": stall},
            "evaluation": evaluation or {},
            "rollout": settings | rollout,
        }
    )


def make_collector(
    engine: Any, score: Any = score_by_length, warnings: list[str] | None = None, *, with_greedy: bool = False, **config: Any
) -> Collector:
    return Collector(
        engine,
        make_config(**config),
        stop_token_ids=(),
        decode=lambda ids: " ".join(map(str, ids)),
        score=score,
        warn=(warnings if warnings is not None else []).append,
        with_greedy=with_greedy,
    )


def collect(engine: Any, num_groups: int = 6, *, source: Any = None, **options: Any) -> CollectResult:
    collector = make_collector(engine, prompts_per_step=num_groups, **options)
    return asyncio.run(collector.collect(source or PromptSource(), step=3))


def embedded(folder: Path, model: PreTrainedModel, use: Callable[[EmbeddedEngine], Any]) -> Any:
    async def run() -> Any:
        engine = EmbeddedEngine(folder, torch.float32, EmbeddedEngineConfig(batch_size=8, threads=1), weight_shapes(model))
        await engine.start()
        await engine.update_weights(exported_weights(model), 9)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_groups_come_in_prompt_order_whatever_completes_first(model_folder: Path) -> None:
    """Scorers that end in the opposite order, and one prompt at a time for the engine, change nothing at all."""

    def run(order: Sequence[int], concurrency: int) -> CollectResult:
        events = [asyncio.Event() for _ in range(6)]

        async def score(rollout: Rollout) -> ScoredRollout:
            number = int(rollout.prompt.text)
            place = order.index(number)
            if place > 0:
                await events[order[place - 1]].wait()
            if rollout.sample_index == 3:
                events[number].set()
            return scored(rollout, float(number))

        async def use(engine: EmbeddedEngine) -> CollectResult:
            return await make_collector(engine, score, concurrency=concurrency).collect(PromptSource(), step=3)

        return embedded(model_folder, make_tiny_model(0), use)

    forward, backward = run(range(6), 64), run([5, 4, 3, 2, 1, 0], 64)
    assert forward.groups == backward.groups  # token ids, log-probs, rewards: bit for bit
    assert [group.prompt.prompt_id for group in forward.groups] == [f"task/{number}" for number in range(6)]
    one_at_a_time = run(range(6), 1)
    for group, other in zip(forward.groups, one_at_a_time.groups, strict=True):
        assert [one.rollout.sample_index for one in group.rollouts] == [0, 1, 2, 3]
        assert [one.rollout.token_ids for one in group.rollouts] == [one.rollout.token_ids for one in other.rollouts]
        assert {version for one in group.rollouts for version in one.rollout.weight_versions} == {9}
        assert [one.rollout.text for one in group.rollouts] == [" ".join(map(str, one.rollout.token_ids)) for one in group.rollouts]


@pytest.mark.parametrize("concurrency", [1, 64])
def test_prompts_of_one_document_are_sent_one_after_the_other(concurrency: int) -> None:
    first, second = (7, 7, 7, 7), (3, 9)
    documents = [(*first, 2), (*second, 5), (1, 1), (*first, 1), (*second, 4), (*first, 2, 6)]
    sent: list[tuple[int, ...]] = []

    class Recording(FailingEngine):
        async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
            sent.append(prompt_token_ids)
            return await super().generate(prompt_token_ids, sampling)

    def take(count: int, held: Mapping[str, int]) -> list[Prompt]:
        return [replace(make_prompt(number), token_ids=ids) for number, ids in enumerate(documents)]

    result = collect(Recording(), source=take, concurrency=concurrency)
    assert sent == [(1, 1), (3, 9, 4), (3, 9, 5), (7, 7, 7, 7, 1), (7, 7, 7, 7, 2), (7, 7, 7, 7, 2, 6)]
    assert [group.prompt.token_ids for group in result.groups] == documents
    assert [group.rollouts[0].rollout.prompt for group in result.groups] == [group.prompt for group in result.groups]


def test_seeds_differ_by_position_and_step_and_repeat_between_runs(model_folder: Path) -> None:
    def run(step: int) -> list[tuple[int, ...]]:
        def same_prompt(count: int, held: Mapping[str, int]) -> list[Prompt]:
            return [make_prompt(5)] * count

        async def use(engine: EmbeddedEngine) -> CollectResult:
            return await make_collector(engine, prompts_per_step=3).collect(same_prompt, step=step)

        groups = embedded(model_folder, make_tiny_model(0), use).groups
        return [one.rollout.token_ids for group in groups for one in group.rollouts]

    assert run(1) == run(1)
    assert len(set(run(1) + run(2))) == 24


def test_dynamic_sampling_asks_for_exactly_what_is_missing() -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        informative = int(rollout.prompt.text) % 3 == 0
        return scored(rollout, 1.0 if informative and rollout.sample_index == 3 else 0.0)

    source = PromptSource()
    result = collect(FailingEngine(), 4, source=source, score=score, dynamic=True)
    assert source.taken == [4, 2, 2, 1, 1]  # tasks 0-3 keep 0 and 3; 4-5 none; 6-7 keep 6; 8 none; 9 is kept
    assert [group.prompt.text for group in result.groups] == ["0", "3", "6", "9"]
    assert [group.prompt.text for group in result.filtered] == ["1", "2", "4", "5", "7", "8"]
    assert (result.stats.waves, result.stats.dropped_filtered, result.stats.dropped_unscored) == (5, 6, 0)


async def score_thirds(rollout: Rollout) -> ScoredRollout:
    """Only every third prompt teaches something."""
    informative = int(rollout.prompt.text) % 3 == 0
    return scored(rollout, 1.0 if informative and rollout.sample_index == 3 else 0.0)


def texts(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.prompt.text for group in groups]


def test_leftover_groups_are_used_by_the_next_step_and_then_dropped() -> None:
    async def run() -> tuple[list[CollectResult], Collector]:
        collector = make_collector(FailingEngine(), score_thirds, prompts_per_step=2, dynamic=True, over_sampling=6.0)
        return [await collector.collect(source, step=step) for step in (4, 5, 7)], collector

    source = PromptSource()
    (first, second, third), collector = asyncio.run(run())
    assert source.taken == [12, 12]  # the second step has what it needs already
    assert [texts(result.groups) for result in (first, second, third)] == [["0", "3"], ["6", "9"], ["12", "15"]]
    assert (len(first.sampled), second.sampled, len(third.sampled)) == (12, (), 12)
    assert [(one.stats.reused, one.stats.surplus, one.stats.waves) for one in (first, second, third)] == [
        (0, 2, 1),
        (2, 0, 0),
        (0, 2, 1),
    ]
    assert texts([one.group for one in collector.leftover]) == ["18", "21"]

    async def two_steps_later() -> CollectResult:
        return await collector.collect(PromptSource(), step=9)

    late = asyncio.run(two_steps_later())
    assert (late.stats.dropped_surplus, late.stats.reused, texts(late.groups)) == (2, 0, ["0", "3"])


def test_leftover_groups_may_wait_longer_and_is_saved_whole(model_folder: Path) -> None:
    """A collector that goes on from what a checkpoint keeps gives the same batches as the one that was not interrupted."""
    options: dict[str, Any] = {
        "prompts_per_step": 2,
        "dynamic": True,
        "over_sampling": 4.0,
        "max_surplus_age": 3,
        "with_greedy": True,
    }

    async def use(engine: EmbeddedEngine) -> tuple[CollectResult, CollectResult]:
        source, copy = PromptSource(), PromptSource()
        collector = make_collector(engine, score_first_token, **options)
        first = await collector.collect(source, step=1)
        assert 0 < len(collector.leftover) <= 6
        saved = json.loads(json.dumps(collector.state()))
        resumed = make_collector(engine, score_first_token, **options)
        resumed.restore(saved, lambda prompt_id: make_prompt(int(prompt_id.removeprefix("task/"))))
        copy(sum(source.taken), {})
        assert first.stats.reused == 0
        return await collector.collect(source, step=3), await resumed.collect(copy, step=3)

    async def score_first_token(rollout: Rollout) -> ScoredRollout:
        reward = float(rollout.token_ids[0])
        return ScoredRollout(rollout=rollout, reward=reward, parts={"one": reward}, step_rewards=((1, reward),), failures=("f",))

    whole, resumed = embedded(model_folder, make_tiny_model(0), use)
    assert whole.stats.reused > 0
    ours, theirs = pack_groups(whole.groups), pack_groups(resumed.groups)
    for field in fields(PackedBatch):
        torch.testing.assert_close(getattr(ours, field.name), getattr(theirs, field.name), rtol=0, atol=0, equal_nan=True)
    assert [[(one.reward, one.parts, one.failures, one.rollout.text) for one in group.rollouts] for group in whole.groups] == [
        [(one.reward, one.parts, one.failures, one.rollout.text) for one in group.rollouts] for group in resumed.groups
    ]


def test_a_balanced_step_leaves_what_is_too_many_of_one_task_for_the_next() -> None:
    class ByTurns(PromptSource):
        def __call__(self, count: int, held: Mapping[str, int]) -> list[Prompt]:
            prompts = super().__call__(count, held)
            return [replace(prompt, task="ab"[int(prompt.text) % 2]) for prompt in prompts]

    async def score(rollout: Rollout) -> ScoredRollout:  # of task b only every third prompt teaches
        teaches = rollout.prompt.task == "a" or int(rollout.prompt.text) % 3 == 0
        return scored(rollout, float(rollout.sample_index) if teaches else 0.0)

    async def run() -> tuple[CollectResult, list[RolloutGroup]]:
        options: dict[str, Any] = {"prompts_per_step": 4, "dynamic": True, "over_sampling": 2.0, "tasks": ("a", "b")}
        collector = make_collector(FailingEngine(), score, **options)
        return await collector.collect(ByTurns(), step=0), [one.group for one in collector.leftover]

    result, leftover = asyncio.run(run())
    assert texts(result.groups) == ["0", "3", "2", "9"]  # of 8 prompts one b teaches, of the next 2 another
    assert texts(leftover) == ["4", "6", "8"]


def test_balanced_steps_replace_a_dropped_group_by_one_of_its_task() -> None:
    """Two tasks, of which the second one teaches only with every third prompt; more than asked for of the first waits."""
    held: list[dict[str, int]] = []

    class TwoTasks(PromptSource):
        def __call__(self, count: int, now: Mapping[str, int]) -> list[Prompt]:
            held.append(dict(now))
            missing = {task: 3 - now.get(task, 0) for task in ("a", "b")}
            names = [task for task in ("a", "b") for _ in range(missing[task])]
            assert len(names) == count
            return [replace(prompt, task=task) for prompt, task in zip(super().__call__(count, now), names, strict=True)]

    async def score(rollout: Rollout) -> ScoredRollout:
        teaches = rollout.prompt.task == "a" or int(rollout.prompt.text) % 3 == 0
        return scored(rollout, float(rollout.sample_index) if teaches else 0.0)

    source = TwoTasks()
    result = collect(FailingEngine(), 6, source=source, score=score, dynamic=True, tasks=("a", "b"))
    assert [group.prompt.task for group in result.groups] == ["a", "b"] * 3  # in turn, so that mini-batches are balanced too
    assert [group.prompt.text for group in result.groups] == ["0", "3", "1", "6", "2", "9"]
    assert held == [{}, {"a": 3, "b": 1}, {"a": 3, "b": 2}, {"a": 3, "b": 2}]


def test_a_group_with_an_unscored_response_is_dropped_and_replaced() -> None:
    async def score(rollout: Rollout) -> ScoredRollout | None:
        return None if rollout.prompt.text in ("1", "4") and rollout.sample_index == 2 else scored(rollout, 1.0)

    result = collect(FailingEngine(), 4, score=score)
    assert [group.prompt.text for group in result.groups] == ["0", "2", "3", "5"]
    assert (result.stats.dropped_unscored, result.stats.dropped_filtered, result.stats.waves) == (2, 0, 3)


def test_waves_are_bounded_and_the_error_has_the_numbers() -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        return scored(rollout, 1.0 if rollout.prompt.text == "0" and rollout.sample_index < 2 else 0.25)

    with pytest.raises(RolloutError) as error:
        collect(FailingEngine(), 2, score=score, dynamic=True)
    message = str(error.value)
    assert "after 5 waves only 1 of 2 groups are kept (5 dropped" in message
    assert "min 0.25, mean 0.3125, max 1" in message and "algorithm.max_sampling_waves" in message


def test_a_failed_request_is_sent_again() -> None:
    def fail(token: int, attempt: int) -> None:
        if token == 2 and attempt <= 2:
            raise RolloutError("connection reset")

    warnings: list[str] = []
    result = collect(FailingEngine(fail), warnings=warnings)
    assert [group.prompt.text for group in result.groups] == list("012345")
    assert result.stats.retries == 2
    assert result.stats.failures == ["prompt task/2 failed: connection reset"] * 2
    assert "task/2" in warnings[0] and "1 of 2 retries" in warnings[0]


def test_a_prompt_that_is_never_answered_is_named() -> None:
    engine = FailingEngine(lambda token, attempt: asyncio.Event().wait() if token == 4 else None)
    with pytest.raises(RolloutError, match=r"prompt task/4 was not answered and scored within 0\.05 s, after 2 retries"):
        collect(engine, request_timeout=0.05)
    assert engine.attempts[4] == 3
    assert engine.now == 0  # given-up requests were cancelled


def test_long_prompts_have_more_time() -> None:
    """3 and 1,494 prompt tokens and 6 of the response: 0.05 s and 30 s for a thousand."""
    length = 0

    def take(count: int, held: Mapping[str, int]) -> list[Prompt]:
        return [replace(make_prompt(0), token_ids=(8,) * length)]

    engine = FailingEngine(lambda token, attempt: asyncio.sleep(0.6))
    limits: dict[str, float] = {"request_timeout": 0.05, "request_timeout_per_kilotoken": 30.0}
    length = 3
    with pytest.raises(RolloutError, match=r"not answered and scored within 0\.32 s, after 0 retries .*_per_kilotoken"):
        collect(engine, 1, source=take, max_retries=0, **limits)
    length = 1494
    assert len(collect(engine, 1, source=take, max_retries=0, **limits).groups) == 1


def test_a_scorer_that_hangs_counts_against_the_prompt() -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        if rollout.prompt.text == "3":
            await asyncio.Event().wait()
        return scored(rollout, 0.0)

    with pytest.raises(RolloutError, match="prompt task/3 was not answered and scored"):
        collect(FailingEngine(), score=score, request_timeout=0.05, max_retries=0)


def test_a_dead_engine_ends_the_step_without_retries() -> None:
    def fail(token: int, attempt: int) -> Any:
        if token == 0:
            engine.dead = "vLLM was killed by SIGKILL"
            raise RolloutError("connection reset")
        return asyncio.Event().wait()

    engine = FailingEngine(fail)
    with pytest.raises(RolloutError, match=r"^vLLM was killed by SIGKILL$"):
        collect(engine)
    assert engine.attempts[0] == 1
    assert engine.now == 0


def test_an_error_of_a_scorer_is_raised_as_it_is() -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        raise ZeroDivisionError("in the scorer")

    with pytest.raises(ZeroDivisionError, match="in the scorer"):
        collect(FailingEngine(), score=score)


def test_concurrency_is_bounded_at_the_engine() -> None:
    engine = FailingEngine()
    collect(engine, 20, concurrency=3)
    assert engine.most == 3


def test_a_stall_is_warned_of_with_the_prompts_in_flight() -> None:
    release = asyncio.Event()
    warnings: list[str] = []

    class ReleasingList(list[str]):
        def append(self, line: str) -> None:
            warnings.append(line)
            release.set()

    engine = FailingEngine(lambda token, attempt: release.wait() if token in (1, 3) else None)
    result = collect(engine, warnings=ReleasingList(), stall=0.05)
    assert len(result.groups) == 6
    assert len(warnings) == 1
    assert re.search(r"no response has come for 0\.05 s; waiting for prompts task/1, task/3$", warnings[0])


def test_evaluation_takes_its_own_samples_and_temperature(model_folder: Path) -> None:
    prompts = [make_prompt(number) for number in range(5)]

    async def use(engine: EmbeddedEngine) -> list[RolloutGroup]:
        evaluation = {"samples_per_prompt": 2, "temperature": 0.0}
        return await make_collector(engine, evaluation=evaluation, dynamic=True, with_greedy=True).evaluate(prompts)

    groups = embedded(model_folder, make_tiny_model(0), use)
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        first, second = (one.rollout for one in group.rollouts)
        assert first.token_ids == second.token_ids  # greedy
        assert group.greedy is None  # a baseline's, in training


@torch.no_grad()
def most_probable(model: PreTrainedModel, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_greedy_response_takes_the_most_probable_tokens_and_is_scored(model_folder: Path, num_samples: int) -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        return scored(rollout, float(sum(rollout.token_ids)))

    def run(with_greedy: bool) -> CollectResult:
        async def use(engine: EmbeddedEngine) -> CollectResult:
            collector = make_collector(engine, score, with_greedy=with_greedy, samples_per_prompt=num_samples, top_k=40, top_p=0.9)
            return await collector.collect(PromptSource(), step=3)

        return embedded(model_folder, make_tiny_model(0), use)

    result, without = run(True), run(False)
    model = make_tiny_model(0)
    for group in result.groups:
        assert group.greedy is not None
        rollout = group.greedy.rollout
        assert rollout.token_ids == most_probable(model, group.prompt.token_ids, 6)
        assert group.greedy.reward == sum(rollout.token_ids)
        assert (rollout.prompt, rollout.sample_index, set(rollout.weight_versions)) == (group.prompt, GREEDY_INDEX, {9})
        assert rollout.name == f"{group.prompt.prompt_id} greedy response"
    assert [group.rollouts for group in result.groups] == [group.rollouts for group in without.groups]
    assert {len(group.rollouts) for group in result.groups} == {num_samples}
    assert {group.greedy for group in without.groups} == {None}
    assert result.stats.metrics().keys() == without.stats.metrics().keys()


def test_the_runs_sampling_options_reach_the_engine_with_every_request() -> None:
    asked: list[SamplingParams] = []

    class Recording(FailingEngine):
        async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
            asked.append(sampling)
            return await super().generate(prompt_token_ids, sampling)

    options = {"top_p": 0.9, "top_k": 40, "min_p": 0.1}
    options |= {"presence_penalty": 0.2, "frequency_penalty": -0.3, "repetition_penalty": 1.4}
    collect(Recording(), 2, with_greedy=True, **options)
    assert [one.temperature == 0 for one in asked].count(True) == 2 and len(asked) == 4
    assert all({name: getattr(one, name) for name in options} == options for one in asked)


def test_a_group_whose_greedy_response_is_not_scored_is_dropped_and_replaced() -> None:
    async def score(rollout: Rollout) -> ScoredRollout | None:
        return None if rollout.prompt.text in ("1", "4") and rollout.sample_index == GREEDY_INDEX else scored(rollout, 1.0)

    result = collect(FailingEngine(), 4, score=score, with_greedy=True)
    assert [group.prompt.text for group in result.groups] == ["0", "2", "3", "5"]
    assert (result.stats.dropped_unscored, result.stats.dropped_filtered, result.stats.waves) == (2, 0, 3)
    assert all(group.greedy is not None for group in result.groups)


class GreedilyFailingEngine(FailingEngine):
    """Answers samples, and leaves greedy requests to ``fail``."""

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        if sampling.temperature == 0:
            assert sampling.num_samples == 1
            return await super().generate(prompt_token_ids, sampling)
        return await FailingEngine().generate(prompt_token_ids, sampling)


def test_a_greedy_request_is_sent_again_with_its_samples() -> None:
    def fail(token: int, attempt: int) -> None:
        if token == 2 and attempt <= 2:
            raise RolloutError("connection reset")

    result = collect(GreedilyFailingEngine(fail), with_greedy=True)
    assert [(len(group.rollouts), group.greedy is not None) for group in result.groups] == [(4, True)] * 6
    assert result.stats.failures == ["prompt task/2 failed: connection reset"] * 2


def test_a_greedy_response_that_does_not_come_counts_against_the_prompt() -> None:
    engine = GreedilyFailingEngine(lambda token, attempt: asyncio.Event().wait() if token == 4 else None)
    with pytest.raises(RolloutError, match=r"prompt task/4 was not answered and scored within 0\.05 s, after 2 retries"):
        collect(engine, request_timeout=0.05, with_greedy=True)
    assert (engine.attempts[4], engine.now) == (3, 0)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_dynamic_sampling_keeps_groups_that_differ_from_their_greedy_response(num_samples: int) -> None:
    async def score(rollout: Rollout) -> ScoredRollout:
        is_solved_greedily = rollout.sample_index == GREEDY_INDEX and int(rollout.prompt.text) % 2 == 1
        return scored(rollout, 1.0 if is_solved_greedily else 0.0)

    result = collect(FailingEngine(), 2, score=score, dynamic=True, with_greedy=True, samples_per_prompt=num_samples)
    assert [group.prompt.text for group in result.groups] == ["1", "3"]
    assert [group.prompt.text for group in result.filtered] == ["0", "2"]


def test_statistics_add_up() -> None:
    result = collect(FailingEngine())
    stats = result.stats
    assert 0 < stats.generating_seconds <= stats.wall_seconds
    assert stats.generate_seconds >= stats.generating_seconds
    assert stats.metrics()["rollout/waves"] == 1.0
    assert stats.metrics()["rollout/failures"] == 0.0
