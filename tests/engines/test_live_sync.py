"""Live weight updates from trainer ranks straight into the workers of real engines, against transformers with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from live_sync import live_sync, write_shuffled_model
from megarl.parallel.launch import run_local_ranks
from real_engines import ARGUMENTS
from tiny_rollout import generate_all, make_tiny_model, sampling, worst_gap

UPDATES = 5
TIMEOUT = 280
# Longer than two whole cache blocks of 32 tokens: only a reset of the prefix cache makes the engine compute them anew.
LONG_PROMPT = tuple(3 + (7 * index) % 120 for index in range(90))
PROMPTS = [LONG_PROMPT, (*LONG_PROMPT[:70], 9, 8, 7), (1, 2, 3)]
# on CPU SGLang has a prefix cache only without deterministic inference, which greedy answers do not need
ARGUMENTS_OF = {"vllm": ARGUMENTS["vllm"], "sglang": ARGUMENTS["sglang"] | {"enable_deterministic_inference": False}}
TRANSPORTS = {1: "gloo", 2: "auto"}  # by tensor parallel size
POLICIES: dict[str, dict[str, Any]] = {
    # rank 0, which has the engine, has no part of the policy, whose weights are in host memory between updates
    "dense": {"first_rank": 1, "offload": "all", "parallel": {"tp": 2, "pp": 2, "num_layers_in_first_pipeline_stage": 2}},
    "experts": {"first_rank": 0, "parallel": {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}},
    # fused projections on disk, and norms that engines hold whole and trainer ranks in parts
    "phi3": {"first_rank": 0, "parallel": {"tp": 2, "pp": 2}},
    "olmo2": {"first_rank": 0, "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}},
}
ENGINES = [("vllm", 1), ("vllm", 2), ("sglang", 1), ("sglang", 2)]
CASES = [
    *((name, tp, kind) for kind in ("dense", "experts") for name, tp in ENGINES),
    *((name, 2, kind) for kind in ("phi3", "olmo2") for name in ("vllm", "sglang")),
]
# vLLM's attention on CPU refuses heads of 16, and SGLang pads sizes per rank that 32 does not divide
HEADS_OF_32 = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


def write_models(folder: Path, kind: str, engine: str) -> None:
    """``model``, which engine and trainer start from, and ``update0`` to ``update4``."""
    for number, name in enumerate(["model", *(f"update{update}" for update in range(UPDATES))]):
        if kind == "dense":
            make_tiny_model(number, folder / name)
        elif kind in ("phi3", "olmo2"):
            write_shuffled_model(folder / name, number, kind, **HEADS_OF_32)
        else:
            # vLLM's attention on CPU refuses heads of 16; SGLang gives every layer experts
            layers = [1] if engine == "vllm" else []
            write_shuffled_model(folder / name, number, "qwen3_moe", head_dim=32, moe_intermediate_size=64, mlp_only_layers=layers)


def update_and_compare(folder: Path, name: str, kind: str, tensor_parallel_size: int) -> None:
    transport = TRANSPORTS[tensor_parallel_size]
    transfer = {"method": "slices", "transport": transport, "bucket_mib": 1, "max_restarts": 0}
    section = {"tensor_parallel_size": tensor_parallel_size, "arguments": ARGUMENTS_OF[name]}
    with live_sync(folder, name, POLICIES[kind], transfer, **section) as live:
        answers = set()
        for version in range(UPDATES):
            live.take(folder / f"update{version}")
            live.sync.push(version)
            assert live.sync.transport == (transport if transport != "auto" else "shared_memory")
            if live.main is not None and live.engine is not None:
                model = AutoModelForCausalLM.from_pretrained(folder / f"update{version}", dtype=torch.float32).eval()
                groups = live.main.run(generate_all(live.engine, PROMPTS, sampling(temperature=0.0, num_samples=1)))
                gap = worst_gap(model, PROMPTS, groups, 0.0)
                print(f"{name} tp {tensor_parallel_size} {kind}: version {version}, worst log-probability gap {gap:.1e}")
                assert gap <= 1e-4
                for prompt, (generation,) in zip(PROMPTS, groups, strict=True):
                    assert set(generation.weight_versions) == {version}
                    ids = torch.tensor([prompt])
                    expected = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=len(generation.token_ids),
                        do_sample=False,
                        eos_token_id=None,
                        pad_token_id=0,
                    )
                    assert generation.token_ids == tuple(expected[0, len(prompt) :].tolist())
                answers.add(groups[0][0].token_ids)
            dist.barrier()
        assert live.main is None or len(answers) == UPDATES


@pytest.mark.parametrize(("name", "tensor_parallel_size", "kind"), CASES)
def test_greedy_answers_follow_five_updates(tmp_path: Path, name: str, tensor_parallel_size: int, kind: str) -> None:
    write_models(tmp_path, kind, name)
    num_ranks = 4 + POLICIES[kind]["first_rank"]
    run_local_ranks(update_and_compare, (tmp_path, name, kind, tensor_parallel_size), num_ranks, TIMEOUT)
