"""Real engines with experts against transformers. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_engines import all_gone, make_engine, server_processes
from tiny import write_tiny_model
from tiny_rollout import generate_all, sampling, worst_gap

PROMPTS = [tuple(range(3, 93)), (1, 2, 3)]


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_logprobs_follow_an_update_expert_by_expert(tmp_path: Path, name: str) -> None:
    # vLLM's attention on CPU refuses heads of 16; SGLang gives every layer experts.
    model = write_tiny_model(tmp_path / "model", "qwen3_moe", head_dim=32, mlp_only_layers=[1] if name == "vllm" else [])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    engine = make_engine(name, tmp_path)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        processes = server_processes(engine)
        try:
            for version, update in enumerate(({name: torch.randn_like(tensor) for name, tensor in weights.items()}, weights)):
                runner.run(engine.update_weights(iter(update.items()), version))
            groups = runner.run(generate_all(engine, PROMPTS, sampling()))
        finally:
            runner.run(engine.close())
    gap = worst_gap(model, PROMPTS, groups, 1.0)
    print(f"{engine.name}: worst log-probability gap {gap:.1e}")
    assert gap <= 1e-4
    assert all_gone(processes)
