"""Real engines with experts against transformers. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megarl.engines import server_engine
from real_engines import all_gone, make_engine, server_processes
from tiny import write_tiny_model
from tiny_deepseek import DEEPSEEK_KEYS
from tiny_rollout import generate_all, sampling, worst_gap

PROMPTS = [tuple(range(3, 93)), (1, 2, 3)]
# vLLM's attention on CPU refuses heads of 16, and latents of other widths than DeepSeek's
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32},
    "mixtral": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "deepseek_v3": DEEPSEEK_KEYS | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_logprobs_follow_an_update_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    # SGLang gives every layer of Qwen3-MoE experts
    changes = MODELS[family] | ({"mlp_only_layers": []} if (name, family) == ("sglang", "qwen3_moe") else {})
    model = write_tiny_model(tmp_path / "model", family, **changes)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    # messages may end anywhere, also between tensors that an engine keeps in one
    monkeypatch.setattr(server_engine, "in_buckets", lambda tensors: ([tensor] for tensor in tensors))
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
    print(f"{engine.name} {family}: worst log-probability gap {gap:.1e}")
    assert gap <= 1e-4
    assert all_gone(processes)
