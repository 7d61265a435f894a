"""What the tests of real engines share."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from safetensors.torch import load_file

from megarl.config.schema import Config
from megarl.engines.build import build_engine
from megarl.engines.server_engine import ServerEngine

# Small caches; vLLM's default block of 128 tokens would hide a prefix cache that is not reset. SGLang reads long
# prompts in chunks; for vLLM, which must not do so on CPU, several prompts are too many to be read together.
ARGUMENTS = {
    "vllm": {"block_size": 32, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 160, "max_num_seqs": 64},
    "sglang": {"max_total_tokens": 4096, "chunked_prefill_size": 64},
}


def make_engine(
    name: str, folder: Path, *, routing_replay: bool = False, rollout: Mapping[str, Any] = MappingProxyType({}), **settings: Any
) -> ServerEngine:
    """An engine of the model in ``folder``/model, not started; ``settings`` are those of its section, the rest of ``rollout``'s."""
    section = {"start_timeout": 150, "update_timeout": 60, "arguments": ARGUMENTS[name]} | settings
    config = Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "model": {"path": folder / "model"},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "rollout": {
                "engine": name,
                "max_prompt_tokens": 128,
                "max_new_tokens": 32,
                "routing_replay": routing_replay,
                name: section,
                **rollout,
            },
        }
    )
    weights = load_file(folder / "model" / "model.safetensors")
    engine = build_engine(config, folder, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert isinstance(engine, ServerEngine)
    return engine


def server_processes(engine: ServerEngine) -> list[psutil.Process]:
    """The guard, the server and all below them."""
    guard = psutil.Process(engine.server.process.guard_pid)
    return [guard, *guard.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=10)[1] == []
