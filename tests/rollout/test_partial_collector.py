"""Partial rollouts over an engine whose responses have lengths that the test chose."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from megarl.config.schema import Config
from megarl.engines.protocol import Generation, SamplingParams
from megarl.errors import CheckpointError
from megarl.rollout.collector import Collector
from megarl.rollout.partial_collector import PartialCollector
from megarl.types import FinishReason, Prompt, Rollout, ScoredRollout

pytestmark = pytest.mark.timeout(30)
BUDGET, MAX_NEW_TOKENS = 4, 12


class Engine:
    """A response to prompt ``(n, 1, 2)`` has ``lengths[n]`` tokens, 100, 101 ...; its last is a stop token if it is whole."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.version = 0
        self.asked: list[tuple[int, int, SamplingParams]] = []  # prompt, tokens so far, how

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        number, so_far = prompt_token_ids[0], len(prompt_token_ids) - 3
        self.asked.append((number, so_far, sampling))
        await asyncio.sleep(0)
        rest = self.lengths[number] - so_far
        count = min(rest, sampling.max_new_tokens)
        one = Generation(
            token_ids=tuple(range(100 + so_far, 100 + so_far + count)),
            logprobs=(-0.5,) * count,
            weight_versions=(self.version,) * count,
            finish_reason=FinishReason.STOP if count == rest and self.lengths[number] < MAX_NEW_TOKENS else FinishReason.LENGTH,
        )
        return [one] * sampling.num_samples


def make(lengths: list[int], *, greedy: bool = False, partial: bool = True) -> tuple[PartialCollector, Engine]:
    config = Config.model_validate(
        {
            "kind": "rl",
            "steps": 9,
            "model": {"path": "unused"},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "rollout": {
                "prompts_per_step": 2,
                "samples_per_prompt": 2,
                "max_new_tokens": MAX_NEW_TOKENS,
                "partial": {"step_token_budget": BUDGET} if partial else None,
            },
        }
    )

    async def score(rollout: Rollout) -> ScoredRollout:
        return ScoredRollout(rollout=rollout, reward=float(rollout.sample_index), parts={}, step_rewards=(), failures=())

    engine = Engine(lengths)
    collector: Any = (PartialCollector if partial else Collector)(
        engine,  # type: ignore[arg-type]
        config,
        stop_token_ids=(),
        decode=lambda ids: " ".join(map(str, ids)),
        score=score,
        warn=lambda line: None,
        with_greedy=greedy,
    )
    return collector, engine


def prompt(number: int) -> Prompt:
    return Prompt(prompt_id=f"p/{number}", token_ids=(number, 1, 2), text="", reference={}, task="p")


def run_steps(collector: PartialCollector, engine: Engine, numbers: Iterable[int], num_taken: int = 0) -> list[list[int]]:
    """Tickets trained by each step. No response may grow by more than the budget, unless the store is full."""
    taken = list(range(num_taken))

    def take(count: int, held: Mapping[str, int]) -> list[Prompt]:
        first = len(taken)
        taken.extend(range(first, first + count))
        return [prompt(number) for number in range(first, first + count)]

    steps = []
    for step in numbers:
        engine.version = step
        result = asyncio.run(collector.collect(take, step))
        assert len(result.groups) == 2
        for group in result.groups:
            for scored in group.rollouts:
                rollout = scored.rollout
                assert rollout.token_ids == tuple(range(100, 100 + engine.lengths[group.prompt.token_ids[0]]))
                assert all(a <= b for a, b in zip(rollout.weight_versions, rollout.weight_versions[1:], strict=False))
                assert rollout.finish_reason is not FinishReason.ABORT
        assert result.tickets is not None
        steps.append([ticket for ticket, _ in result.tickets.trained])
    return steps


def test_long_responses_wait_for_later_steps() -> None:
    """Prompt 0 needs three budgets and prompt 4 two, the others one; steps of two groups."""
    collector, engine = make([12, 2, 3, 4, 6, 1, 2, 2, 3, 1])
    # step 1 begins 0 and 1, and 2 in place of 0; step 2 goes on with 0, begins 3 and 4, and 5 in place of 4
    assert run_steps(collector, engine, range(4)) == [[1, 2], [3, 5], [0, 4], [6, 7]]
    assert [(so_far, sampling.max_new_tokens) for number, so_far, sampling in engine.asked if number == 0] == [
        (0, 4),
        *[(4, 4)] * 2,
        *[(8, 4)] * 2,
    ]
    assert len({sampling.seed for number, _, sampling in engine.asked if number == 0}) == 5


def test_prompts_of_one_document_are_sent_one_after_the_other() -> None:
    collector, engine = make([2] * 9)
    prompts = [
        Prompt(prompt_id=f"p/{number}", token_ids=(number, 1, last), text="", reference={}, task="p")
        for number, last in ((7, 5), (3, 0), (7, 4), (3, 2))
    ]
    sent: list[tuple[int, ...]] = []
    generate = engine.generate

    async def recorded(prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        sent.append(prompt_token_ids)
        return await generate(prompt_token_ids, sampling)

    engine.generate = recorded  # type: ignore[method-assign]
    result = asyncio.run(collector.collect(lambda count, held: prompts, 0))
    assert sent == [(3, 1, 0), (3, 1, 2), (7, 1, 4), (7, 1, 5)]
    assert [group.prompt for group in result.groups] == prompts[:2]


def test_versions_tell_which_step_sampled_each_token() -> None:
    collector, engine = make([12, 2, 3, 4, 6, 1, 2, 2, 3, 1])
    run_steps(collector, engine, range(2))
    engine.version = 2
    result = asyncio.run(collector.collect(lambda count, held: [], 2))
    (long, _) = result.groups
    assert [scored.rollout.weight_versions for scored in long.rollouts] == [(0,) * 4 + (1,) * 4 + (2,) * 4] * 2


def test_when_all_responses_are_long_steps_still_fill_and_the_store_is_bounded() -> None:
    collector, engine = make([12] * 60)
    steps = run_steps(collector, engine, range(12))
    assert steps == [[2 * step, 2 * step + 1] for step in range(12)]
    assert len(collector.pending.groups) <= 3 * 2  # three budgets make a response, two groups a step
    first_tokens_of_last = [so_far for number, so_far, _ in engine.asked[-12:]]
    assert set(first_tokens_of_last) == {0, 4, 8}  # in the end every step adds one budget to three steps' groups


def interrupted(greedy: bool) -> tuple[PartialCollector, Engine, dict[str, Any]]:
    """A collector after two steps, with responses in flight, and its store as a checkpoint has it."""
    collector, engine = make([12, 2, 3, 4, 6, 1, 2, 2, 3, 1, 9, 9, 9, 9], greedy=greedy)
    run_steps(collector, engine, range(2))
    return collector, engine, json.loads(json.dumps(collector.state()))


def prompt_of(prompt_id: str) -> Prompt:
    return prompt(int(prompt_id.removeprefix("p/")))


@pytest.mark.parametrize("greedy", [False, True])
def test_a_store_that_went_through_a_checkpoint_goes_on_as_if_nothing_had_been(greedy: bool) -> None:
    whole, engine, saved = interrupted(greedy)
    num_taken, num_asked = whole.pending.num_begun, len(engine.asked)
    resumed, other = make(engine.lengths, greedy=greedy)
    resumed.restore(saved, prompt_of)
    assert resumed.pending.groups == whole.pending.groups
    assert run_steps(resumed, other, range(2, 5), num_taken) == run_steps(whole, engine, range(2, 5), num_taken)
    assert other.asked == engine.asked[num_asked:]


def test_a_store_of_other_rollouts_is_refused() -> None:
    _, engine, saved = interrupted(greedy=False)
    with pytest.raises(CheckpointError, match="groups of 2 responses that are under way, and this run's have 3"):
        make(engine.lengths, greedy=True)[0].restore(saved, prompt_of)
    with pytest.raises(CheckpointError, match="begun and not yet trained on; resume with"):
        make(engine.lengths, partial=False)[0].restore(saved, prompt_of)


def test_the_greedy_response_is_resumed_too() -> None:
    collector, engine = make([6, 6, 1, 1, 1, 1], greedy=True)
    assert run_steps(collector, engine, range(2)) == [[2, 3], [0, 1]]
    greedy = [(number, so_far, sampling.max_new_tokens) for number, so_far, sampling in engine.asked if sampling.temperature == 0]
    assert [asked for asked in greedy if asked[0] == 0] == [(0, 0, 4), (0, 4, 4)]
