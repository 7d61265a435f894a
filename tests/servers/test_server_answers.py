"""Engines, judges and reward servers that answer nonsense: one line that names the server, and no answer is taken for data."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megarl.config.schema import Config, RewardsConfig
from megarl.engines.build import build_engine
from megarl.engines.server_engine import ServerEngine
from megarl.errors import ConfigError, MegaRLError
from megarl.rewards.combine import RewardScorer
from tiny_rollout import exported_weights, make_tiny_model, sampling, weight_shapes

pytestmark = pytest.mark.timeout(60)

DEEP = "[" * 100_000 + "]" * 100_000
BODIES: dict[str, tuple[int, str]] = {
    "a page of HTML": (200, "<html><body>hello</body></html>"),
    "null": (200, "null"),
    "a list": (200, "[]"),
    "a number": (200, "7"),
    "100,000 nested": (200, DEEP),
    "900 nested": (200, "[" * 900 + "]" * 900),
    "a number of 5,000 digits": (200, '{"data": [{"probs": [' + "9" * 5000 + "]}]}"),
    "not a number": (200, '{"embedding": [NaN], "data": [{"probs": [NaN]}], "choices": NaN}'),
    "infinity": (200, '{"embedding": [1e999], "data": [{"probs": [1e999]}]}'),
    "not UTF-8": (200, "\udcff\udcfe{"),
    "thousands of newlines": (500, "a\nb\n" * 5000),
    "newlines in JSON": (400, json.dumps({"error": {"message": "x\n" * 5000}})),
    "escape sequences": (500, "\x1b[2J\x1b[31mred"),
    "escape sequences, refused": (400, '{"message": "\\u001b[2J\\u009b31m\\u202ered"}'),
    "empty": (200, ""),
    "nothing with an error": (404, ""),
    "a key that is wrong": (401, '{"error": "Unauthorized"}'),
}
Serve = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def with_server(answer: Serve, use: Callable[[str], Awaitable[Any]]) -> Any:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return await use(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def answering(status: int, body: str) -> Serve:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        encoded = body.encode(errors="surrogateescape")
        return web.Response(status=status, body=encoded, content_type="application/json")

    return answer


async def cut_short(request: web.Request) -> web.StreamResponse:
    """Announce more bytes than come."""
    if request.path == "/health":
        return web.Response()
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.close()
    return response


SERVERS: dict[str, Serve] = {name: answering(*body) for name, body in BODIES.items()} | {"cut": cut_short}


def engine(name: str, folder: Path, url: str, **section: Any) -> ServerEngine:
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": folder},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {"engine": name, name: {"url": url, "start_timeout": 5, "update_timeout": 5, **section}},
    }
    built = build_engine(Config.model_validate(values), folder, weight_shapes(make_tiny_model(0)))
    assert isinstance(built, ServerEngine)
    return built


async def update(name: str, folder: Path, url: str) -> None:
    one = engine(name, folder, url)
    try:
        await one.start()
        await one.update_weights(exported_weights(make_tiny_model(1)), 0)
    finally:
        await one.close()


async def generate(name: str, folder: Path, url: str) -> None:
    one = engine(name, folder, url)
    try:
        await one.start()
        one._version = 0  # as if it had been updated
        await one.generate((1, 2), sampling())
    finally:
        await one.close()


async def score(scorer: dict[str, Any]) -> None:
    rewards = RewardScorer(RewardsConfig.model_validate({"scorers": [scorer]}), {}, str)
    try:
        await rewards.check_servers()
    finally:
        await rewards.close()


async def judged(url: str) -> None:
    await score({"type": "document_qa", "judge": {"url": f"{url}/v1", "model": "j", "retries": 0, "timeout": 5}})


async def rewarded(engine_name: str, url: str) -> None:
    await score({"type": "reward_server", "url": url, "engine": engine_name})


@pytest.mark.parametrize("what", SERVERS)
@pytest.mark.parametrize(
    "client", ["vllm update", "vllm generate", "sglang update", "sglang generate", "judge", "reward vllm", "reward sglang"]
)
def test_nonsense_is_one_line_that_names_the_server(model_folder: Path, client: str, what: str) -> None:
    name, _, action = client.partition(" ")
    urls = []

    async def use(url: str) -> None:
        urls.append(url)
        if name == "judge":
            await judged(url)
        elif name == "reward":
            await rewarded(action, url)
        else:
            await {"update": update, "generate": generate}[action](name, model_folder, url)

    with pytest.raises(MegaRLError) as refused:
        asyncio.run(with_server(SERVERS[what], use))
    message = str(refused.value)
    assert urls[0] in message
    assert len(message) <= 300
    assert message.isprintable()


KEY = "k-0123456789-not-to-be-seen"


@pytest.mark.parametrize("client", ["vllm", "sglang", "judge", "reward"])
def test_the_key_of_a_variable_is_sent_and_never_shown(
    model_folder: Path, client: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVER_KEY", f"{KEY}\n")
    seen = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=200 if request.path == "/health" else 403, text="no")

    async def use(url: str) -> None:
        key = {"api_key_env": "SERVER_KEY"}
        if client == "judge":
            await score({"type": "document_qa", "judge": {"url": url, "model": "j", "retries": 0, **key}})
        elif client == "reward":
            await score({"type": "reward_server", "url": url, "engine": "vllm", **key})
        else:
            one = engine(client, model_folder, url, **key)
            await one.start()
            try:
                await one.update_weights(exported_weights(make_tiny_model(1)), 0)
            finally:
                await one.close()

    with pytest.raises(MegaRLError, match="api_key_env") as refused:
        asyncio.run(with_server(answer, use))
    assert set(seen) == {f"Bearer {KEY}"}
    assert KEY not in str(refused.value) + caplog.text


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak", "é"])
def test_a_variable_without_a_key_is_refused(model_folder: Path, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SERVER_KEY", value)
    with pytest.raises(ConfigError, match=r"^api_key_env: the environment variable SERVER_KEY ") as refused:
        asyncio.run(engine("vllm", model_folder, "http://127.0.0.1:9", api_key_env="SERVER_KEY").start())
    assert not value or value not in str(refused.value)
