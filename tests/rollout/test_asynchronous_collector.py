"""Generation beside training over an engine whose every answer the test gives."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from megarl.config.schema import Config
from megarl.engines.protocol import Generation, SamplingParams
from megarl.errors import RolloutError
from megarl.loop.main_rank_rollouts import BACKGROUND_THREAD, BackgroundLoop
from megarl.rollout.asynchronous_collector import AsynchronousCollector
from megarl.types import FinishReason, Prompt, Rollout, ScoredRollout

pytestmark = pytest.mark.timeout(30)
MAX_NEW_TOKENS = 10


@dataclass(eq=False)
class Sent:
    """A request at the engine."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    answer: "asyncio.Future[list[Generation]]"

    def give(self, num_tokens: int, version: int, reason: FinishReason = FinishReason.STOP) -> None:
        tokens = tuple(range(100 * version, 100 * version + num_tokens))
        one = Generation(
            token_ids=tokens, logprobs=(-0.5,) * num_tokens, weight_versions=(version,) * num_tokens, finish_reason=reason
        )
        self.answer.set_result([one] * self.sampling.num_samples)


@dataclass
class Engine:
    """Keeps every request until it is answered; an abort answers them with two tokens each."""

    version: int = 0
    dead: str = ""
    sent: list[Sent] = field(default_factory=list)
    num_cuts: int = 0

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        request = Sent(prompt_token_ids, sampling, asyncio.get_running_loop().create_future())
        self.sent.append(request)
        try:
            return await request.answer
        finally:
            self.sent.remove(request)

    async def abort(self) -> None:
        self.num_cuts += 1
        for request in self.sent:
            request.give(2, self.version, FinishReason.ABORT)

    async def health(self) -> None:
        if self.dead:
            raise RolloutError(self.dead)

    def of(self, number: int) -> Sent:
        """The request in flight for prompt ``number``."""
        (request,) = [request for request in self.sent if request.prompt[0] == number]
        return request


@dataclass
class Trainer:
    """What a test works with."""

    collector: AsynchronousCollector
    engine: Engine
    taken: list[int] = field(default_factory=list)
    documents: dict[int, tuple[int, ...]] = field(default_factory=dict)  # token ids of prompts other than (number, 1)

    def take(self, count: int, held: Mapping[str, int]) -> list[Prompt]:
        first = len(self.taken)
        self.taken += range(first, first + count)
        return [
            Prompt(prompt_id=f"p/{number}", token_ids=self.documents.get(number, (number, 1)), text="", reference={}, task="p")
            for number in range(first, first + count)
        ]

    async def resume(self, version: int) -> None:
        self.engine.version = version
        await self.collector.resume(self.take, version)
        await settle()

    async def collect(self, step: int) -> Any:
        return await asyncio.wait_for(self.collector.collect(self.take, step), 10)


async def settle() -> None:
    """Let every task run until it waits for something that only the test can give."""
    for _ in range(50):
        await asyncio.sleep(0)


def run(
    use: Callable[[Trainer], Awaitable[None]], *, rewards: Any = None, dynamic: bool = False, steps: int = 50, **rollout: Any
) -> None:
    settings = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": MAX_NEW_TOKENS, "asynchronous": {}}
    config = Config.model_validate(
        {
            "kind": "rl",
            "steps": steps,
            "model": {"path": "unused"},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "algorithm": {"dynamic_sampling": dynamic, "max_sampling_waves": 2},
            "rollout": settings | rollout,
        }
    )

    async def work() -> None:
        engine = Engine()

        async def score(rollout: Rollout) -> ScoredRollout | None:
            reward = float(rollout.sample_index) if rewards is None else rewards(rollout)
            return None if reward is None else ScoredRollout(rollout=rollout, reward=reward, parts={}, step_rewards=(), failures=())

        collector = AsynchronousCollector(
            engine,  # type: ignore[arg-type]
            config,
            stop_token_ids=(),
            decode=lambda ids: " ".join(map(str, ids)),
            score=score,
            warn=lambda line: None,
            with_greedy=False,
        )
        try:
            await use(Trainer(collector, engine))
        finally:
            await collector.close()
        assert engine.sent == []

    asyncio.run(work())


def test_groups_begun_are_bounded_and_the_oldest_whole_ones_are_trained() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        assert len(trainer.taken) == 4  # two steps' groups
        for number in (3, 1, 2):
            trainer.engine.of(number).give(3, 0)
        result = await trainer.collect(0)
        assert result.tickets.trained == ((1, "p/1"), (2, "p/2"))  # group 0 may wait until step 1
        await settle()
        assert len(trainer.taken) == 4  # those in training count
        await trainer.collector.pause()
        await trainer.resume(1)
        assert len(trainer.taken) == 6
        for number in (4, 5):
            trainer.engine.of(number).give(3, 1)
        waiting = asyncio.ensure_future(trainer.collect(1))
        await settle()
        assert not waiting.done()  # four are whole, but group 0 must be trained now
        for request in list(trainer.engine.sent):
            request.give(3, 1)
        assert (await waiting).tickets.trained == ((0, "p/0"), (3, "p/3"))

    run(use)


def test_prompts_of_one_document_are_sent_one_after_the_other() -> None:
    async def use(trainer: Trainer) -> None:
        trainer.documents = {0: (7, 7, 5), 1: (3, 1), 2: (7, 7, 4), 3: (3, 0, 9)}
        await trainer.resume(0)
        assert [request.prompt for request in trainer.engine.sent] == [(3, 0, 9), (3, 1), (7, 7, 4), (7, 7, 5)]
        assert [group.ticket for group in trainer.collector.pending.groups] == [0, 1, 2, 3]
        for number in (3, 7):
            for request in [request for request in trainer.engine.sent if request.prompt[0] == number][:1]:
                request.give(3, 0)
        await trainer.collect(0)
        await trainer.collector.pause()
        trainer.documents |= {4: (5, 5), 5: (2, 2)}
        await trainer.resume(1)  # the groups that were aborted, and then the new ones
        assert [request.prompt[:2] for request in trainer.engine.sent] == [(3, 1)] * 2 + [(7, 7)] * 2 + [(2, 2), (5, 5)]
        await trainer.collector.pause()
        await trainer.resume(2)
        assert [request.prompt[:2] for request in trainer.engine.sent] == [
            prompt for prompt in ((2, 2), (3, 1), (5, 5), (7, 7)) for _ in range(2)
        ]

    run(use)


def test_responses_go_on_with_the_new_weights() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        await trainer.collector.pause()
        assert trainer.engine.sent == [] and trainer.engine.num_cuts == 1
        await settle()
        assert trainer.engine.sent == []  # nothing is sent while weights change
        await trainer.resume(1)
        resumed = [request for request in trainer.engine.sent if request.prompt[0] == 0]
        assert [request.prompt for request in resumed] == [(0, 1, 0, 1)] * 2  # one request for each sample, with its two tokens
        assert {request.sampling.max_new_tokens for request in resumed} == {MAX_NEW_TOKENS - 2}
        assert {request.sampling.num_samples for request in resumed} == {1} and len({r.sampling.seed for r in resumed}) == 2
        for request in list(trainer.engine.sent):
            request.give(3, 1)
        result = await trainer.collect(1)
        for group in result.groups:
            for scored in group.rollouts:
                assert scored.rollout.token_ids == (0, 1, 100, 101, 102)
                assert scored.rollout.weight_versions == (0, 0, 1, 1, 1)

    run(use)


def test_an_update_can_wait_for_what_is_under_way() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        pausing = asyncio.ensure_future(trainer.collector.pause())
        await settle()
        assert not pausing.done() and trainer.engine.num_cuts == 0
        first, *others = trainer.engine.sent
        for request in others:
            request.give(3, 0)
        await settle()
        first.answer.set_exception(RolloutError("overloaded"))  # and is not sent again before the update
        await asyncio.wait_for(pausing, 10)
        assert trainer.engine.sent == []
        await trainer.resume(1)
        assert {request.prompt for request in trainer.engine.sent} == {first.prompt, (3, 1)}

    run(use, asynchronous={"on_update": "finish"}, concurrency=3)


def test_none_are_begun_that_the_run_would_leave_over() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        assert len(trainer.taken) == 2

    run(use, steps=1)


def test_dropped_groups_are_replaced_and_named() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        for number in range(4):
            trainer.engine.of(number).give(3, 0)
        await settle()
        assert len(trainer.taken) == 6  # for groups 0 and 2
        result = await trainer.collect(0)
        assert result.tickets.trained == ((1, "p/1"), (3, "p/3")) and result.tickets.dropped == ((0, "p/0"), (2, "p/2"))
        assert result.stats.dropped_unscored + result.stats.dropped_filtered == 2
        trainer.engine.of(4).give(3, 0)
        await settle()
        assert len(trainer.taken) == 7  # for group 4; the two in training keep their places

    bad = (0, 2, 4)
    run(use, rewards=lambda rollout: None if rollout.prompt.token_ids[0] in bad else 1.0)
    run(use, rewards=lambda rollout: 1.0 if rollout.prompt.token_ids[0] in bad else float(rollout.sample_index), dynamic=True)


def test_sampling_that_can_never_fill_a_step_ends_the_run() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        waiting = asyncio.ensure_future(trainer.collect(0))
        for _ in range(10):
            for request in list(trainer.engine.sent):
                if not request.answer.done():
                    request.give(3, 0)
            await settle()
        with pytest.raises(RolloutError, match=r"4 groups were dropped since the last step .* raise algorithm\.max_sampling_waves"):
            await waiting

    run(use, rewards=lambda rollout: 1.0, dynamic=True)


@pytest.mark.parametrize("call", ["collect", "pause"])
def test_a_dead_engine_ends_the_run_at_the_next_call(call: str) -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        trainer.engine.dead = "the engine was killed"
        trainer.engine.of(0).answer.set_exception(RolloutError("connection lost"))
        await settle()
        with pytest.raises(RolloutError, match="the engine was killed"):
            await (trainer.collect(0) if call == "collect" else trainer.collector.pause())

    run(use)


def test_a_request_given_up_by_the_engine_or_late_is_sent_again() -> None:
    async def use(trainer: Trainer) -> None:
        await trainer.resume(0)
        trainer.engine.of(0).give(2, 0, FinishReason.ABORT)  # nobody asked for that
        trainer.engine.of(1).answer.set_exception(RolloutError("overloaded"))
        await settle()
        for number in (0, 1):
            trainer.engine.of(number).give(3, 0)
        result = await trainer.collect(0)
        assert result.stats.retries == 2
        with pytest.raises(RolloutError, match=r"prompt p/[23] was not answered within 0\.3 s, after 1 retries"):
            await trainer.collect(0)

    # and 0.2 s for the 2 tokens of a prompt and the 10 of a response
    run(use, max_retries=1, request_timeout=0.1, request_timeout_per_kilotoken=0.2 / 0.012)


def test_the_background_loop_serves_any_thread_and_leaves_nothing() -> None:
    loop = BackgroundLoop()
    events: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            events.append("cancelled")

    async def work() -> str:
        tasks.append(asyncio.create_task(forever()))
        await asyncio.sleep(0)
        return threading.current_thread().name

    async def fail() -> None:
        raise RolloutError("as it is")

    assert loop.run(work()) == BACKGROUND_THREAD
    with pytest.raises(RolloutError, match="as it is"):
        loop.run(fail())
    loop.close()
    assert events == ["cancelled"]
    assert BACKGROUND_THREAD not in {thread.name for thread in threading.enumerate()}
