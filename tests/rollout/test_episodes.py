"""Episodes: exact tokens, limits, seeds, rewards, failures, and the way through packing into an algorithm."""

import asyncio
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.builtin.environments.protocol import Step
from megarl.config.schema import AlgorithmConfig, Config, EmbeddedEngineConfig
from megarl.data.packing import pack_groups
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation, SamplingParams
from megarl.environments.run import EnvironmentFailure
from megarl.errors import RewardError, RolloutError
from megarl.observe.rollout_metrics import rollout_metrics
from megarl.rewards.combine import EpisodeScorer
from megarl.rollout.collect_result import CollectResult
from megarl.rollout.collector import Collector
from megarl.rollout.episodes import EpisodePlayer
from megarl.types import GREEDY_INDEX, NO_VERSION, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout, TokenOutputs, Turn
from tiny_rollout import exported_weights, make_tiny_model, reference_logprobs, weight_shapes

pytestmark = pytest.mark.timeout(60)

STOP = 99  # ends a turn
OPEN, CLOSE = 71, 72  # around an environment's message


class ScriptedEngine:
    """Says ``10, 10 + turn, STOP`` in turn ``turn``, found by counting the STOPs that it is sent; remembers what it was sent."""

    def __init__(self, version: int = 4) -> None:
        self.version = version
        self.asked: list[tuple[tuple[int, ...], SamplingParams]] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None: ...

    async def health(self) -> None: ...

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        await asyncio.sleep(0)
        self.asked.append((prompt_token_ids, sampling))
        turn = prompt_token_ids.count(STOP) + 1
        tokens = (10, 10 + turn, STOP)[: sampling.max_new_tokens]
        reason = FinishReason.STOP if tokens[-1] == STOP else FinishReason.LENGTH
        logprobs = tuple(-0.1 * turn - 0.01 * index for index in range(len(tokens)))
        versions = (self.version + turn,) * len(tokens)
        return [Generation(token_ids=tokens, logprobs=logprobs, weight_versions=versions, finish_reason=reason)]


class ScriptedEnvironments:
    """Answers turn ``n`` with ``messages[n]``, an exception to raise or (observation, reward, done); the state counts turns."""

    def __init__(self, *messages: Any, opening: str | None = None) -> None:
        self.messages = messages
        self.opening = opening
        self.resets: list[tuple[str, Mapping[str, Any], int]] = []
        self.heard: list[str] = []

    async def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> tuple[int, str | None]:
        self.resets.append((prompt, reference, seed))
        return 0, self.opening

    async def step(self, state: int, response: str) -> tuple[int, Step]:
        self.heard.append(response)
        message = self.messages[min(state, len(self.messages) - 1)]
        if isinstance(message, Exception):
            raise message
        observation, reward, done = message
        return state + 1, Step(observation=observation, reward=reward, done=done)

    async def close(self) -> None: ...


def decode(token_ids: Any) -> str:
    return " ".join(str(token) for token in token_ids if token != STOP)


def encode(observation: str, last_token: int | None) -> tuple[int, ...]:
    opened = () if last_token == STOP else (STOP,)
    return (*opened, OPEN, *(200 + ord(letter) for letter in observation), CLOSE)


def make_config(**settings: Any) -> Config:
    rollout = {"prompts_per_step": 1, "samples_per_prompt": 1, "max_new_tokens": 30, "request_timeout": 20.0, "max_retries": 0}
    return Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "seed": 7,
            "model": {"path": "unused"},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "algorithm": {"max_sampling_waves": 2},
            "rollout": rollout | settings,
        }
    )


def prompts(count: int, start: int = 0) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"train/{i}", token_ids=(1, i + 2), text=f"q{i}", reference={"answer": i}, task="train")
        for i in range(start, start + count)
    ]


async def no_scorers(rollout: Rollout) -> ScoredRollout:
    return ScoredRollout(rollout=rollout, reward=0.0, parts={}, step_rewards=(), failures=())


def make_collector(engine: Any, environments: Any, *, max_turns: int = 5, on_failure: str = "stop", **settings: Any) -> Collector:
    with_greedy = settings.pop("with_greedy", False)
    return Collector(
        engine,
        make_config(**settings),
        stop_token_ids=(STOP,),
        decode=decode,
        score=EpisodeScorer(no_scorers, weight=2.0, on_failure=on_failure).score,
        warn=lambda line: None,
        with_greedy=with_greedy,
        player=EpisodePlayer(environments, encode, decode, max_turns),
    )


def collect(engine: Any, environments: Any, *, step: int = 3, **settings: Any) -> CollectResult:
    return asyncio.run(make_collector(engine, environments, **settings).collect(lambda count, held: prompts(count), step))


def only(result: CollectResult) -> ScoredRollout:
    (group,) = result.groups
    (scored,) = group.rollouts
    return scored


def test_the_engine_is_sent_exactly_what_it_sampled_and_what_the_environment_said() -> None:
    engine, environments = ScriptedEngine(), ScriptedEnvironments(("a", 0.5, False), ("bc", 0.0, False), ("end", 1.0, True))
    scored = only(collect(engine, environments))
    first, second, third = (10, 11, STOP), (10, 12, STOP), (10, 13, STOP)
    said = ((OPEN, 297, CLOSE), (OPEN, 298, 299, CLOSE))
    assert [ids for ids, _ in engine.asked] == [
        (1, 2),
        (1, 2, *first, *said[0]),
        (1, 2, *first, *said[0], *second, *said[1]),
    ]
    rollout = scored.rollout
    assert rollout.token_ids == (*first, *said[0], *second, *said[1], *third)
    assert rollout.from_policy == (True,) * 3 + (False,) * 3 + (True,) * 3 + (False,) * 4 + (True,) * 3
    logprobs = [-0.1, -0.11, -0.12, 0, 0, 0, -0.2, -0.21, -0.22, 0, 0, 0, 0, -0.3, -0.31, -0.32]
    assert rollout.logprobs == pytest.approx(logprobs)
    assert rollout.weight_versions == (5,) * 6 + (6,) * 7 + (7,) * 3
    assert [sampling.max_new_tokens for _, sampling in engine.asked] == [30, 24, 17]
    assert (rollout.text, rollout.finish_reason) == ("10 13", FinishReason.STOP)
    assert environments.heard == ["10 11", "10 12", "10 13"]
    episode = rollout.episode
    assert episode is not None
    assert [(turn.speaker, turn.text) for turn in episode.turns] == [
        ("policy", "10 11"),
        ("environment", "a"),
        ("policy", "10 12"),
        ("environment", "bc"),
        ("policy", "10 13"),
        ("environment", "end"),
    ]
    assert (episode.num_turns, episode.failure, episode.is_out_of_turns) == (3, None, False)
    assert (scored.reward, scored.parts) == (3.0, {"environment": 1.5})  # weight 2


def test_an_opening_message_follows_the_prompt() -> None:
    engine = ScriptedEngine()
    scored = only(collect(engine, ScriptedEnvironments((None, 1.0, True), opening="x")))
    assert engine.asked[0][0] == (1, 2, STOP, OPEN, 320, CLOSE)
    assert scored.rollout.from_policy == (False,) * 4 + (True,) * 3
    assert scored.rollout.weight_versions[:4] == (NO_VERSION,) * 4
    assert scored.rollout.episode is not None
    assert scored.rollout.episode.turns[0] == Turn(speaker="environment", text="x")


@pytest.mark.parametrize(
    ("max_new_tokens", "num_tokens", "turns", "reason", "out_of_turns"),
    [
        (3, 3, 1, FinishReason.LENGTH, False),  # no room for the first message
        (6, 3, 1, FinishReason.LENGTH, False),  # none to answer it
        (7, 7, 2, FinishReason.LENGTH, False),  # the second turn is cut
        (9, 9, 2, FinishReason.LENGTH, False),
        (100, 27, 5, FinishReason.STOP, True),
    ],
)
def test_the_limits(max_new_tokens: int, num_tokens: int, turns: int, reason: FinishReason, out_of_turns: bool) -> None:
    environments = ScriptedEnvironments(("a", 1.0, False))  # never ends
    result = collect(ScriptedEngine(), environments, max_new_tokens=max_new_tokens)
    rollout = only(result).rollout
    assert rollout.episode is not None
    assert len(rollout.token_ids) == num_tokens <= max_new_tokens
    assert (rollout.episode.num_turns, rollout.finish_reason, rollout.episode.is_out_of_turns) == (turns, reason, out_of_turns)
    assert rollout.from_policy[-1]  # nothing follows the last turn that nobody answers
    is_cut = rollout.token_ids[-1] != STOP
    assert len(environments.heard) == turns - is_cut  # a turn that was cut is not heard
    assert rollout.episode.reward == turns - is_cut
    metrics = rollout_metrics(result.groups)
    assert (metrics["out_of_turns_share"], metrics["truncated_share"]) == (out_of_turns, reason is FinishReason.LENGTH)
    assert (metrics["turns_mean"], metrics["turns_max"]) == (turns, turns)
    num_sampled = sum(rollout.from_policy)
    assert metrics["response_length_mean"] == num_sampled
    assert metrics["environment_token_share"] == pytest.approx(1 - num_sampled / num_tokens)


def test_an_opening_message_without_room_is_a_truncated_response_without_tokens() -> None:
    rollout = only(collect(ScriptedEngine(), ScriptedEnvironments(opening="x" * 30))).rollout
    assert (rollout.token_ids, rollout.text, rollout.finish_reason) == ((), "", FinishReason.LENGTH)
    assert pack_groups(collect(ScriptedEngine(), ScriptedEnvironments(opening="x" * 30)).groups).truncated.tolist() == [True]


def test_every_turn_of_every_sample_of_every_step_has_a_seed_of_its_own() -> None:
    def seeds(step: int) -> tuple[list[int], list[int]]:
        engine, environments = ScriptedEngine(), ScriptedEnvironments(("a", 0.0, False), ("b", 0.0, True))
        collect(engine, environments, step=step, prompts_per_step=2, samples_per_prompt=3)
        return [sampling.seed for _, sampling in engine.asked], [seed for _, _, seed in environments.resets]

    (turns, resets), (other_turns, other_resets) = seeds(1), seeds(2)
    assert len(set(turns + resets + other_turns + other_resets)) == 2 * (2 * 3 * 2 + 2 * 3)
    assert max(turns) < 2**62
    assert sorted(seeds(1)[0]) == sorted(turns)


def test_the_greedy_response_is_an_episode_too() -> None:
    engine = ScriptedEngine()
    (group,) = collect(engine, ScriptedEnvironments(("a", 0.5, False), (None, 1.0, True)), with_greedy=True).groups
    assert group.greedy is not None
    assert (group.greedy.rollout.sample_index, group.greedy.reward) == (GREEDY_INDEX, 3.0)
    assert sorted(sampling.temperature for _, sampling in engine.asked) == [0.0, 0.0, 1.0, 1.0]
    assert {sampling.num_samples for _, sampling in engine.asked} == {1}
    assert pack_groups([group]).greedy_lengths.tolist() == [6]  # the message's tokens are none of the response


FAILING = (("a", 1.0, False), EnvironmentFailure("KeyError: 'x'"))
LINE = "environment failed on train/0 sample 0, turn 2: KeyError: 'x'"


def test_a_failure_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RewardError, match=r"train/0 sample 0, turn 2: KeyError: 'x'; set rewards\.on_failure to drop or zero"):
        collect(ScriptedEngine(), ScriptedEnvironments(*FAILING))
    assert caplog.messages == [LINE]


def test_a_failure_counts_as_0_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    result = collect(ScriptedEngine(), ScriptedEnvironments(*FAILING), on_failure="zero")
    scored = only(result)
    assert (scored.reward, scored.parts, scored.failures) == (0.0, {}, (LINE,))  # not even what came before
    assert scored.rollout.token_ids == (10, 11, STOP, OPEN, 297, CLOSE, 10, 12, STOP)
    assert (result.stats.environment_failures, result.stats.failures) == (1, [LINE])
    assert result.stats.metrics()["rollout/environment_failures"] == 1.0
    assert caplog.messages == [LINE]


def test_a_failure_drops_the_group_and_another_prompt_takes_its_place() -> None:
    class FailingOnce(ScriptedEnvironments):
        async def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> tuple[int, str | None]:
            if prompt == "q1":
                raise EnvironmentFailure("no answer within 1 s")
            return await super().reset(prompt, reference, seed)

    taken: list[int] = []

    def take(count: int, held: Mapping[str, int]) -> list[Prompt]:
        taken.append(count)
        return prompts(count, sum(taken[:-1]))

    environments = FailingOnce((None, 1.0, True))
    collector = make_collector(ScriptedEngine(), environments, on_failure="drop", prompts_per_step=3, samples_per_prompt=2)
    result = asyncio.run(collector.collect(take, 0))
    assert (taken, [group.prompt.text for group in result.groups]) == ([3, 1], ["q0", "q2", "q3"])
    assert (result.stats.dropped_unscored, result.stats.environment_failures) == (1, 2)
    expected = [f"environment failed on train/1 sample {index}, reset: no answer within 1 s" for index in range(2)]
    assert sorted(result.stats.failures) == expected


def test_an_engine_that_fails_in_a_later_turn_is_asked_again_from_the_start() -> None:
    class FailingEngine(ScriptedEngine):
        async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
            answers = await super().generate(prompt_token_ids, sampling)
            if len(self.asked) == 2:
                raise RolloutError("connection reset")
            return answers

    engine, environments = FailingEngine(), ScriptedEnvironments(("a", 0.5, False), (None, 1.0, True))
    result = collect(engine, environments, max_retries=1)
    assert only(result).reward == 3.0
    assert (len(engine.asked), len(environments.resets), result.stats.retries) == (4, 2, 1)


def test_prompts_that_are_sent_again_do_not_hold_up_the_others() -> None:
    """Episodes take turns together; every third request fails, and one prompt's environment hangs at first."""

    class FailingEngine(ScriptedEngine):
        async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
            answers = await super().generate(prompt_token_ids, sampling)
            if len(self.asked) % 3 == 0 and len(self.asked) < 20:
                raise RolloutError("connection reset")
            return answers

    class HangingOnce(ScriptedEnvironments):
        async def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> tuple[int, str | None]:
            answer = await super().reset(prompt, reference, seed)
            if [one for one, _, _ in self.resets].count("q2") == 1 and prompt == "q2":
                await asyncio.Event().wait()
            return answer

    environments = HangingOnce(("a", 0.5, False), (None, 1.0, True))
    settings = {"prompts_per_step": 7, "samples_per_prompt": 2, "concurrency": 3, "max_retries": 9, "request_timeout": 0.5}
    result = collect(FailingEngine(), environments, **settings)
    assert [group.prompt.text for group in result.groups] == [f"q{number}" for number in range(7)]
    assert {scored.reward for group in result.groups for scored in group.rollouts} == {3.0}
    assert result.stats.retries >= 7


def test_an_episode_that_takes_too_long_names_its_prompt() -> None:
    class Hanging(ScriptedEnvironments):
        async def step(self, state: int, response: str) -> tuple[int, Step]:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(RolloutError, match=r"prompt train/0 was not answered and scored within 0\.05 s"):
        collect(ScriptedEngine(), Hanging(), request_timeout=0.05)


class PacedEnvironments(ScriptedEnvironments):
    """Three turns; the environments of a turn answer in an order that ``rank`` of the prompt's number and the turn gives."""

    def __init__(self, rank: Any) -> None:
        super().__init__()
        self.rank = rank

    async def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> tuple[Any, str | None]:
        return (reference["answer"], 0), None

    async def step(self, state: Any, response: str) -> tuple[Any, Step]:
        number, turn = state
        for _ in range(self.rank(number, turn)):  # turns of the event loop, no time
            await asyncio.sleep(0)
        num_turns = 1 + number % 3
        return (number, turn + 1), Step(observation=f"{number}", reward=1.0, done=turn + 1 == num_turns)


@pytest.mark.parametrize("concurrency", [64, 2])
def test_what_is_sampled_does_not_depend_on_the_environments_speed(model_folder: Path, concurrency: int) -> None:
    """Bit for bit, log-probabilities too: the embedded engine decodes the same sequences together, which the test sees too."""
    model = make_tiny_model(0)

    def play(rank: Any) -> tuple[tuple[RolloutGroup, ...], list[list[tuple[int, ...]]]]:
        batches = []

        async def run() -> tuple[RolloutGroup, ...]:
            engine = EmbeddedEngine(
                model_folder, torch.float32, EmbeddedEngineConfig(batch_size=8, threads=1), weight_shapes(model)
            )
            await engine.start()
            await engine.update_weights(exported_weights(model), 9)
            decode_batch = engine._decode

            def recorded(rows: Any) -> list[Generation]:
                batches.append([row.request.prompt_token_ids for row in rows])
                return decode_batch(rows)

            engine._decode = recorded  # type: ignore[method-assign]
            try:
                player = EpisodePlayer(PacedEnvironments(rank), encode, decode, 5)
                settings = {"prompts_per_step": 5, "samples_per_prompt": 3, "max_new_tokens": 60, "concurrency": concurrency}
                collector = Collector(
                    engine,
                    make_config(**settings),
                    stop_token_ids=tuple(range(0, 512, 4)),
                    decode=decode,
                    score=no_scorers,
                    warn=lambda line: None,
                    with_greedy=False,
                    player=player,
                )
                return (await collector.collect(lambda count, held: prompts(count), 3)).groups
            finally:
                await engine.close()

        return asyncio.run(run()), batches

    groups, batches = play(lambda number, turn: 0)
    assert play(lambda number, turn: 40 * number) == (groups, batches)
    assert play(lambda number, turn: 200 - 40 * number - 7 * turn) == (groups, batches)
    for group in groups:
        for scored in group.rollouts:
            rollout = scored.rollout
            assert rollout.episode is not None
            num_turns = 1 + group.prompt.reference["answer"] % 3
            assert rollout.finish_reason is FinishReason.LENGTH or rollout.episode.num_turns == num_turns
            expected = reference_logprobs(model, group.prompt.token_ids, rollout.token_ids, 1.0)
            sampled = torch.tensor(rollout.from_policy)
            torch.testing.assert_close(torch.tensor(rollout.logprobs).double()[sampled], expected[sampled], atol=1e-5, rtol=0)


def test_an_algorithm_skips_the_environments_tokens() -> None:
    """One episode of two turns through packing into GAE, by hand: γ = 0.9, λ = 0.5."""
    environments = ScriptedEnvironments(("a", 0.25, False), (None, 0.25, True))
    packed = pack_groups(collect(ScriptedEngine(), environments).groups)
    #                              1  2 | 10 11 stop | open a close | 10 12 stop
    assert packed.loss_mask.tolist() == [False] * 2 + [True] * 3 + [False] * 3 + [True] * 3
    assert packed.rewards.tolist() == [1.0]
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    garbage = 1e3  # whatever stands at tokens that nobody sampled
    per_token = torch.tensor([garbage] * 2 + values[:3] + [garbage] * 3 + values[3:])
    outputs = TokenOutputs(old=packed.sampler_logprobs, entropies=per_token, reference=None, values=per_token)
    config = AlgorithmConfig.model_validate(
        {"advantage": "gae", "gae": {"discount": 0.9, "trace_decay": 0.5}, "reward_shaping": {"overlong_buffer": 0.5}}
    )
    (batch,) = Algorithm(config, 8).prepare(packed, outputs, 0).batches
    # 6 sampled tokens of 8: the soft punishment over the last 4 is (8 - 4 - 6) / 4; with the message's 3 tokens it would be -1
    reward = 1.0 - 0.5
    deltas = [0.9 * after - before for before, after in itertools.pairwise(values)] + [reward - 0.6]
    advantages = [sum(0.45 ** (u - t) * deltas[u] for u in range(t, 6)) for t in range(6)]
    sampled = batch.sampled
    assert sampled is not None and sampled.critic is not None
    expected = [0.0] * 2 + advantages[:3] + [0.0] * 3 + advantages[3:]
    assert sampled.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    assert sampled.critic.returns[packed.loss_mask].tolist() == pytest.approx(returns, abs=1e-6)
    assert batch.token_weights.tolist() == pytest.approx([0.0] * 2 + [1 / 6] * 3 + [0.0] * 3 + [1 / 6] * 3)
    assert not any(math.isnan(value) for value in sampled.advantages.tolist())
