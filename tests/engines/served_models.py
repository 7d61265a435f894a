"""Models that the real vLLM and SGLang serve beside a run: reward models and judges."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from megarl.config.schema import EngineServerConfig
from megarl.engines.server_launch import flags, inherited_environment, server_python
from megarl.engines.server_process import ServerProcess, free_port
from megarl.engines.sglang import CPU_FOLDER
from megarl.errors import RewardError
from megarl.rewards.combine import RewardScorer
from megarl.sockets import LOCALHOST

START_TIMEOUT = 150

COMMANDS: dict[str, tuple[list[str], dict[str, Any], dict[str, str]]] = {
    "vllm": (
        ["-m", "vllm.entrypoints.openai.api_server"],
        {"max_model_len": 160, "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 64 << 20},
        {"VLLM_NO_USAGE_STATS": "1"},
    ),
    "sglang": (
        ["-m", "sglang.launch_server"],
        {
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_overlap_schedule": True,
            "disable_cuda_graph": True,
            "max_total_tokens": 4096,
            "grammar_backend": "none",
        },
        {"PYTHONPATH": str(CPU_FOLDER)},
    ),
}


@asynccontextmanager
async def served_model(name: str, folder: Path, **more: Any) -> AsyncIterator[tuple[str, ServerProcess]]:
    """The server of the model in ``folder``/model and its address; it has only just been started."""
    module, arguments, environment = COMMANDS[name]
    port = free_port(LOCALHOST, 0, "")
    model = {"vllm": "model", "sglang": "model_path"}[name]
    values = {model: str(folder / "model"), "host": LOCALHOST, "port": port, "dtype": "float32", **arguments, **more}
    command = [server_python(name, EngineServerConfig()), *module, *flags(values, negated=False)]
    needed = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", **environment}
    process = ServerProcess(name, command, inherited_environment() | needed, folder / "engine.log")
    await process.start()
    try:
        yield f"http://{LOCALHOST}:{port}", process
    finally:
        await process.close()


async def until_ready(scorer: RewardScorer, process: ServerProcess) -> None:
    """Wait until the server answers as the scorer wants."""
    async with asyncio.timeout(START_TIMEOUT):
        while True:
            assert process.exited is not None and not process.exited.done(), process.last_words()
            try:
                return await scorer.check_servers()
            except RewardError:
                await asyncio.sleep(0.25)
