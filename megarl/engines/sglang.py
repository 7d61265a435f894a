"""The real SGLang as a rollout engine."""

import asyncio
import base64
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megarl.engines.protocol import Generation, SamplingParams
from megarl.engines.server_connection import abandon
from megarl.engines.server_engine import EngineSizes, ServerEngine, SliceSender, token_versions
from megarl.engines.server_launch import PLUGIN_FOLDER, cores_of_ranks, flags, inherited_environment, server_python
from megarl.engines.weight_sender import WeightSender
from megarl.errors import RolloutError
from megarl.sockets import LOCALHOST
from megarl.types import FinishReason

CPU_FOLDER = Path(__file__).with_name("sglang_cpu")  # stand-ins for packages and kernels that exist only for GPUs
CPU_RUNNING_REQUESTS = 32
ORIGINAL_LOGPROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"  # where it is set, log-probabilities know nothing of the temperature
# of the weight transfer; also the words by which plugin/megarl_sglang.py knows its requests
GROUP, SLICE_GROUP = "megarl", "megarl-slices"


class SGLangEngine(ServerEngine):
    """RolloutEngine over SGLang's native /generate endpoint.

    Sample ``i`` of a prompt is a request of its own, drawn with the hash of its seed ``seed + i`` and the position
    (``--enable-deterministic-inference``). SGLang reports log-probabilities under softmax(logits / temperature) over the whole
    vocabulary, whatever top-k, top-p and min-p keep, but after penalties, which config/checks/run.py therefore refuses.
    """

    name = "SGLang"
    section = "sglang"
    hint = "start it as docs/engines.md says: MegaRL's PYTHONPATH, --skip-tokenizer-init and --enable-deterministic-inference"

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; ``rollout.sglang.arguments`` come last and override the rest."""
        rollout = self.config.rollout
        context_length = rollout.max_prompt_tokens + rollout.max_new_tokens
        arguments: dict[str, Any] = {
            "model_path": str(self.config.model.path),
            "host": LOCALHOST,
            "port": port,
            "dtype": self.settings.dtype or self.config.model.dtype,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "context_length": context_length,
            "load_format": "dummy",  # the trainer sends the weights before the first request
            "skip_tokenizer_init": True,
            "grammar_backend": "none",
            "enable_deterministic_inference": True,  # without it a request's seed is ignored
            "random_seed": self.config.seed,
            "disable_shared_experts_fusion": True,  # else its GPU kernels have them among the experts, where no plan puts them
            "enable_return_routed_experts": rollout.routing_replay,
            "log_level": "warning",
        }
        needed = {"PYTHONPATH": str(PLUGIN_FOLDER), "HF_HUB_OFFLINE": "1", ORIGINAL_LOGPROBS: "0"}
        if not torch.cuda.is_available():
            arguments |= {
                "device": "cpu",
                "attention_backend": "torch_native",
                "sampling_backend": "pytorch",
                "disable_overlap_schedule": True,
                "disable_cuda_graph": True,
                "max_running_requests": CPU_RUNNING_REQUESTS,
                "max_total_tokens": CPU_RUNNING_REQUESTS * context_length,  # else most of the machine's memory
            }
            needed["PYTHONPATH"] = f"{PLUGIN_FOLDER}:{CPU_FOLDER}"
            needed["TORCH_COMPILE_DISABLE"] = "1"  # compiling costs seconds at the first request and gains little on CPU
            if self.settings.tensor_parallel_size > 1:
                needed["SGLANG_CPU_OMP_THREADS_BIND"] = cores_of_ranks(self.settings.tensor_parallel_size)
        command = [server_python("sglang", self.settings), "-m", "sglang.launch_server"]
        return [*command, *flags(arguments | self.settings.arguments, negated=False)], inherited_environment() | needed

    async def sample(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` different responses; one at temperature 0."""
        num_requests = 1 if sampling.temperature == 0 else sampling.num_samples
        body = {
            "input_ids": [prompt_token_ids] * num_requests,
            "sampling_params": [_sampling_params(sampling, index) for index in range(num_requests)],
            "return_logprob": True,
            "return_routed_experts": self.config.rollout.routing_replay,
        }
        answers = await self.server.call("POST", "/generate", body)
        with self.server.understanding("/generate", answers):
            if len(answers) != num_requests:
                raise ValueError(f"{len(answers)} responses to {num_requests} requests")
            return [self._generation(answer, len(prompt_token_ids)) for answer in answers]

    def _generation(self, answer: dict[str, Any], num_prompt_tokens: int) -> Generation:
        about = answer["meta_info"]
        token_ids = tuple(answer["output_ids"])
        num_tokens = num_prompt_tokens + len(token_ids)
        encoded = about.get("routed_experts")
        report = None if encoded is None else numpy.frombuffer(base64.b64decode(encoded), numpy.int32)
        return Generation(
            token_ids=token_ids,
            logprobs=tuple(logprob for logprob, *_ in about["output_token_logprobs"]),
            weight_versions=token_versions("SGLang", about["weight_versions"], len(token_ids)),
            finish_reason=FinishReason(about["finish_reason"]["type"]),
            routed_experts=self.routed_experts(report, num_tokens),
        )

    async def give_up(self) -> None:
        """Have the server answer the requests that it has with what there is of them."""
        await self.server.call("POST", "/abort_request", {"abort_all": True})

    async def pause(self) -> None:
        """Let the requests in flight finish and start no others."""
        # Opening an update waits for the requests in flight, but does not keep later ones out.
        await self.limited(self.server.call("POST", "/begin_weight_update", {}), "finish its requests before the weight update")
        await self.limited(self.server.call("POST", "/pause_generation", {"mode": "in_place"}), "pause for the weight update")

    async def sizes(self) -> EngineSizes:
        """Return how the server divides the model: over tensor parallel ranks, over which it may distribute the experts."""
        information = await self.limited(self.server.call("GET", "/server_info"), "tell how it divides the model")
        with self.server.understanding("/server_info", information):
            sizes = {kind: int(information[f"{kind}_size"]) for kind in ("tp", "ep", "pp", "dp")}
            state = information["internal_states"][0]
            rope, is_original = dict(state["megarl_rope_parameters"]), bool(state.get("megarl_original_logprobs"))
        self.require_same_rope(rope)
        if is_original and self.config.rollout.temperature != 1:
            raise RolloutError(
                f"SGLang runs with {ORIGINAL_LOGPROBS}=1, so its log-probabilities are not those of sampling at temperature "
                f"{self.config.rollout.temperature:g}; start it without"
            )
        for kind in ("pp", "dp"):
            if sizes[kind] > 1:
                raise RolloutError(
                    f"SGLang runs with --{kind}-size {sizes[kind]}, over which weights cannot be updated; "
                    "use rollout.sglang.tensor_parallel_size alone"
                )
        return EngineSizes(tp=sizes["tp"], ep=sizes["ep"])

    async def join(self, sender: WeightSender) -> None:
        """Let every worker join the sender's group for whole tensors."""
        await self._join(GROUP, sender, 1)

    async def join_slices(self, sender: SliceSender) -> None:
        """Let every worker join the sender's group for slices."""
        await self._join(SLICE_GROUP, sender, sender.first_worker)

    async def _join(self, group: str, sender: WeightSender | SliceSender, first_worker: int) -> None:
        address = {"master_address": sender.host, "master_port": sender.port}
        place = {"rank_offset": first_worker, "world_size": sender.world_size, "group_name": group, "backend": group}
        await self.server.call("POST", "/init_weights_update_group", address | place)

    async def receive_slices(self) -> None:
        """Let every worker receive and load one whole set of slices."""
        body = {"names": [], "dtypes": [], "shapes": [], "group_name": SLICE_GROUP, "flush_cache": False}
        await self.server.call("POST", "/update_weights_from_distributed", body)
        await self._end_update()

    async def transfer(
        self, sender: WeightSender, messages: Iterable[list[tuple[str, Tensor]]], finish: Callable[[], None]
    ) -> None:
        """Send and load one message after the other, each with a call of its own."""
        for message in messages:
            described = {
                "names": [name for name, _ in message],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in message],
                "shapes": [list(tensor.shape) for _, tensor in message],
            }
            body = described | {"group_name": GROUP, "flush_cache": False}
            loading = asyncio.ensure_future(self.server.call("POST", "/update_weights_from_distributed", body))
            try:
                await self.sent(sender.send_bucket, message, task="receive weights", partner=loading)
                await self.limited(loading, "load the new weights")
            finally:
                abandon(loading)
        finish()
        await self._end_update()

    async def _end_update(self) -> None:
        await self.limited(self.server.call("POST", "/end_weight_update", {}), "finish loading the new weights")

    async def reset_prefix_cache(self) -> None:
        """Drop keys and values of the old weights; refused, and so an error, while requests hold any."""
        await self.limited(self.server.call("POST", "/flush_cache"), "reset its prefix cache")

    async def resume(self) -> None:
        """Let the engine answer requests again."""
        await self.limited(self.server.call("POST", "/continue_generation", {}), "resume after the weight update")


def _sampling_params(sampling: SamplingParams, index: int) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": -1 if greedy or sampling.top_k == 0 else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "sampling_seed": sampling.seed + index,
    }
