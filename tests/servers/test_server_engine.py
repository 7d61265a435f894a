"""The protocol of weight updates against a server of ours with SGLang's endpoints that fails where a test wants it to."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from engine_plugin import load_plugin
from megarl.config.schema import Config
from megarl.engines.sglang import SGLangEngine
from megarl.errors import RolloutError, WeightsError
from megarl.types import FinishReason
from tiny_rollout import exported_weights, make_tiny_model, sampling, weight_shapes

WeightReceiver = load_plugin("megarl_weight_receiver").WeightReceiver

UPDATE = [
    "/begin_weight_update",
    "/pause_generation",
    "/server_info",
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/end_weight_update",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
]


class FakeSGLang:
    """Answers as SGLang does; one worker."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.generate_body: dict[str, Any] = {}
        self.refuses = self.hangs = ""
        self.rope_parameters: dict[str, Any] = {"rope_type": "default", "type": "default", "rope_theta": 10000.0}
        self.weights: dict[str, torch.Tensor] = {}
        self.spans = [{"version": "default", "start": 0, "end": 2}]
        self.aborts_needed = 0  # requests are answered after so many calls to give them up
        self.enough_aborts = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if request.path == self.refuses:
            return web.json_response({"success": False, "message": "not\ntoday"}, status=400)
        if request.path == self.hangs:
            await asyncio.sleep(3600)
        text = await request.text()
        body = json.loads(text) if text else {}
        if request.path == "/init_weights_update_group":
            place = (body["master_address"], body["master_port"], body["world_size"], body["rank_offset"])
            self.receiver = await asyncio.to_thread(WeightReceiver, *place, 20.0)
        elif request.path == "/update_weights_from_distributed":
            self.weights |= dict(await asyncio.to_thread(self.receiver.receive))
        elif request.path == "/update_weight_version":
            self.spans = [{"version": body["new_version"], "start": 0, "end": 2}]
        elif request.path == "/abort_request":
            assert body == {"abort_all": True}
            if self.calls.count(request.path) >= self.aborts_needed:
                self.enough_aborts.set()
        elif request.path == "/generate":
            self.generate_body = body
            if self.aborts_needed:
                await self.enough_aborts.wait()
            return web.json_response([self.generation(params) for params in body["sampling_params"]])
        sizes = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "ep_size": 1}
        state = {"megarl_rope_parameters": self.rope_parameters}
        return web.json_response({"success": True, "message": "", **sizes, "internal_states": [state]})

    def generation(self, params: dict[str, Any]) -> dict[str, Any]:
        about = {
            "finish_reason": {"type": "stop", "matched": 4},
            "output_token_logprobs": [[-0.25, 3, None], [-0.5, 4, None]],
            "weight_versions": self.spans,
        }
        return {"output_ids": [3, 4], "meta_info": about}


Use = Callable[[FakeSGLang, SGLangEngine], Awaitable[Any]]


def with_server(folder: Path, use: Use, update_timeout: float = 20.0) -> Any:
    """What ``use`` returns, given a started engine."""

    async def run() -> Any:
        fake = FakeSGLang()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", fake.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        values = {
            "kind": "rl",
            "steps": 1,
            "model": {"path": folder},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "rollout": {"engine": "sglang", "sglang": {"url": f"http://127.0.0.1:{port}", "update_timeout": update_timeout}},
        }
        engine = SGLangEngine(Config.model_validate(values), folder, weight_shapes(make_tiny_model(0)))
        await engine.start()
        try:
            return await use(fake, engine)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(run())


def test_updates_load_every_tensor_before_the_version_is_served(model_folder: Path) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        for version, seed in ((4, 1), (5, 2)):
            fake.calls.clear()
            model = make_tiny_model(seed)
            await engine.update_weights(exported_weights(model), version)
            first_only = ["/server_info", "/init_weights_update_group"]
            assert fake.calls == [path for path in UPDATE if version == 4 or path not in first_only]
            assert fake.weights.keys() == dict(exported_weights(model)).keys()
            assert all(torch.equal(fake.weights[name], tensor) for name, tensor in exported_weights(model))
            generations = await engine.generate((1, 2), sampling(seed=70, stop_token_ids=(4,), top_k=5))
            assert [set(one.weight_versions) for one in generations] == [{version}] * 3
        assert generations[0].token_ids == (3, 4)
        assert generations[0].logprobs == (-0.25, -0.5)
        assert generations[0].finish_reason is FinishReason.STOP
        assert fake.generate_body["input_ids"] == [[1, 2]] * 3
        assert [params["sampling_seed"] for params in fake.generate_body["sampling_params"]] == [70, 71, 72]
        greedy = await engine.generate((1, 2), sampling(temperature=0.0, top_k=5))
        assert len(greedy) == 3
        assert [params["top_k"] for params in fake.generate_body["sampling_params"]] == [-1]

    with_server(model_folder, use)


def test_a_server_that_scales_rope_otherwise_is_refused(model_folder: Path) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        fake.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
        with pytest.raises(RolloutError) as refused:
            await engine.update_weights(exported_weights(make_tiny_model(1)), 0)
        assert str(refused.value).startswith(
            "SGLang scales RoPE by {'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 4.0}, and "
        )
        assert f"config.json of {model_folder}); start the server with this config.json" in str(refused.value)
        assert fake.calls[-1] == "/server_info"
        with pytest.raises(RolloutError, match="update to weight version 0 did not complete"):
            await engine.generate((1, 2), sampling())

    with_server(model_folder, use)


@pytest.mark.timeout(30)
def test_an_abort_ends_when_all_requests_are_answered(model_folder: Path) -> None:
    """Requests that were on their way when the others were given up are caught by the next call."""

    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        await engine.update_weights(exported_weights(make_tiny_model(1)), 0)
        await engine.abort()
        assert "/abort_request" not in fake.calls  # nothing is in flight
        fake.aborts_needed = 2
        requests = [asyncio.ensure_future(engine.generate((1, 2), sampling())) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.abort()
        assert fake.calls.count("/abort_request") == 2
        assert len(await asyncio.gather(*requests)) == 3
        await asyncio.wait_for(engine.abort(), 1)

    with_server(model_folder, use)


@pytest.mark.timeout(30)
def test_an_abort_that_takes_too_long_is_an_error(model_folder: Path) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        await engine.update_weights(exported_weights(make_tiny_model(1)), 0)
        fake.aborts_needed = 10**6
        request = asyncio.ensure_future(engine.generate((1, 2), sampling()))
        await asyncio.sleep(0)
        with pytest.raises(RolloutError, match=r"did not give up its requests within 1 s \(rollout\.sglang\.update_timeout\)"):
            await engine.abort()
        request.cancel()

    with_server(model_folder, use, update_timeout=1.0)


@pytest.mark.parametrize("path", UPDATE)
@pytest.mark.parametrize("manner", ["refuses", "hangs"])
def test_an_update_that_fails_anywhere_is_never_served(model_folder: Path, path: str, manner: str) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        await engine.update_weights(exported_weights(make_tiny_model(1)), 0)
        engine._sender = None  # so that the second update joins too
        setattr(fake, manner, path)
        weights = exported_weights(make_tiny_model(2))
        with pytest.raises(RolloutError) as failure:
            await engine.update_weights(weights, 1)
        message = str(failure.value)
        assert message.startswith("SGLang ") or (manner == "hangs" and message.startswith("weight transfer to SGLang failed: "))
        assert ("400: not today; start it as docs/engines.md says: MegaRL's PYTHONPATH" in message) == (manner == "refuses")
        assert manner == "refuses" or "rollout.sglang.update_timeout" in message or "weight transfer" in message
        assert len(message.splitlines()) == 1
        assert next(weights, None) is None  # read to its end, as the other trainer ranks need
        with pytest.raises(RolloutError, match="its update to weight version 1 did not complete"):
            await engine.generate((1, 2), sampling())
        with pytest.raises(RolloutError, match="its update to weight version 1 did not complete"):
            await engine.health()

    with_server(model_folder, use, update_timeout=0.5 if manner == "hangs" else 20.0)


def test_a_set_of_weights_that_is_not_whole_is_never_served(model_folder: Path) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        weights = dict(exported_weights(make_tiny_model(1)))
        del weights["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(WeightsError, match=r"SGLang refused the new weights \(missing: model\.layers\.1\.mlp\.up_proj"):
            await engine.update_weights(iter(weights.items()), 3)
        assert fake.spans[0]["version"] == "default"
        assert "/continue_generation" not in fake.calls
        with pytest.raises(RolloutError, match="its update to weight version 3 did not complete"):
            await engine.generate((1, 2), sampling())

    with_server(model_folder, use)


def test_each_token_has_the_version_that_sampled_it(model_folder: Path) -> None:
    async def use(fake: FakeSGLang, engine: SGLangEngine) -> None:
        await engine.update_weights(exported_weights(make_tiny_model(1)), 0)
        fake.spans = [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}]
        (one, *_) = await engine.generate((1, 2), sampling())
        assert one.weight_versions == (0, 1)
        for spans in (fake.spans[1:], fake.spans[:1], [{"version": "default", "start": 0, "end": 2}]):
            fake.spans = spans
            with pytest.raises(RolloutError, match="SGLang does not tell which weights sampled each of 2 tokens; its spans are"):
                await engine.generate((1, 2), sampling())

    with_server(model_folder, use)
