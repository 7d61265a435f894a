"""The embedded engine aborted in the middle of its responses, and what becomes of them under other weights."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config.schema import EmbeddedEngineConfig
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation, resumed
from megarl.engines.token_sampler import GumbelSampler
from megarl.rollout.pending_groups import joined
from megarl.types import FinishReason
from tiny_rollout import exported_weights, generate_all, make_tiny_model, reference_logprobs, sampling, weight_shapes

PROMPTS = [(5, 6, 7), tuple(range(10, 40)), (1,)]
TIMEOUT = 30.0  # seconds


def with_engine(folder: Path, use: Callable[[EmbeddedEngine], Any], batch_size: int = 64) -> Any:
    async def run() -> Any:
        settings = EmbeddedEngineConfig(batch_size=batch_size, threads=1)
        engine = EmbeddedEngine(folder, torch.float32, settings, weight_shapes(make_tiny_model(0)))
        await engine.start()
        try:
            await engine.update_weights(exported_weights(make_tiny_model(0)), 3)
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def abort_after(monkeypatch: pytest.MonkeyPatch, engine: EmbeddedEngine, num_tokens: int) -> asyncio.Event:
    """An event at the given token of the first batch, at which decoding then waits for the abort."""
    loop, reached, sample = asyncio.get_running_loop(), asyncio.Event(), GumbelSampler.__call__
    is_first = threading.Event()

    def sample_and_wait(sampler: GumbelSampler, *arguments: Any) -> Any:
        choice = sample(sampler, *arguments)
        if len(sampler.logprobs) == num_tokens and not is_first.is_set():
            is_first.set()
            loop.call_soon_threadsafe(reached.set)
            assert engine._aborting.wait(TIMEOUT)
        return choice

    monkeypatch.setattr(GumbelSampler, "__call__", sample_and_wait)
    return reached


async def abort_and_resume(engine: EmbeddedEngine, reached: asyncio.Event) -> tuple[list[list[Generation]], list[list[Generation]]]:
    """What had come when all requests were aborted, and the whole responses, the rest by the weights of seed 1 as version 4."""
    running = asyncio.ensure_future(generate_all(engine, PROMPTS, sampling()))
    await asyncio.wait_for(reached.wait(), TIMEOUT)
    await engine.abort()
    parts = await asyncio.wait_for(running, TIMEOUT)
    await engine.update_weights(exported_weights(make_tiny_model(1)), 4)

    async def resume(prompt: tuple[int, ...], index: int, part: Generation) -> Generation:
        length = len(part.token_ids)
        (rest,) = await engine.generate(prompt + part.token_ids, resumed(sampling(), index, length))
        return joined(part, rest, sampling().max_new_tokens)

    whole = [
        list(await asyncio.gather(*(resume(prompt, index, part) for index, part in enumerate(group))))
        for prompt, group in zip(PROMPTS, parts, strict=True)
    ]
    return parts, whole


@pytest.mark.timeout(60)
def test_each_token_has_the_version_and_log_probability_of_the_weights_that_sampled_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(engine: EmbeddedEngine) -> Any:
        undisturbed = await generate_all(engine, PROMPTS, sampling())
        return undisturbed, *await abort_and_resume(engine, abort_after(monkeypatch, engine, 5))

    undisturbed, parts, whole = with_engine(model_folder, use)
    before, after = make_tiny_model(0), make_tiny_model(1)
    for prompt, undisturbed_group, part_group, group in zip(PROMPTS, undisturbed, parts, whole, strict=True):
        for reference, part, response in zip(undisturbed_group, part_group, group, strict=True):
            assert part.token_ids == reference.token_ids[:5] and part.finish_reason is FinishReason.ABORT
            assert response.weight_versions == (3,) * 5 + (4,) * 7 and response.finish_reason is FinishReason.LENGTH
            expected = torch.cat(
                [
                    reference_logprobs(before, prompt, response.token_ids, 1.0)[:5],
                    reference_logprobs(after, prompt, response.token_ids, 1.0)[5:],
                ]
            )
            assert (torch.tensor(response.logprobs).double() - expected).abs().max() <= 1e-5
    assert len({response.token_ids[5:] for response in whole[0]}) == 3  # each sample goes on with random numbers of its own


@pytest.mark.timeout(60)
def test_the_same_abort_goes_on_the_same_way(model_folder: Path) -> None:
    def once() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            return with_engine(model_folder, lambda engine: abort_and_resume(engine, abort_after(patch, engine, 4)))

    assert once() == once()


@pytest.mark.timeout(60)
def test_requests_that_wait_are_aborted_before_their_first_token(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(engine: EmbeddedEngine) -> Any:
        parts, _ = await abort_and_resume(engine, abort_after(monkeypatch, engine, 2))
        await engine.abort()  # nothing is in flight
        return parts

    parts = with_engine(model_folder, use, batch_size=4)  # of nine responses
    assert [len(part.token_ids) for group in parts for part in group] == [2] * 4 + [0] * 5


@pytest.mark.timeout(60)
def test_responses_of_unequal_limits_are_decoded_together(model_folder: Path) -> None:
    limits = (3, 12, 1, 7)

    async def use(engine: EmbeddedEngine) -> Any:
        together = [engine.generate((5, 6, 7), sampling(max_new_tokens=limit)) for limit in limits]
        return await asyncio.gather(*together), await engine.generate((5, 6, 7), sampling())

    groups, alone = with_engine(model_folder, use)
    for limit, group in zip(limits, groups, strict=True):
        for index, response in enumerate(group):
            assert response.token_ids == alone[index].token_ids[:limit]
            assert len(response.logprobs) == limit and response.finish_reason is FinishReason.LENGTH
