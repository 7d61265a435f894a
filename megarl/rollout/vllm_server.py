"""How the vLLM server is started: its command line and its environment."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from megarl.config.schema import Config
from megarl.errors import RolloutError
from megarl.rollout.engine_environment import default_vllm_python

HOST = "127.0.0.1"
PLUGIN_FOLDER = Path(__file__).with_name("vllm_plugin")
WORKER_EXTENSION = "megarl_vllm_worker.MegaRLWorkerExtension"
CPU_KV_CACHE_BYTES = 1 << 30
LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "OMP_", "MKL_", "PYTHON", "VIRTUAL_ENV")


def server_command(config: Config, port: int) -> list[str]:
    """The command line of the server; ``rollout.vllm.arguments`` come last and override the rest."""
    rollout = config.rollout
    truncated = rollout.top_p < 1 or rollout.top_k > 0
    arguments: dict[str, Any] = {
        "model": str(config.model.path),
        "host": HOST,
        "port": port,
        "dtype": rollout.vllm.dtype or config.model.dtype,
        "tensor_parallel_size": rollout.vllm.tensor_parallel_size,
        "max_model_len": rollout.max_prompt_tokens + rollout.max_new_tokens,
        "load_format": "dummy",  # the trainer sends the weights before the first request
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model folder's sampling defaults
        # Processed log-probabilities are under softmax(logits / temperature), but only among the tokens that top-k and top-p keep.
        "logprobs_mode": "raw_logprobs" if truncated else "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_scale_out": True,  # the token-in token-out endpoint
    }
    if not torch.cuda.is_available():
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    python = rollout.vllm.python or default_vllm_python()
    if not python.is_file():
        raise RolloutError(f"rollout.vllm.python {python} does not exist; leave it out to use the one that make engine-vllm builds")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (arguments | rollout.vllm.arguments).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return command


def server_environment() -> dict[str, str]:
    """The trainer's environment without what its launcher and its Python put there, and with what the server needs."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    needed = {
        "PYTHONPATH": str(PLUGIN_FOLDER),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for pausing, worker calls and cache resets
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not torch.cuda.is_available():
        needed["TORCH_COMPILE_DISABLE"] = "1"  # compiling costs seconds at the first request and gains little on CPU
    return inherited | needed
