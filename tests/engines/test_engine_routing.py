"""The experts that the real SGLang reports are those that transformers chooses. It needs ``make engine-sglang``.

vLLM reports experts on GPUs only.
"""

import asyncio
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from real_engines import all_gone, make_engine, server_processes
from tiny import chosen_experts, write_tiny_model
from tiny_deepseek import DEEPSEEK_KEYS
from tiny_rollout import generate_all, sampling

# the second shares whole cache blocks with the first: what was reported then must be reported again
PROMPTS = [tuple(range(3, 93)), (*range(3, 80), 7, 7), (1, 2, 3)]
SIZES: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6}


def test_sglang_reports_what_transformers_chooses(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "deepseek_v3", **DEEPSEEK_KEYS, **SIZES)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    engine = make_engine("sglang", tmp_path, routing_replay=True)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        processes = server_processes(engine)
        try:
            # an answer of other weights leaves its keys, values and experts in the cache
            random = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
            runner.run(engine.update_weights(iter(random.items()), 0))
            runner.run(generate_all(engine, PROMPTS, sampling()))
            runner.run(engine.update_weights(iter(weights.items()), 1))
            groups = [
                *runner.run(generate_all(engine, PROMPTS, sampling())),
                *runner.run(generate_all(engine, PROMPTS, sampling())),
            ]
        finally:
            runner.run(engine.close())
    for prompt, group in zip(PROMPTS * 2, groups, strict=True):
        assert len(group) == 3
        for generation in group:
            reported = generation.routed_experts
            assert reported is not None
            expected = chosen_experts(model, prompt + generation.token_ids[:-1])
            assert torch.equal(reported.sort(dim=-1).values.long(), expected)
    assert all_gone(processes)
