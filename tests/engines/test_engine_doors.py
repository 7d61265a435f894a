"""Who may talk to a started server: those who have its key, on this machine. They start where a proxy is set, too."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from megarl.engines.build import build_engine
from megarl.engines.server_engine import ServerEngine
from megarl.models.scaled_folder import NOT_COMPUTED, with_scaled_model
from real_engines import all_gone, make_engine, server_processes
from tiny_rollout import exported_weights, generate_all, make_tiny_model, sampling, weight_shapes, worst_gap

pytestmark = pytest.mark.timeout(600)

# Beside those of the server's own description of itself: what pauses it, loads weights, calls workers, or writes files.
ROUTES = [
    ("POST", "/collective_rpc"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/sleep"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/update_weights_from_disk"),
    ("POST", "/flush_cache"),
    ("GET", "/health_generate"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("OPTIONS", "/v1/completions"),
    ("POST", "/health"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/no/such/route"),
]


async def described_routes(engine: ServerEngine) -> list[tuple[str, str]]:
    description = await engine.server.call("GET", "/openapi.json")
    paths: dict[str, dict[str, Any]] = description["paths"]
    return [(method.upper(), path.replace("{", "").replace("}", "")) for path, methods in paths.items() for method in methods]


async def statuses(url: str, routes: list[tuple[str, str]], headers: dict[str, str]) -> dict[tuple[str, str], int]:
    found = {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for method, path in routes:
            async with session.request(method, url + path, json={} if method == "POST" else None) as response:
                found[method, path] = response.status
    return found


async def strangers_are_refused(engine: ServerEngine, key: str) -> None:
    routes = [*await described_routes(engine), *ROUTES]
    assert len(routes) > 40
    for headers in ({}, {"Authorization": "Bearer " + key[:-1]}, {"Authorization": key}, {"X-API-Key": key}):
        found = await statuses(engine.server.url, routes, headers)
        assert found.pop(("GET", "/health")) == 200
        assert [route for route, status in found.items() if status != 401] == []
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await session.ws_connect(engine.server.url + "/v1/realtime")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_started_server_is_the_runs_alone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    make_tiny_model(0, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values[NOT_COMPUTED] = {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 64}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    config = make_engine(name, tmp_path, start_timeout=400).config
    used = with_scaled_model(config, tmp_path / "run", writes=True)
    assert used.model.path != config.model.path
    engine = build_engine(used, tmp_path / "run", weight_shapes(make_tiny_model(0)))
    assert isinstance(engine, ServerEngine)

    async def use() -> None:
        await engine.start()
        try:
            key = engine.server._session.headers["Authorization"].removeprefix("Bearer ")
            assert len(key) > 40
            await strangers_are_refused(engine, key)
            await engine.update_weights(exported_weights(make_tiny_model(1)), 1)
            for temperature in (1.0, 0.6):
                params = sampling(temperature=temperature)
                groups = await generate_all(engine, [(1, 2, 3)], params)
                assert worst_gap(make_tiny_model(1), [(1, 2, 3)], groups, temperature) <= 1e-4
            processes = [psutil.Process(), *server_processes(engine)]
            listening = {
                one.laddr.ip for process in processes for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN
            }
            assert listening == {"127.0.0.1"}
            assert not [process for process in processes if key in " ".join(process.cmdline())]
        finally:
            await engine.close()
        assert all_gone(processes[1:])
        for file in (tmp_path / "run").rglob("*"):
            assert not file.is_file() or key.encode() not in file.read_bytes(), file

    asyncio.run(use())
