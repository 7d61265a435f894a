"""The real vLLM as a rollout engine: a server process in an environment of its own, or one given by URL."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megarl.config.schema import Config
from megarl.errors import MegaRLError, RolloutError
from megarl.rollout.protocol import Generation, SamplingParams
from megarl.rollout.server_process import ServerProcess, free_port
from megarl.rollout.vllm_server import HOST, PLUGIN_FOLDER, WORKER_EXTENSION, server_command, server_environment
from megarl.rollout.weight_checklist import WeightChecklist
from megarl.rollout.weight_sender import WeightSender, buckets
from megarl.types import FinishReason

T = TypeVar("T")

HEALTH_TIMEOUT = 10.0
DEATH_NOTICE = 20.0  # a dying server drops its connections a moment before its exit code is known


class _RefusedError(RolloutError):
    """The server is well and says that the request is wrong."""


class VllmEngine:
    """RolloutEngine over vLLM's token-in token-out endpoint.

    Sample ``i`` of a prompt is drawn with vLLM's own per-request generator seeded by ``seed + i``. A failed weight update ends the
    server: half-updated weights are never served.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        """The server's output goes to ``run_dir``/engine.log."""
        self._settings = config.rollout.vllm
        self._config = config
        self._log_path = run_dir / "engine.log"
        self._server: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = (self._settings.url or "").rstrip("/")
        self._sender: WeightSender | None = None
        self._version: int | None = None
        self._unusable = "it has no weights yet; call update_weights first"

    async def start(self) -> None:
        """Start the server, or find the one at ``rollout.vllm.url``, and wait until it is healthy."""
        self._require_known_logprobs(self._config.rollout.temperature, self._config.rollout.top_p, self._config.rollout.top_k)
        if not self._settings.url:
            port = free_port(HOST, self._settings.port)
            self._url = f"http://{HOST}:{port}"
            command = server_command(self._config, port)
            self._server = ServerProcess("vLLM", command, server_environment(), self._log_path)
            await self._server.start()
        # One connection per prompt in flight; the collector bounds these.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))
        try:
            await self._watch(self._until_healthy(), "start", self._settings.start_timeout, "start_timeout")
        except BaseException:
            await self.close()
            raise

    async def health(self) -> None:
        """Raise RolloutError when the engine cannot answer."""
        if self._server is not None and self._server.exited is not None and self._server.exited.done():
            raise self._server.death()
        if self._version is None:
            raise RolloutError(f"vLLM cannot answer: {self._unusable}")
        await self._watch(self._call("GET", "/health"), "answer /health", HEALTH_TIMEOUT)

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` responses to one prompt, in order."""
        if self._version is None:
            raise RolloutError(f"vLLM cannot answer: {self._unusable}")
        self._require_known_logprobs(sampling.temperature, sampling.top_p, sampling.top_k)
        body = {"token_ids": list(prompt_token_ids), "sampling_params": _sampling_params(sampling)}
        answer = await self._watch(self._call("POST", "/inference/v1/generate", body), "answer a prompt", None)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        generations = [_generation(choice) for choice in choices]
        # vLLM refuses several greedy samples of one request; they are all the same.
        return generations * sampling.num_samples if sampling.temperature == 0 else generations

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send a whole new set of weights to every worker; requests in flight finish on the old weights first.

        Raises:
            WeightsError: a parameter is missing, unknown or mis-shaped.
            RolloutError: the server died, refused, or took longer than ``rollout.vllm.update_timeout``.
        """
        self._version, self._unusable = None, f"its update to weight version {version} did not complete"
        try:
            await self._update(weights, version)
        except BaseException:
            for _ in weights:  # read to its end: making it is a collective of all trainer ranks
                pass
            if self._server is not None:
                await self._server.close()
            raise
        self._version = version

    async def close(self) -> None:
        """End the server and all its processes; a server given by URL is left alone."""
        self._version, self._unusable = None, "it is closed"
        if self._session is not None:
            await self._session.close()
        if self._server is not None:
            await self._server.close()

    async def _update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        limit = (self._settings.update_timeout, "update_timeout")
        await self._watch(self._call("POST", "/pause?mode=wait"), "finish its requests before the weight update", *limit)
        sender = self._sender or await self._join(limit)
        receiving = asyncio.ensure_future(self._rpc("megarl_receive"))
        try:
            checklist = WeightChecklist(_model_on_meta(self._config.model.path))
            for bucket in buckets((name, tensor) for name, tensor in weights if checklist.accepts(name, tensor)):
                await self._watch(_in_thread(sender.send_bucket, bucket), "receive weights", *limit, receiving)
            try:
                checklist.finish("vLLM")
            except MegaRLError as error:
                await self._watch(_in_thread(sender.send_abort, str(error)), "hear of the refused update", *limit)
                await asyncio.wait({receiving}, timeout=DEATH_NOTICE)  # the server cannot shut down while its workers receive
                raise
            await self._watch(_in_thread(sender.send_end), "receive the end of the weights", *limit, receiving)
            await self._watch(receiving, "load the new weights", *limit)
        finally:
            _abandon(receiving)
        reset = await self._watch(self._call("POST", "/reset_prefix_cache"), "reset its prefix cache", *limit)
        if not reset["success"]:
            raise RolloutError("vLLM could not reset its prefix cache after the weight update: requests still hold blocks of it")
        await self._watch(self._call("POST", "/update_weight_version", {"new_version": str(version)}), "set the version", *limit)
        await self._watch(self._call("POST", "/resume"), "resume after the weight update", *limit)

    async def _join(self, limit: tuple[float, str]) -> WeightSender:
        """Make the group of this process and the server's workers."""
        ranks = await self._watch(self._rpc("megarl_rank"), "name its workers", *limit)
        host = _own_address(self._url)
        sender = WeightSender(host, len(ranks), self._settings.update_timeout)
        arguments = {"host": host, "port": sender.port, "world_size": sender.world_size, "timeout": self._settings.update_timeout}
        joining = asyncio.ensure_future(self._rpc("megarl_join", arguments))
        try:
            await self._watch(_in_thread(sender.join), "join the weight-transfer group", *limit, joining)
            await self._watch(joining, "join the weight-transfer group", *limit)
        finally:
            _abandon(joining)
        self._sender = sender
        return sender

    async def _rpc(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker extension on every worker."""
        answer = await self._call("POST", "/collective_rpc", {"method": method, "kwargs": arguments or {}})
        return list(answer.get("results", []))

    async def _until_healthy(self) -> None:
        while True:
            try:
                await self._call("GET", "/health")
                return
            except RolloutError:
                await asyncio.sleep(0.25)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One HTTP request; RolloutError when it is not answered with status 200."""
        if self._session is None:
            raise RolloutError("vLLM was not started")
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                text = await response.text()
                if response.status != 200:
                    problem = f"vLLM answered {method} {path} with {response.status}: {_message(text)}{_hint(response.status)}"
                    raise _RefusedError(problem) if response.status < 500 else RolloutError(problem)
                return json.loads(text) if text else {}
        except (aiohttp.ClientError, OSError) as error:
            raise RolloutError(f"vLLM at {self._url} does not answer {method} {path}: {error or type(error).__name__}") from error

    async def _watch(
        self, work: Awaitable[T], task: str, seconds: float | None, key: str = "", partner: asyncio.Future[Any] | None = None
    ) -> T:
        """Wait for ``work``, but no longer than the server lives, ``seconds`` last, or ``partner`` (its other end) works.

        Raises:
            RolloutError: the server's death where it died, else the failure of ``work`` or ``partner``, else the time-out.
        """
        future = asyncio.ensure_future(work)
        exited = self._server.exited if self._server is not None else None
        watched = {future} | ({exited} if exited else set()) | ({partner} if partner else set())
        try:
            done, _ = await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if partner in done and future not in done:
                await asyncio.wait({future}, timeout=0 if partner.exception() else seconds)
            failed = next((one for one in (future, partner) if one is not None and one.done() and one.exception()), None)
            if failed is not None and exited is not None and not isinstance(failed.exception(), _RefusedError):
                await asyncio.wait({exited}, timeout=DEATH_NOTICE)
            if exited is not None and exited.done() and (failed is not None or not future.done()):
                assert self._server is not None
                raise self._server.death()
            if failed is not None:
                failed.result()
            if not future.done():
                where = f" (rollout.vllm.{key})" if key else ""
                raise RolloutError(f"vLLM at {self._url} did not {task} within {seconds:g} s{where}; see {self._log_path}")
            return future.result()
        finally:
            future.cancel()

    def _require_known_logprobs(self, temperature: float, top_p: float, top_k: int) -> None:
        """Refuse sampling whose log-probabilities vLLM reports under another distribution than the protocol's."""
        truncated = self._config.rollout.top_p < 1 or self._config.rollout.top_k > 0
        if truncated and temperature not in (0, 1):
            raise RolloutError(
                f"vLLM cannot report log-probabilities at temperature {temperature:g} over the whole vocabulary together with "
                f"rollout.top_p={top_p:g}, rollout.top_k={top_k}; use temperature 1, or top_p=1 and top_k=0"
            )


def _sampling_params(sampling: SamplingParams) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    return {
        "n": 1 if greedy else sampling.num_samples,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids are the only ones that stop
        "seed": sampling.seed,
        "logprobs": 0,  # of the sampled token only
        "detokenize": False,
    }


def _generation(choice: dict[str, Any]) -> Generation:
    versions = {int(span["version"]) for span in choice["weight_versions"]}
    if len(versions) != 1:
        raise RolloutError(f"vLLM sampled one response with the weight versions {sorted(versions)}; one is expected")
    return Generation(
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
        finish_reason=FinishReason(choice["finish_reason"]),
        weight_version=versions.pop(),
    )


def _model_on_meta(folder: Path) -> nn.Module:
    """The model's names and shapes without its memory."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


def _own_address(url: str) -> str:
    """The address of this machine that the server at ``url`` can reach."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((parts.hostname or HOST, parts.port or 80))
        return str(probe.getsockname()[0])


def _message(text: str) -> str:
    """The message of an error answer, on one line."""
    try:
        answer = json.loads(text)
        text = str(answer["error"]["message"] if isinstance(answer.get("error"), dict) else answer.get("error", text))
    except (ValueError, KeyError, AttributeError):
        pass  # not vLLM's error form: show it as it is
    return " ".join(text.split())[:500]


def _hint(status: int) -> str:
    if status not in (403, 404):
        return ""
    return (
        f"; a server given by rollout.vllm.url must be started with VLLM_SERVER_DEV_MODE=1 PYTHONPATH={PLUGIN_FOLDER} "
        f"and --enable-scale-out --worker-extension-cls {WORKER_EXTENSION}"
    )


def _abandon(call: asyncio.Future[Any]) -> None:
    """Cancel a call whose answer, or failure, no longer matters."""
    call.cancel()
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # an exception nobody reads is logged as a bug


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking call in a daemon thread: unlike asyncio's own pool, one that hangs in gloo cannot hold up the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # given up by its caller
            return
        if error is None:
            future.set_result(cast(T, result))
        else:
            failure = RolloutError(f"weight transfer to vLLM failed: {error}")
            failure.__cause__ = error
            future.set_exception(failure)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True, name="weight-transfer").start()
    return await future
