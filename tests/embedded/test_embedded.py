"""The embedded engine against transformers' forward without a cache."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config.schema import EmbeddedEngineConfig, RepetitionStopConfig
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation
from megarl.errors import RolloutError, WeightsError
from megarl.types import FinishReason
from tiny_rollout import (
    exported_weights,
    generate_all,
    make_tiny_model,
    repeats_first_at,
    sampling,
    weight_shapes,
    worst_gap,
)

PROMPTS = [(5, 6, 7), tuple(range(10, 40)), (1,), tuple(range(60, 75))]


WithEngine = Callable[..., Any]


@pytest.fixture
def with_engine(model_folder: Path) -> WithEngine:
    """Runs a coroutine function with an engine that has the weights of seed 0 as version 3."""

    def with_engine(use: Callable[[EmbeddedEngine], Awaitable[Any]], *, batch_size: int = 64) -> Any:
        return asyncio.run(run(use, batch_size))

    async def run(use: Callable[[EmbeddedEngine], Awaitable[Any]], batch_size: int) -> Any:
        engine = EmbeddedEngine(
            model_folder, torch.float32, EmbeddedEngineConfig(batch_size=batch_size, threads=1), weight_shapes(make_tiny_model(0))
        )
        await engine.start()
        try:
            await engine.update_weights(exported_weights(make_tiny_model(0)), 3)
            return await use(engine)
        finally:
            await engine.close()

    return with_engine


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.3, "min_p": 0.2, "presence_penalty": 0.5, "repetition_penalty": 1.5},
        {"temperature": 0.0},
    ],
)
def test_logprobs_are_those_of_a_forward_without_cache(with_engine: WithEngine, settings: dict[str, Any]) -> None:
    groups = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(**settings)))
    model = make_tiny_model(0)
    assert worst_gap(model, PROMPTS, groups, settings.get("temperature", 1.0)) <= 1e-5
    for group in groups:
        for generation in group:
            assert (set(generation.weight_versions), generation.finish_reason) == ({3}, FinishReason.LENGTH)


def test_greedy_takes_the_most_probable_token(with_engine: WithEngine) -> None:
    groups = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(temperature=0.0)))
    model = make_tiny_model(0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert [generation.token_ids for generation in group] == [tuple(ids[len(prompt) :])] * 3


def test_min_p_and_penalties_choose_the_tokens(with_engine: WithEngine) -> None:
    greedy = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(temperature=0.0)))
    only_the_best = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(temperature=1.5, min_p=1.0)))
    assert [[one.token_ids for one in group] for group in only_the_best] == [[one.token_ids for one in group] for group in greedy]
    never_again = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(temperature=0.05, frequency_penalty=2.0)))
    ever_again = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(temperature=0.05, frequency_penalty=-2.0)))
    assert {len(set(one.token_ids)) for group in never_again for one in group} == {12}
    assert max(len(set(one.token_ids)) for group in ever_again for one in group) <= 2


def test_a_sample_depends_only_on_prompt_seed_and_index(with_engine: WithEngine) -> None:
    together = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling()))
    one_by_one = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling()), batch_size=1)
    assert [[one.token_ids for one in group] for group in together] == [[one.token_ids for one in group] for group in one_by_one]
    assert with_engine(lambda engine: generate_all(engine, PROMPTS, sampling())) == together  # bit for bit, log-probs too
    assert len({generation.token_ids for generation in together[0]}) == 3
    other_seed = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(seed=1)))
    assert other_seed[0][0].token_ids != together[0][0].token_ids


def test_requests_of_two_settings_in_turn_are_decoded_in_few_batches(with_engine: WithEngine) -> None:
    """Samples and a greedy response to each prompt: batches of 8 samples and one of the greedy responses."""
    sizes: list[int] = []

    async def use(engine: EmbeddedEngine) -> list[list[Generation]]:
        decode = engine._decode

        def counted(rows: Any) -> list[Generation]:
            sizes.append(len(rows))
            return decode(rows)

        engine._decode = counted  # type: ignore[method-assign]
        both = (sampling(), sampling(num_samples=1, temperature=0.0))
        return await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS for params in both))

    answers = with_engine(use, batch_size=8)
    assert sizes == [8, 4, 4]
    alone = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling()))
    greedy = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(num_samples=1, temperature=0.0)))
    assert [[one.token_ids for one in group] for group in answers[::2]] == [[one.token_ids for one in group] for group in alone]
    assert answers[1::2] == greedy


def test_a_response_ends_with_its_first_stop_token(with_engine: WithEngine) -> None:
    free = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling()))
    stop = (free[1][2].token_ids[4], free[0][0].token_ids[0])
    stopped = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(stop_token_ids=stop)))
    for free_group, group in zip(free, stopped, strict=True):
        for whole, abort in zip(free_group, group, strict=True):
            length = next((index + 1 for index, token in enumerate(whole.token_ids) if token in stop), 12)
            assert abort.token_ids == whole.token_ids[:length]
            assert len(abort.logprobs) == length
            expected = FinishReason.STOP if abort.token_ids[-1] in stop else FinishReason.LENGTH
            assert abort.finish_reason is expected


def test_a_response_that_repeats_itself_is_ended_there(with_engine: WithEngine) -> None:
    """Every response is the beginning of the free one up to its first repetition, whatever is decoded beside it."""
    settings = {"num_samples": 8, "max_new_tokens": 40, "temperature": 0.5}
    free = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(**settings)))
    rare = free[0][0].token_ids[20]  # also ends responses, and pads what is decoded on beside others
    settings |= {"repetition_stop": RepetitionStopConfig(min_pattern_size=2, max_pattern_size=6, min_count=2)}
    together = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(stop_token_ids=(rare,), **settings)))
    alone = with_engine(lambda engine: generate_all(engine, PROMPTS, sampling(stop_token_ids=(rare,), **settings)), batch_size=1)
    reasons = []
    for free_group, group, alone_group in zip(free, together, alone, strict=True):
        for whole, abort, other in zip(free_group, group, alone_group, strict=True):
            stop = whole.token_ids.index(rare) + 1 if rare in whole.token_ids else 1000
            repetition = repeats_first_at(whole.token_ids, 2, 6, 2) or 1000
            expected = min((stop, 0, FinishReason.STOP), (40, 1, FinishReason.LENGTH), (repetition, 2, FinishReason.REPETITION))
            assert (len(abort.token_ids), abort.finish_reason) == (expected[0], expected[2])
            assert abort.token_ids == whole.token_ids[: expected[0]] == other.token_ids
            assert len(abort.logprobs) == len(abort.weight_versions) == expected[0] and abort.finish_reason is other.finish_reason
            reasons.append(abort.finish_reason)
    assert all(reasons.count(reason) >= 2 for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION))
    # a response that repeats itself with its very last token is as long as it may be
    group, sample = next(
        (group, sample)
        for group in range(len(PROMPTS))
        for sample in range(8)
        if together[group][sample].finish_reason is FinishReason.REPETITION
    )
    ended = together[group][sample]
    settings |= {"max_new_tokens": len(ended.token_ids)}
    (shorter,) = with_engine(lambda engine: generate_all(engine, [PROMPTS[group]], sampling(**settings)))
    assert (shorter[sample].token_ids, shorter[sample].finish_reason) == (ended.token_ids, FinishReason.LENGTH)


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_follow_an_update(tmp_path: Path, tied: bool) -> None:
    shapes = weight_shapes(make_tiny_model(0, tmp_path, tied=tied))

    async def run() -> list[Generation]:
        engine = EmbeddedEngine(tmp_path, torch.float32, EmbeddedEngineConfig(threads=1), shapes)
        await engine.start()
        for version, seed in enumerate((1, 2)):
            await engine.update_weights(exported_weights(make_tiny_model(seed, tied=tied)), version)
            group = await engine.generate(PROMPTS[1], sampling())
            assert worst_gap(make_tiny_model(seed, tied=tied), [PROMPTS[1]], [group], 1.0) <= 1e-5
            assert set(group[0].weight_versions) == {version}
        await engine.close()
        return group

    asyncio.run(run())


def test_a_wrong_update_is_refused_and_disables_the_engine(with_engine: WithEngine) -> None:
    weights = dict(exported_weights(make_tiny_model(0)))
    del weights["model.layers.1.self_attn.q_proj.bias"]
    weights["model.norm.weight"] = torch.ones(7)
    weights["model.extra"] = torch.ones(1)

    async def use(engine: EmbeddedEngine) -> None:
        with pytest.raises(WeightsError) as refused:
            await engine.update_weights(iter(weights.items()), 4)
        message = str(refused.value)
        assert "missing: model.layers.1.self_attn.q_proj.bias" in message
        assert "not in the model: model.extra" in message
        assert "model.norm.weight has shape (7,), not (128,)" in message
        with pytest.raises(RolloutError, match="update to weight version 4 did not complete"):
            await engine.generate(PROMPTS[0], sampling())

    with_engine(use)


def test_generating_leaves_the_trainers_threads_and_random_numbers_alone(model_folder: Path) -> None:
    async def run() -> None:
        torch.manual_seed(11)
        expected = torch.rand(4)
        torch.manual_seed(11)
        threads = torch.get_num_threads()
        engine = EmbeddedEngine(model_folder, torch.float32, EmbeddedEngineConfig(threads=threads + 1), weight_shapes(model))
        await engine.start()
        await engine.update_weights(exported_weights(model), 0)
        await engine.generate(PROMPTS[0], sampling())
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.rand(4), expected)
        await engine.close()

    model = make_tiny_model(0)
    asyncio.run(run())


def test_a_foreign_token_id_is_an_error(with_engine: WithEngine) -> None:
    with pytest.raises(RolloutError, match=r"ids outside 0\.\.511"):
        with_engine(lambda engine: engine.generate((1, 512), sampling()))


def test_the_event_loop_lives_while_decoding(with_engine: WithEngine) -> None:
    async def use(engine: EmbeddedEngine) -> int:
        generating = asyncio.ensure_future(generate_all(engine, PROMPTS, sampling(max_new_tokens=60)))
        turns = 0
        while not generating.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert with_engine(use) > 100
