"""Scores of a reward-model server: requests and failures against a server of ours that answers as vLLM and SGLang do."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megarl.config.schema import RewardsConfig
from megarl.errors import RewardError
from megarl.rewards.combine import RewardScorer
from megarl.types import FinishReason, Prompt, Rollout, ScoredRollout

pytestmark = pytest.mark.timeout(60)


class FakeServer:
    """Scores a sequence by its last token, or does what ``manner`` says."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.manner = "answers"
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(3600 if self.manner == "hangs" else 0.01)
        self.at_once -= 1
        if self.manner == "refuses":
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)
        score = body["input" if self.engine == "vllm" else "input_ids"][-1] / 4
        scores = {"two labels": [score, 1.0], "not a number": ["high"]}.get(self.manner, [score])
        if self.manner == "another answer":
            return web.json_response([])
        return web.json_response({"data": [{"probs": scores}]} if self.engine == "vllm" else {"embedding": scores})


def rollout(index: int) -> Rollout:
    prompt = Prompt(prompt_id="train/3", token_ids=(7, 8), text="2+2?", reference={}, task="train")
    return Rollout(
        prompt=prompt,
        sample_index=index,
        token_ids=(4, index),
        from_policy=(True, True),
        logprobs=(-1.0, -1.0),
        weight_versions=(0, 0),
        finish_reason=FinishReason.STOP,
        text="the text is not read",
    )


Use = Callable[[FakeServer, RewardScorer], Awaitable[Any]]


def with_server(engine: str, use: Use, **settings: Any) -> Any:
    """What ``use`` returns, given the server and a scorer of it with weight 2."""

    async def run() -> Any:
        server = FakeServer(engine)
        application = web.Application()
        application.router.add_post("/classify", server.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = site._server.sockets[0].getsockname()  # type: ignore[union-attr]
        scorer = {"type": "reward_server", "url": f"http://{host}:{port}/", "engine": engine, "weight": 2.0}
        reward_scorer = RewardScorer(RewardsConfig.model_validate({"scorers": [scorer], **settings}), {}, str)
        try:
            return await use(server, reward_scorer)
        finally:
            await reward_scorer.close()
            await runner.cleanup()

    return asyncio.run(run())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_exact_tokens_are_sent_and_the_raw_score_is_weighted(engine: str) -> None:
    async def use(server: FakeServer, reward_scorer: RewardScorer) -> tuple[FakeServer, list[ScoredRollout | None]]:
        await reward_scorer.check_servers()
        return server, await asyncio.gather(*(reward_scorer.score(rollout(index)) for index in range(12)))

    server, scored = with_server(engine, use, concurrency=5)
    assert [(one.reward, dict(one.parts)) for one in scored] == [(i / 2, {"reward_server": i / 4}) for i in range(12)]
    probe, *bodies = server.bodies
    if engine == "vllm":  # without the key it would answer with a sigmoid
        assert probe == {"input": [0], "use_activation": False}
        assert sorted(body["input"][-1] for body in bodies) == list(range(12))
        assert all(body["input"][:3] == [7, 8, 4] and body["use_activation"] is False for body in bodies)
    else:
        assert probe == {"input_ids": [0]}
        assert sorted(body["input_ids"] for body in bodies) == [[7, 8, 4, index] for index in range(12)]
    assert server.most_at_once == 5


FAILURES = {
    "refuses": r"ValueError: the server answered 400: \{\"error\": \{\"message\": \"the prompt is too long\"\}\}",
    "hangs": r"no score within rewards\.timeout = 0\.3 seconds",
    "two labels": r"ValueError: the server's answer is not one score: \{'data': \[\{'probs': \[0\.75, 1\.0\]\}\]\}",
    "another answer": r"ValueError: the server's answer is not one score: \[\]",
    "not a number": r"ValueError: the scorer returned 'high', not a finite number",
}


@pytest.mark.parametrize("manner", FAILURES)
def test_failures_are_those_of_any_scorer(manner: str) -> None:
    def use(on_failure: str) -> Any:
        async def score(server: FakeServer, reward_scorer: RewardScorer) -> ScoredRollout | None:
            server.manner = manner
            return await reward_scorer.score(rollout(3))

        return with_server("vllm", score, on_failure=on_failure, timeout=0.3 if manner == "hangs" else 10)

    scored = use("zero")
    assert (scored.reward, dict(scored.parts)) == (0.0, {})
    assert use("drop") is None
    with pytest.raises(RewardError, match=rf"^scorer reward_server failed on train/3 sample 3: {FAILURES[manner]}"):
        use("stop")


def test_a_server_that_cannot_score_ends_the_run_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(server: FakeServer, reward_scorer: RewardScorer) -> None:
        server.manner = "two labels"
        await reward_scorer.check_servers()

    with pytest.raises(RewardError, match=r"^scorer 'reward_server': http://127\.0\.0\.1:\d+/classify scores nothing") as refused:
        with_server("sglang", check)
    assert "not one score: {" in str(refused.value)
    assert str(refused.value).endswith("python -m sglang.launch_server --model-path MODEL --is-embedding")

    async def hang(server: FakeServer, reward_scorer: RewardScorer) -> None:
        server.manner = "hangs"
        await reward_scorer.check_servers()

    monkeypatch.setattr("megarl.rewards.reward_server.PROBE_TIMEOUT", 0.2)
    with pytest.raises(RewardError, match=r"\(no answer within 0\.2 seconds\)"):
        with_server("vllm", hang)

    async def absent() -> None:
        scorer = {"type": "reward_server", "name": "judge", "url": "http://127.0.0.1:9", "engine": "vllm"}
        await RewardScorer(RewardsConfig.model_validate({"scorers": [scorer]}), {}, str).check_servers()

    with pytest.raises(RewardError, match=r"^scorer 'judge': http://127\.0\.0\.1:9/classify scores nothing \(ClientConnectorError"):
        asyncio.run(absent())
