"""SGLang plugin: receives MegaRL's weights in its workers, lets only a request's own stop tokens end a response, tells the RoPE.

Runs in the engine's own environment: its folder is put on PYTHONPATH, and every process of SGLang finds ``register`` by the entry
point in the folder beside this file (sglang/srt/plugins/__init__.py).
"""

import os
from collections.abc import Callable
from multiprocessing import parent_process
from typing import Any

import torch
from megarl_guard import KEY_VARIABLE, RequireKey, keep_stores_to_their_address
from megarl_slice_receiver import SliceReceiver
from megarl_weight_receiver import WeightReceiver
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor, nn

# the trainer's words for this plugin where SGLang's requests name a communication backend
WHOLE_TENSORS, SLICES = "megarl", "megarl-slices"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
JOIN_TIMEOUT = 120.0  # seconds; SGLang's request has no field for it, and the trainer's own time-out ends the server
# projections to the latents of queries and of keys, which SGLang fuses
LATENT_PARTNERS = {"q_a_proj": "kv_a_proj_with_mqa", "kv_a_proj_with_mqa": "q_a_proj"}


def register() -> None:
    """Register what SGLang calls at the start of every process."""
    keep_stores_to_their_address()
    if KEY_VARIABLE in os.environ and parent_process() is None:  # the one that answers requests
        HookRegistry.register("sglang.srt.server_args.prepare_server_args", _with_key, HookType.AROUND)
        HookRegistry.register("sglang.srt.entrypoints.http_server._setup_and_run_http_server", _guarded, HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.init_weights_update_group", _join, HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.receive_weights_from_distributed", _receive, HookType.AROUND)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _with_rope, HookType.AROUND)
    # With skip_tokenizer_init these are SGLang's only stop tokens beside the request's.
    HookRegistry.register("sglang.srt.configs.model_config.ModelConfig._get_hf_eos_token_id", _no_stop_tokens, HookType.REPLACE)


class _Secret(str):
    """A text that is not shown where SGLang writes its arguments into its log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def _with_key(original: Callable[..., Any], *arguments: Any) -> Any:
    """Return SGLang's arguments with the run's key, which its own requests at start carry."""
    server_args = original(*arguments)
    server_args.api_key = _Secret(os.environ[KEY_VARIABLE])
    return server_args


def _guarded(original: Callable[..., None], *arguments: object, **named: object) -> None:
    """Serve only those who have the run's key."""
    from sglang.srt.entrypoints.http_server import app

    app.add_middleware(RequireKey)
    original(*arguments, **named)


def _no_stop_tokens(model_config: object) -> set[int]:
    return set()


def _with_rope(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Return what /server_info says of a worker, with the RoPE of its model and which log-probs it reports."""
    from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB

    output = original(scheduler, request)
    output.internal_state["megarl_original_logprobs"] = bool(SGLANG_RETURN_ORIGINAL_LOGPROB)
    model_config = scheduler.tp_worker.model_runner.model_config
    output.internal_state["megarl_rope_parameters"] = dict(model_config.hf_text_config.rope_parameters)
    return output


def _join(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    master_address: str,
    master_port: int,
    rank_offset: int,
    world_size: int,
    group_name: str,
    backend: str = "nccl",
) -> tuple[bool, str]:
    """Join the trainer's group under ``group_name``, with the result that SGLang's method has."""
    if backend not in (WHOLE_TENSORS, SLICES):
        return original(updater, master_address, master_port, rank_offset, world_size, group_name, backend)
    try:
        membership = (master_address, master_port, world_size, rank_offset + updater.tp_rank, JOIN_TIMEOUT)
        receiver = WeightReceiver(*membership) if backend == WHOLE_TENSORS else SliceReceiver(*membership, _device(updater))
    except RuntimeError as error:
        return False, f"cannot join the trainer's group at {master_address}:{master_port}: {error}"
    updater._model_update_group[group_name] = receiver
    return True, "joined"


def _device(updater: Any) -> torch.device:
    return torch.device(updater.device, updater.gpu_id) if updater.device == "cuda" else torch.device(updater.device)


def _receive(original: Callable[..., Any], updater: Any, *, group_name: str, **described: Any) -> list[tuple[str, Tensor]]:
    """Receive one message of the trainer, on the worker's device, or all of the worker's slices, written where they belong.

    SGLang reports what is raised as the failure of the update.
    """
    receiver = updater._model_update_group.get(group_name)
    if isinstance(receiver, SliceReceiver):
        model = updater.get_model()
        receiver.receive(_LiveParameters(model))
        if hasattr(model, "post_load_weights"):  # derives parameters from others; SGLang leaves it to load_weights
            model.post_load_weights()
        return []
    if not isinstance(receiver, WeightReceiver):
        return original(updater, group_name=group_name, **described)
    tensors = receiver.receive()
    names = None if tensors is None else [name for name, _ in tensors]
    if tensors is None or names != described["names"]:
        raise RuntimeError(f"weights of {names} arrived, announced were {described['names']}")
    return [(name, tensor.to(updater.device)) for name, tensor in _with_partners(receiver, updater.get_model(), tensors)]


def _with_partners(receiver: WeightReceiver, model: nn.Module, tensors: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the tensors, less those held back until a later message brings their partner.

    SGLang loads the two projections that it fuses only where one call of ``load_weights`` brings both, and drops one that comes
    alone (models/deepseek_common/deepseek_weight_loader.py, ``cached_a_proj``).
    """
    fused = {name.partition(".fused_qkv_a_proj_with_mqa.")[0] for name, _ in model.named_parameters() if "fused_qkv_a" in name}
    ready = []
    for name, tensor in tensors:
        attention, _, projection = name.removesuffix(".weight").rpartition(".")
        partner = f"{attention}.{LATENT_PARTNERS.get(projection)}.weight"
        if projection not in LATENT_PARTNERS or attention not in fused:
            ready.append((name, tensor))
        elif partner in receiver.held:
            ready += [(partner, receiver.held.pop(partner)), (name, tensor)]
        else:
            receiver.held[name] = tensor
    return ready


class _LiveParameters:
    """SGLang's parameters and buffers, which its update session has brought into the form that checkpoints are loaded into."""

    def __init__(self, model: nn.Module) -> None:
        for name, layer in model.named_modules():
            _check_order_of_experts(name, layer)
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def open(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise RuntimeError(f"this engine has no parameter {name}")
        return self._tensors[name].data

    def finish(self, name: str) -> None:
        """Do nothing: ``end_weight_update`` processes what has changed."""


def _check_order_of_experts(name: str, layer: nn.Module) -> None:
    """Some kernels have gate and up projections in the other order, or transposed, already in what checkpoints are loaded into."""
    reordered = (
        getattr(layer, "use_flashinfer_trtllm_moe", False)
        or getattr(layer, "use_triton_kernels", False)
        or getattr(getattr(layer, "quant_method", None), "load_up_proj_weight_first", False)
    )
    if reordered:
        raise RuntimeError(
            f"{name} keeps its experts in the order of another kernel than the trainer's plan knows; set "
            "rollout.sglang.arguments.moe_runner_backend to triton, or rollout.weight_transfer.method to broadcast"
        )
