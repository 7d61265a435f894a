"""The real vLLM server against transformers. Needs ``make engine-vllm``; without it these tests fail, they are never skipped."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from megarl.config.schema import Config
from megarl.errors import RolloutError, WeightsError
from megarl.rollout.protocol import Generation, SamplingParams
from megarl.rollout.vllm import VllmEngine
from megarl.types import FinishReason

# Five whole cache blocks of 32 tokens and a bit: only a reset of the prefix cache makes vLLM compute it anew.
LONG_PROMPT = tuple(5 + (7 * index) % 500 for index in range(90))
PROMPTS = [LONG_PROMPT, (*LONG_PROMPT[:70], 9, 8, 7), (1, 2, 3)]
VLLM_ARGUMENTS = {"block_size": 32, "kv_cache_memory_bytes": 64 << 20}

Call = Callable[[Any], Any]


def sampling(**changes: Any) -> SamplingParams:
    settings = {
        "num_samples": 3,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": (),
        "seed": 2**62 - 1,
    }
    return SamplingParams(**(settings | changes))


def weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """As the trainer exports them: tied weights once."""
    tied = model.config.tie_word_embeddings
    return ((name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight"))


async def generate_all(engine: VllmEngine, params: SamplingParams) -> list[list[Generation]]:
    return await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))


@torch.no_grad()
def worst_gap(model: PreTrainedModel, groups: list[list[Generation]], temperature: float) -> float:
    """Largest difference between the engine's log-probabilities and those of a transformers forward."""
    worst = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for generation in group:
            ids = torch.tensor([prompt + generation.token_ids])
            logprobs = (model(ids, use_cache=False).logits[0] / (temperature or 1)).log_softmax(-1)
            expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(generation.logprobs)).abs().max().item())
    return worst


def server_processes(engine: VllmEngine) -> list[psutil.Process]:
    """The guard, the server and all below them."""
    assert engine._server is not None and engine._server._guard is not None
    guard = psutil.Process(engine._server._guard.pid)
    return [guard, *guard.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=10)[1] == []


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """Runs coroutines on one event loop for the whole module."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engine(
    call: Call,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    engine_config: Callable[..., Config],
) -> Iterator[VllmEngine]:
    """A server of a tied model, not yet given weights."""
    folder = tmp_path_factory.mktemp("vllm")
    tiny_model(0, folder / "model")
    engine = VllmEngine(engine_config(folder / "model", arguments=VLLM_ARGUMENTS), folder)
    started = time.monotonic()
    call(engine.start())
    print(f"vLLM started in {time.monotonic() - started:.1f} s")
    processes = server_processes(engine)
    assert len(processes) >= 3
    yield engine
    call(engine.close())
    assert all_gone(processes)


def test_without_weights_nothing_is_served(call: Call, engine: VllmEngine) -> None:
    with pytest.raises(RolloutError, match="no weights yet"):
        call(engine.generate((1, 2), sampling()))


def test_logprobs_and_samples_follow_every_update(
    call: Call, engine: VllmEngine, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    seen = set()
    for version, seed in enumerate((1, 2, 3)):
        model = tiny_model(seed)
        started = time.monotonic()
        call(engine.update_weights(weights(model), version))
        print(f"update {version} took {time.monotonic() - started:.3f} s")
        for temperature in (1.0, 0.7, 0.0):
            groups = call(generate_all(engine, sampling(temperature=temperature)))
            gap = worst_gap(model, groups, temperature)
            print(f"version {version} temperature {temperature}: worst log-probability gap {gap:.1e}")
            assert gap <= 1e-4
            assert {generation.weight_version for group in groups for generation in group} == {version}
        seen.add(groups[0][0].token_ids)
    assert len(seen) == 3  # three sets of weights, three greedy answers


def test_a_sample_depends_only_on_prompt_seed_and_index(call: Call, engine: VllmEngine) -> None:
    together = call(generate_all(engine, sampling()))
    alone = [call(engine.generate(prompt, sampling())) for prompt in PROMPTS]
    assert [[one.token_ids for one in group] for group in together] == [[one.token_ids for one in group] for group in alone]
    assert len({one.token_ids for one in together[0]}) == 3
    other_seed = call(generate_all(engine, sampling(seed=5)))
    assert other_seed[0][0].token_ids != together[0][0].token_ids


def test_a_response_ends_with_its_first_stop_token(call: Call, engine: VllmEngine) -> None:
    free = call(generate_all(engine, sampling()))
    stop = (free[0][1].token_ids[5],)
    stopped = call(generate_all(engine, sampling(stop_token_ids=stop)))
    for free_group, group in zip(free, stopped, strict=True):
        for whole, cut in zip(free_group, group, strict=True):
            length = whole.token_ids.index(stop[0]) + 1 if stop[0] in whole.token_ids else len(whole.token_ids)
            assert cut.token_ids == whole.token_ids[:length]
            assert len(cut.logprobs) == length
            assert cut.finish_reason is (FinishReason.STOP if stop[0] in whole.token_ids else FinishReason.LENGTH)


def test_a_refused_update_ends_the_server(call: Call, engine: VllmEngine, tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Runs last of those that share the server."""
    processes = server_processes(engine)
    stream = iter([pair for pair in weights(tiny_model(4)) if pair[0] != "model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.weight"):
        call(engine.update_weights(stream, 7))
    assert next(stream, None) is None  # read to its end, as the other trainer ranks need
    assert all_gone(processes)
    with pytest.raises(RolloutError, match="vLLM"):
        call(engine.generate((1, 2), sampling()))


@pytest.fixture
def untied_engine(
    call: Call, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], engine_config: Callable[..., Config]
) -> Iterator[VllmEngine]:
    tiny_model(0, tmp_path / "model", tied=False)
    engine = VllmEngine(engine_config(tmp_path / "model", arguments=VLLM_ARGUMENTS), tmp_path)
    call(engine.start())
    yield engine
    call(engine.close())


def test_a_server_killed_in_mid_run_is_one_error_at_once(
    call: Call, untied_engine: VllmEngine, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(6, tied=False)
    call(untied_engine.update_weights(weights(model), 0))
    assert worst_gap(model, call(generate_all(untied_engine, sampling())), 1.0) <= 1e-4
    processes = server_processes(untied_engine)
    server = processes[1].pid

    async def kill_while_generating() -> float:
        requests = [
            asyncio.ensure_future(untied_engine.generate(LONG_PROMPT, sampling(num_samples=16, max_new_tokens=32)))
            for _ in range(8)
        ]
        await asyncio.wait(requests, timeout=0.05)
        assert not any(request.done() for request in requests)
        os.kill(server, signal.SIGKILL)
        killed = time.monotonic()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert {str(answer) for answer in answers} == {str(answers[0])}
        assert isinstance(answers[0], RolloutError)
        assert str(answers[0]).startswith("vLLM was killed by SIGKILL; its last words in ")
        assert "\n" not in str(answers[0])
        return time.monotonic() - killed

    seconds = call(kill_while_generating())
    print(f"the killed server was reported after {seconds:.2f} s")
    with pytest.raises(RolloutError, match="was killed by SIGKILL"):
        call(untied_engine.health())
    assert all_gone(processes)  # the engine core that the server left behind too


def test_an_engine_that_cannot_start_tells_why(call: Call, tmp_path: Path, tiny_model: Any, engine_config: Any) -> None:
    tiny_model(0, tmp_path / "model")
    engine = VllmEngine(engine_config(tmp_path / "model", arguments={"no_such_option": 1}), tmp_path)
    with pytest.raises(RolloutError, match=r"vLLM exited with code 2; .*unrecognized arguments: --no-such-option"):
        call(engine.start())
