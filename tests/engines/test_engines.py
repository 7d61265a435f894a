"""The real vLLM and SGLang against transformers. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from megarl.builtin.environments.protocol import Step
from megarl.config.schema import RepetitionStopConfig
from megarl.engines.protocol import Generation, SamplingParams, resumed
from megarl.engines.server_engine import ServerEngine
from megarl.errors import RolloutError, WeightsError
from megarl.rollout.episodes import EpisodePlayer
from megarl.rollout.pending_groups import joined
from megarl.types import FinishReason, Prompt, Rollout
from real_engines import all_gone, make_engine, server_processes
from tiny_rollout import (
    exported_weights,
    generate_all,
    make_tiny_model,
    reference_logprobs,
    repeats_first_at,
    sampling,
    worst_gap,
)

# Longer than two whole cache blocks of 32 tokens: only a reset of the prefix cache makes vLLM compute them anew. SGLang's is off on
# CPU under deterministic inference; test_live_sync.py has it.
LONG_PROMPT = tuple(5 + (7 * index) % 500 for index in range(90))
PROMPTS = [LONG_PROMPT, (*LONG_PROMPT[:70], 9, 8, 7), (1, 2, 3)]


@dataclass(frozen=True)
class Served:
    """One server for all tests of a module."""

    engine: ServerEngine
    run: Callable[[Any], Any]  # runs a coroutine on the module's event loop
    model: Callable[[int], PreTrainedModel]  # of a seed


# Tied and untied output layers, one worker and two, of both engines.
@pytest.fixture(scope="module", params=[("vllm", 1), ("vllm", 2), ("sglang", 1), ("sglang", 2)], ids=lambda p: f"{p[0]}-tp{p[1]}")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name, tensor_parallel_size = request.param
    folder = tmp_path_factory.mktemp(name)

    def model(seed: int) -> PreTrainedModel:
        return make_tiny_model(seed, tied=tensor_parallel_size == 1)

    model(0).save_pretrained(folder / "model")
    engine = make_engine(name, folder, tensor_parallel_size=tensor_parallel_size)
    with asyncio.Runner() as runner:
        started = time.monotonic()
        runner.run(engine.start())
        print(f"{engine.name} started in {time.monotonic() - started:.1f} s")
        processes = server_processes(engine)
        assert len(processes) >= 3
        yield Served(engine, runner.run, model)
        runner.run(engine.close())
        assert all_gone(processes)


def test_without_weights_nothing_is_served(served: Served) -> None:
    with pytest.raises(RolloutError, match="no weights yet"):
        served.run(served.engine.generate((1, 2), sampling()))


def settings_of(engine: ServerEngine) -> list[SamplingParams]:
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"temperature": 0.0}]
    if engine.section == "sglang":  # vLLM cannot report these and refuses them
        settings.append({"temperature": 0.7, "top_p": 0.8, "top_k": 20})
    return [sampling(**changes) for changes in settings]


def test_logprobs_and_samples_follow_every_update(served: Served) -> None:
    greedy = set()
    for version, seed in enumerate((1, 2, 3)):
        model = served.model(seed)
        started = time.monotonic()
        served.run(served.engine.update_weights(exported_weights(model), version))
        print(f"update {version} took {time.monotonic() - started:.3f} s")
        for params in settings_of(served.engine):
            groups = served.run(generate_all(served.engine, PROMPTS, params))
            gap = worst_gap(model, PROMPTS, groups, params.temperature)
            print(f"version {version} temperature {params.temperature}: worst log-probability gap {gap:.1e}")
            assert gap <= 1e-4
            assert {seen for group in groups for one in group for seen in one.weight_versions} == {version}
            # The model folder's own end tokens, half of the vocabulary, end nothing.
            assert {(len(one.token_ids), one.finish_reason) for group in groups for one in group} == {(12, FinishReason.LENGTH)}
            if params.temperature == 0:
                assert len({one.token_ids for one in groups[0]}) == 1
                greedy.add(groups[0][0].token_ids)
    assert len(greedy) == 3  # three sets of weights, three greedy answers


class Echo:
    """An environment that answers the first turn, and ends the episode after the second."""

    async def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> tuple[int, None]:
        return 1, None

    async def step(self, state: int, response: str) -> tuple[int, Step]:
        return state + 1, Step(observation=response, reward=0.0, done=state == 2)

    async def close(self) -> None: ...


def test_an_episode_of_two_turns_has_the_models_logprobs(served: Served) -> None:
    prompt = Prompt(prompt_id="train/0", token_ids=LONG_PROMPT, text="", reference={}, task="train")
    params = sampling(stop_token_ids=tuple(range(0, 512, 4)), max_new_tokens=30)
    player = EpisodePlayer(Echo(), lambda text, last: (7, len(text) % 500, 9), lambda ids: " ".join(map(str, ids)), max_turns=2)

    async def generate(token_ids: tuple[int, ...], one: SamplingParams) -> Generation:
        return (await served.engine.generate(token_ids, one))[0]

    async def play() -> list[Rollout]:
        return await asyncio.gather(*(player.play(prompt, index, params, generate) for index in range(6)))

    rollouts = served.run(play())
    assert len({rollout.token_ids for rollout in rollouts}) == 6
    assert 2 in {rollout.episode.num_turns for rollout in rollouts if rollout.episode is not None}
    for rollout in rollouts:
        sampled = torch.tensor(rollout.from_policy)
        expected = reference_logprobs(served.model(3), LONG_PROMPT, rollout.token_ids, 1.0)[sampled]
        assert (torch.tensor(rollout.logprobs).double()[sampled] - expected).abs().max() <= 1e-4
        assert set(rollout.weight_versions) == {2}


def test_greedy_takes_the_most_probable_token(served: Served) -> None:
    (generation,) = served.run(served.engine.generate(LONG_PROMPT, sampling(temperature=0.0, num_samples=1)))
    ids = torch.tensor([LONG_PROMPT])
    expected = served.model(3).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generation.token_ids == tuple(expected[0, len(LONG_PROMPT) :].tolist())


@torch.no_grad()
def test_top_k_and_top_p_keep_only_their_tokens(served: Served) -> None:
    prompt = (1, 2, 3)
    probabilities = served.model(3)(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    kept: set[int] = set()
    for token in probabilities.argsort(descending=True).tolist()[:20]:
        if sum(probabilities[list(kept)]) < 0.8:
            kept.add(token)
    group = served.run(served.engine.generate(prompt, sampling(num_samples=64, top_p=0.8, top_k=20)))
    sampled = {one.token_ids[0] for one in group}
    assert sampled <= kept
    assert len(sampled) > 1


def test_a_sample_depends_only_on_prompt_seed_and_index(served: Served) -> None:
    together = served.run(generate_all(served.engine, PROMPTS, sampling()))
    alone = [served.run(served.engine.generate(prompt, sampling())) for prompt in PROMPTS]
    assert [[one.token_ids for one in group] for group in together] == [[one.token_ids for one in group] for group in alone]
    assert len({one.token_ids for one in together[0]}) == 3
    other_seed = served.run(generate_all(served.engine, PROMPTS, sampling(seed=5)))
    assert other_seed[0][0].token_ids != together[0][0].token_ids


def test_a_response_ends_with_its_first_stop_token(served: Served) -> None:
    free = served.run(generate_all(served.engine, PROMPTS, sampling()))
    stop = (free[0][1].token_ids[5],)
    stopped = served.run(generate_all(served.engine, PROMPTS, sampling(stop_token_ids=stop)))
    for free_group, group in zip(free, stopped, strict=True):
        for whole, abort in zip(free_group, group, strict=True):
            length = whole.token_ids.index(stop[0]) + 1 if stop[0] in whole.token_ids else len(whole.token_ids)
            assert abort.token_ids == whole.token_ids[:length]
            assert len(abort.logprobs) == length
            assert abort.finish_reason is (FinishReason.STOP if stop[0] in whole.token_ids else FinishReason.LENGTH)


def test_vllm_ends_responses_that_repeat_themselves(served: Served) -> None:
    if served.engine.name != "vLLM":
        pytest.skip("config/checks/data.py refuses it for SGLang")
    stop = RepetitionStopConfig(min_pattern_size=2, max_pattern_size=6, min_count=2)
    reasons = []
    for temperature in (0.05, 0.5):  # some repeat themselves, some do not
        settings = {"num_samples": 8, "max_new_tokens": 32, "temperature": temperature}
        free = served.run(generate_all(served.engine, PROMPTS, sampling(**settings)))
        ended = served.run(generate_all(served.engine, PROMPTS, sampling(**settings, repetition_stop=stop)))
        for whole, abort in ((whole, abort) for pair in zip(free, ended, strict=True) for whole, abort in zip(*pair, strict=True)):
            length = repeats_first_at(whole.token_ids[:31], 2, 6, 2)
            assert abort.token_ids == whole.token_ids[:length] if length else abort.token_ids == whole.token_ids
            reasons.append(abort.finish_reason)
            assert abort.finish_reason is (FinishReason.REPETITION if length else FinishReason.LENGTH)
    assert len(set(reasons)) == 2


def test_wrong_prompts_are_refused_and_the_server_lives(served: Served) -> None:
    with pytest.raises(RolloutError, match=r"ids outside 0\.\.511"):
        served.run(served.engine.generate((1, 512), sampling()))
    with pytest.raises(RolloutError, match=f"{served.engine.name} answered .* with 400: "):
        served.run(served.engine.generate(LONG_PROMPT * 2, sampling()))
    served.run(served.engine.health())


def test_an_update_waits_for_the_requests_in_flight(served: Served) -> None:
    async def update_while_generating() -> tuple[Any, Any]:
        request = asyncio.ensure_future(served.engine.generate(LONG_PROMPT, sampling(max_new_tokens=32)))
        await asyncio.wait({request}, timeout=0.05)
        assert not request.done()
        await served.engine.update_weights(exported_weights(served.model(4)), 9)
        return await request, await served.engine.generate(LONG_PROMPT, sampling(max_new_tokens=32))

    before, after = served.run(update_while_generating())
    for group, seed, version in ((before, 3, 2), (after, 4, 9)):
        assert {seen for one in group for seen in one.weight_versions} == {version}
        assert worst_gap(served.model(seed), [LONG_PROMPT], [group], 1.0) <= 1e-4


def test_a_response_aborted_at_an_update_goes_on_with_the_new_weights(served: Served) -> None:
    """Each token's version and log-probability are those of the weights that sampled it."""
    engine, params = served.engine, sampling(max_new_tokens=120, temperature=0.7)
    prompts = [(1, 2, 3), (4, 5), LONG_PROMPT[:30]]

    async def resume(prompt: tuple[int, ...], index: int, part: Generation) -> Generation:
        if part.finish_reason is not FinishReason.ABORT:
            return part
        (rest,) = await engine.generate(prompt + part.token_ids, resumed(params, index, len(part.token_ids)))
        return joined(part, rest, params.max_new_tokens)

    async def cut_while_generating() -> tuple[list[list[Generation]], list[list[Generation]]]:
        for attempt in range(10):
            requests = [asyncio.ensure_future(engine.generate(prompt, params)) for prompt in prompts]
            await asyncio.wait(requests, timeout=0.04 * 1.5**attempt)  # until this falls between the first token and the last
            late = asyncio.ensure_future(engine.generate((9, 9), params))  # on its way when the others are aborted
            await asyncio.sleep(0)
            await engine.abort()
            assert all(request.done() for request in (*requests, late))
            parts = [request.result() for request in (*requests, late)]
            if any(0 < len(part.token_ids) < 120 for group in parts[:3] for part in group):
                break
        await engine.update_weights(exported_weights(served.model(5)), 10)
        resumed_groups = [
            asyncio.gather(*(resume(prompt, index, part) for index, part in enumerate(group)))
            for prompt, group in zip((*prompts, (9, 9)), parts, strict=True)
        ]
        return parts, [list(group) for group in await asyncio.gather(*resumed_groups)]

    parts, whole = served.run(cut_while_generating())
    assert any(0 < len(part.token_ids) < 120 for group in parts[:3] for part in group)
    before, after = served.model(4), served.model(5)
    for prompt, part_group, group in zip((*prompts, (9, 9)), parts, whole, strict=True):
        for part, response in zip(part_group, group, strict=True):
            length = len(part.token_ids)
            assert response.weight_versions == (9,) * length + (10,) * (120 - length)
            old = reference_logprobs(before, prompt, response.token_ids, 0.7)[:length]
            new = reference_logprobs(after, prompt, response.token_ids, 0.7)[length:]
            assert (torch.cat([old, new]) - torch.tensor(response.logprobs).double()).abs().max() <= 1e-4


def test_the_end(served: Served) -> None:
    """What ends a server runs last: with one worker a refused update, with two a kill."""
    if served.engine.settings.tensor_parallel_size == 1:
        refused_update_ends_the_server(served)
    else:
        killed_server_is_one_error_at_once(served)


def refused_update_ends_the_server(served: Served) -> None:
    processes = server_processes(served.engine)
    wrong = dict(exported_weights(served.model(5)))
    del wrong["model.layers.2.mlp.up_proj.weight"]
    wrong["model.norm.weight"] = wrong["model.norm.weight"][:7]
    stream = iter(wrong.items())
    with pytest.raises(WeightsError) as refused:
        served.run(served.engine.update_weights(stream, 7))
    assert "missing: model.layers.2.mlp.up_proj.weight" in str(refused.value)
    assert "model.norm.weight has shape (7,), not (128,)" in str(refused.value)
    assert next(stream, None) is None  # read to its end, as the other trainer ranks need
    assert all_gone(processes)
    with pytest.raises(RolloutError, match=served.engine.name):
        served.run(served.engine.generate((1, 2), sampling()))


def killed_server_is_one_error_at_once(served: Served) -> None:
    processes = server_processes(served.engine)

    async def kill_while_generating() -> float:
        requests = [
            asyncio.ensure_future(served.engine.generate(LONG_PROMPT, sampling(num_samples=16, max_new_tokens=32)))
            for _ in range(32)  # more than are answered while a busy machine lets this process wait
        ]
        await asyncio.wait(requests, timeout=0.05)
        assert not any(request.done() for request in requests)
        os.kill(processes[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]  # some may have been answered before
        assert {str(error) for error in errors} == {str(errors[0])}
        assert isinstance(errors[0], RolloutError)
        assert str(errors[0]).startswith(f"{served.engine.name} was killed by SIGKILL; its last words in ")
        assert "\n" not in str(errors[0])
        return time.monotonic() - killed

    print(f"the killed server was reported after {served.run(kill_while_generating()):.2f} s")
    with pytest.raises(RolloutError, match="was killed by SIGKILL"):
        served.run(served.engine.health())
    assert all_gone(processes)  # the engine core that the server left behind too


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vllm", r"vLLM exited with code 2; .*unrecognized arguments: --no-such-option"),
        ("sglang", r"SGLang exited with code 2; .*unrecognized arguments: --no-such-option"),
    ],
)
def test_an_engine_that_cannot_start_tells_why(tmp_path: Path, name: str, words: str) -> None:
    make_tiny_model(0, tmp_path / "model")
    engine = make_engine(name, tmp_path, arguments={"no_such_option": 1})
    with pytest.raises(RolloutError, match=words):
        asyncio.run(engine.start())


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_start_that_takes_too_long_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    make_tiny_model(0, tmp_path / "model")
    engine = make_engine(name, tmp_path, start_timeout=2, start_attempts=2)
    with pytest.raises(RolloutError, match=rf"did not start within 2 s \(rollout\.{name}\.start_timeout\); see .*engine\.2\.log"):
        asyncio.run(engine.start())
    for log in ("engine.log", "engine.2.log"):  # where its processes hung
        assert "(most recent call first)" in (tmp_path / log).read_text()
    model = str(tmp_path / "model")
    assert not [process for process in psutil.process_iter(["cmdline"]) if model in (process.info["cmdline"] or ())]
