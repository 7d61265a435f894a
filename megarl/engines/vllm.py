"""The real vLLM as a rollout engine."""

import asyncio
import base64
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

from megarl.engines.protocol import Generation, SamplingParams
from megarl.engines.server_connection import DEATH_NOTICE, abandon
from megarl.engines.server_engine import EngineSizes, ServerEngine, SliceSender, token_versions
from megarl.engines.server_launch import PLUGIN_FOLDER, cores_of_ranks, flags, inherited_environment, server_python
from megarl.engines.weight_sender import WeightSender
from megarl.errors import MegaRLError, RolloutError, shortened
from megarl.json_text import parse_json
from megarl.sockets import LOCALHOST
from megarl.types import FinishReason

WORKER_EXTENSION = "megarl_vllm_worker.MegaRLWorkerExtension"
MIDDLEWARE = "megarl_guard.RequireKey"
CPU_KV_CACHE_BYTES = 1 << 30


class VllmEngine(ServerEngine):
    """RolloutEngine over vLLM's token-in token-out endpoint.

    Sample ``i`` of a prompt is drawn with vLLM's own per-request generator seeded by ``seed + i``.
    """

    name = "vLLM"
    section = "vllm"
    hint = (
        "start it as docs/engines.md says: VLLM_SERVER_DEV_MODE=1, MegaRL's PYTHONPATH, --enable-scale-out, "
        "--logprobs-mode processed_logprobs, --worker-extension-cls"
    )

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; ``rollout.vllm.arguments`` come last and override the rest."""
        rollout = self.config.rollout
        arguments: dict[str, Any] = {
            "model": str(self.config.model.path),
            "host": LOCALHOST,
            "port": port,
            "dtype": self.settings.dtype or self.config.model.dtype,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "max_model_len": rollout.max_prompt_tokens + rollout.max_new_tokens,
            "load_format": "dummy",  # the trainer sends the weights before the first request
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model folder's sampling defaults
            "logprobs_mode": self._logprobs_mode,
            "worker_extension_cls": WORKER_EXTENSION,
            "enable_scale_out": True,  # the token-in token-out endpoint
            "middleware": MIDDLEWARE,  # vLLM's own key leaves the endpoints below open
        }
        if rollout.routing_replay:
            arguments["enable_return_routed_experts"] = True
        needed = {
            "PYTHONPATH": str(PLUGIN_FOLDER),
            "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for pausing, worker calls and cache resets
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": LOCALHOST,  # its processes are all on this machine
            "HF_HUB_OFFLINE": "1",
        }
        if not torch.cuda.is_available():
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
                # after a part of a prompt vLLM takes random numbers back by an offset, which generators on CPU do not have: it dies
                "enable_chunked_prefill": False,
            }
            needed["TORCH_COMPILE_DISABLE"] = "1"  # compiling costs seconds at the first request and gains little on CPU
            if self.settings.tensor_parallel_size > 1:
                needed["VLLM_CPU_OMP_THREADS_BIND"] = cores_of_ranks(self.settings.tensor_parallel_size)
        command = [server_python("vllm", self.settings), "-m", "vllm.entrypoints.openai.api_server"]
        return [*command, *flags(arguments | self.settings.arguments, negated=True)], inherited_environment() | needed

    async def start(self) -> None:
        """Start the server, or find the one at ``rollout.vllm.url``, and wait until it is healthy."""
        rollout = self.config.rollout
        if rollout.routing_replay and not self.settings.url and not torch.cuda.is_available():
            raise RolloutError(
                "rollout.routing_replay: vLLM reports experts only from its second model runner, which needs Triton and so a GPU; "
                "on CPU use engine sglang or embedded, or set it to false"
            )
        self._require_known_logprobs(rollout.temperature)
        await super().start()

    async def sample(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` different responses; one at temperature 0."""
        self._require_known_logprobs(sampling.temperature)
        body = {"token_ids": list(prompt_token_ids), "sampling_params": _sampling_params(sampling)}
        answer = await self.server.call("POST", "/inference/v1/generate", body)
        with self.server.understanding("/inference/v1/generate", answer):
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [self._generation(choice, len(prompt_token_ids)) for choice in choices]

    def _generation(self, choice: dict[str, Any], num_prompt_tokens: int) -> Generation:
        token_ids = tuple(choice["token_ids"])
        encoded = choice.get("routed_experts")
        report = None if encoded is None else numpy.load(io.BytesIO(base64.b64decode(encoded)))
        return Generation(
            token_ids=token_ids,
            logprobs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            weight_versions=token_versions("vLLM", choice["weight_versions"], len(token_ids)),
            finish_reason=FinishReason(choice["finish_reason"]),
            routed_experts=self.routed_experts(report, num_prompt_tokens + len(token_ids)),
        )

    async def give_up(self) -> None:
        """Have the server answer the requests that it has with what there is of them."""
        await self.server.call("POST", "/pause?mode=abort")
        await self.server.call("POST", "/resume")

    async def pause(self) -> None:
        """Let the requests in flight finish and start no others."""
        await self.limited(self.server.call("POST", "/pause?mode=wait"), "finish its requests before the weight update")

    async def sizes(self) -> EngineSizes:
        """Return how the server divides the model: over tp ranks, experts whole where it has expert parallelism."""
        answer = await self.limited(self._rpc("megarl_place"), "tell how it divides the model")
        with self.server.understanding("/collective_rpc", answer):
            place = parse_json(answer[0])
            sizes = {kind: int(place[kind]) for kind in ("tensor", "pipeline", "data")}
            rope, logprobs_mode, has_experts = dict(place["rope_parameters"]), str(place["logprobs_mode"]), bool(place["experts"])
        self.require_same_rope(rope)
        self._require_logprobs_mode(logprobs_mode)
        for kind in ("pipeline", "data"):
            if sizes[kind] > 1:
                raise RolloutError(
                    f"vLLM runs with {kind}_parallel_size {sizes[kind]}, over which weights cannot be updated; "
                    "use rollout.vllm.tensor_parallel_size alone"
                )
        return EngineSizes(tp=sizes["tensor"], ep=sizes["tensor"] if has_experts else 1)

    async def join(self, sender: WeightSender) -> None:
        """Let every worker join the sender's group for whole tensors."""
        address = {"host": sender.host, "port": sender.port}
        await self._rpc("megarl_join", address | {"world_size": sender.world_size, "timeout": self.settings.update_timeout})

    async def join_slices(self, sender: SliceSender) -> None:
        """Let every worker join the sender's group for slices."""
        address = {"host": sender.host, "port": sender.port, "first_rank": sender.first_worker}
        await self._rpc("megarl_join_slices", address | {"world_size": sender.world_size, "timeout": self.settings.update_timeout})

    async def receive_slices(self) -> None:
        """Let every worker receive and load one whole set of slices."""
        await self._rpc("megarl_receive_slices")

    async def transfer(
        self, sender: WeightSender, messages: Iterable[list[tuple[str, Tensor]]], finish: Callable[[], None]
    ) -> None:
        """Send and load all messages while one call of every worker receives them."""
        receiving = asyncio.ensure_future(self._rpc("megarl_receive"))
        try:
            for message in messages:
                await self.sent(sender.send_bucket, message, task="receive weights", partner=receiving)
            try:
                finish()
            except MegaRLError as error:
                await self.sent(sender.send_abort, str(error), task="hear of the refused update")
                await asyncio.wait({receiving}, timeout=DEATH_NOTICE)  # the server cannot shut down while its workers receive
                raise
            await self.sent(sender.send_end, task="receive the end of the weights", partner=receiving)
            await self.limited(receiving, "load the new weights")
        finally:
            abandon(receiving)

    async def reset_prefix_cache(self) -> None:
        """Drop keys and values of the old weights."""
        reset = await self.limited(self.server.call("POST", "/reset_prefix_cache"), "reset its prefix cache")
        with self.server.understanding("/reset_prefix_cache", reset):
            was_reset = reset["success"]
        if not was_reset:
            raise RolloutError("vLLM could not reset its prefix cache after the weight update: requests still hold blocks of it")

    async def resume(self) -> None:
        """Let the engine answer requests again."""
        await self.limited(self.server.call("POST", "/resume"), "resume after the weight update")

    async def _rpc(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker extension on every worker."""
        answer = await self.server.call("POST", "/collective_rpc", {"method": method, "kwargs": arguments or {}})
        with self.server.understanding("/collective_rpc", answer):
            return list(answer["results"]) if answer else []

    @property
    def _logprobs_mode(self) -> str:
        """Processed log-probabilities are under softmax(logits / temperature), but only of what penalties, top-k, ... leave."""
        return "raw_logprobs" if self.config.rollout.reshaping() else "processed_logprobs"

    def _require_logprobs_mode(self, reported: str) -> None:
        """Refuse a server that reports log-probabilities under another distribution than the protocol's."""
        rollout = self.config.rollout
        if reported != self._logprobs_mode and (reported != "raw_logprobs" or rollout.temperature != 1):
            options = {"temperature": rollout.temperature} | rollout.reshaping()
            raise RolloutError(
                f"vLLM runs with --logprobs-mode {shortened(reported, 40)}, whose log-probabilities are not those of sampling at "
                f"{_in_words(options)}; start it with --logprobs-mode {self._logprobs_mode}"
            )

    def _require_known_logprobs(self, temperature: float) -> None:
        """Refuse sampling whose log-probabilities vLLM reports under another distribution than the protocol's."""
        reshaping = self.config.rollout.reshaping()
        if reshaping and temperature not in (0, 1):
            raise RolloutError(
                f"vLLM cannot report log-probabilities at temperature {temperature:g} over the whole vocabulary together with "
                f"{_in_words(reshaping)} of rollout; use temperature 1, or leave them out"
            )


def _in_words(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def _sampling_params(sampling: SamplingParams) -> dict[str, Any]:
    greedy, repetition = sampling.temperature == 0, sampling.repetition_stop
    return {
        "n": 1 if greedy else sampling.num_samples,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "repetition_detection": None if repetition is None else repetition.model_dump(),  # the same names
        "ignore_eos": True,  # stop_token_ids are the only ones that stop
        "seed": sampling.seed,
        "logprobs": 0,  # of the sampled token only
        "detokenize": False,
    }
