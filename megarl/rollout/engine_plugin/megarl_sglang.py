"""SGLang plugin: receives MegaRL's weights in SGLang's workers, and lets only a request's own stop tokens end a response.

Runs in the engine's own environment: its folder is put on PYTHONPATH, and every process of SGLang finds ``register`` by the entry
point in the folder beside this file (sglang/srt/plugins/__init__.py).
"""

from collections.abc import Callable
from typing import Any

from megarl_weight_receiver import WeightReceiver
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

BACKEND = "megarl"  # the trainer's word for this plugin where SGLang's requests name a communication backend
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
JOIN_TIMEOUT = 120.0  # seconds; SGLang's request has no field for it, and the trainer's own time-out ends the server


def register() -> None:
    """Called by SGLang at the start of every process."""
    HookRegistry.register(f"{UPDATER}.init_weights_update_group", _join, HookType.AROUND)
    HookRegistry.register(f"{UPDATER}.receive_weights_from_distributed", _receive, HookType.AROUND)
    # With skip_tokenizer_init these are SGLang's only stop tokens beside the request's.
    HookRegistry.register("sglang.srt.configs.model_config.ModelConfig._get_hf_eos_token_id", _no_stop_tokens, HookType.REPLACE)


def _no_stop_tokens(model_config: Any) -> set[int]:
    return set()


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
    if backend != BACKEND:
        return original(updater, master_address, master_port, rank_offset, world_size, group_name, backend)
    try:
        rank = rank_offset + updater.tp_rank
        updater._model_update_group[group_name] = WeightReceiver(master_address, master_port, world_size, rank, JOIN_TIMEOUT)
    except RuntimeError as error:
        return False, f"cannot join the trainer's group at {master_address}:{master_port}: {error}"
    return True, "joined"


def _receive(original: Callable[..., Any], updater: Any, *, group_name: str, **described: Any) -> list[tuple[str, Tensor]]:
    """One message of the trainer, on the worker's device; SGLang reports what is raised as the failure of the update."""
    receiver = updater._model_update_group.get(group_name)
    if not isinstance(receiver, WeightReceiver):
        return original(updater, group_name=group_name, **described)
    tensors = receiver.receive()
    names = None if tensors is None else [name for name, _ in tensors]
    if tensors is None or names != described["names"]:
        raise RuntimeError(f"weights of {names} arrived, announced were {described['names']}")
    return [(name, tensor.to(updater.device)) for name, tensor in tensors]
