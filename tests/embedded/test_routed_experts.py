"""The experts that the embedded engine reports against transformers' forward without a cache; what a server's report must be."""

import asyncio
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from megarl.config.schema import Config, EmbeddedEngineConfig
from megarl.engines.build import build_engine
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation
from megarl.engines.routed_experts import reported_experts
from megarl.errors import RolloutError
from megarl.families.registry import read_architecture
from tiny import chosen_experts, write_tiny_model
from tiny_rollout import generate_all, sampling

PROMPTS = [(5, 6, 7), tuple(range(10, 40)), (1,)]  # of different lengths: shorter ones are padded


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_embedded_reports_what_transformers_chooses(tmp_path: Path, family: str) -> None:
    model = write_tiny_model(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")

    async def run() -> list[list[Generation]]:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        engine = EmbeddedEngine(tmp_path, torch.float32, EmbeddedEngineConfig(threads=1), shapes, reports_experts=True)
        await engine.start()
        await engine.update_weights(iter(weights.items()), 0)
        # some responses end at once, others go on
        groups = await generate_all(engine, PROMPTS, sampling(stop_token_ids=tuple(range(30))))
        await engine.close()
        return groups

    groups = asyncio.run(run())
    assert len({len(generation.token_ids) for group in groups for generation in group}) > 2
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for generation in group:
            reported = generation.routed_experts
            assert reported is not None and reported.dtype == torch.int16
            expected = chosen_experts(model, prompt + generation.token_ids[:-1])
            assert torch.equal(reported.sort(dim=-1).values.long(), expected)


def test_a_report_keeps_the_layers_with_experts(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3_moe")  # 6 experts, 2 a token, none in layer 1 of 4
    moe = read_architecture(tmp_path).moe
    assert moe is not None
    report = numpy.array([[[3, 0], [0, 0], [5, 4], [1, 2]], [[1, 0], [0, 0], [2, 4], [5, 2]]], numpy.uint8)
    expected = [[[0, 3], [4, 5], [1, 2]], [[0, 1], [2, 4], [2, 5]]]
    assert reported_experts("vLLM", report, 3, moe).tolist() == expected
    assert reported_experts("SGLang", report.reshape(-1).astype(numpy.int32), 3, moe).tolist() == expected
    with pytest.raises(RolloutError, match=r"^vLLM reports no experts, and rollout\.routing_replay needs them"):
        reported_experts("vLLM", None, 3, moe)
    with pytest.raises(RolloutError, match=r"^vLLM reports experts of shape \(2, 4, 2\), not \[.*\] = \(3, 4, 2\)"):
        reported_experts("vLLM", report, 4, moe)
    for wrong in (6, 0):  # no such expert, one expert twice
        report[1, 0, 0] = wrong
        with pytest.raises(RolloutError, match=r"^vLLM reports experts that are not 2 different ones of 0\.\.5"):
            reported_experts("vLLM", report, 3, moe)


def test_vllm_on_cpu_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3_moe")
    config = Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "model": {"path": tmp_path},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "rollout": {"engine": "vllm", "routing_replay": True},
        }
    )
    with pytest.raises(RolloutError, match=r"^rollout\.routing_replay: vLLM reports experts only"):
        asyncio.run(build_engine(config, tmp_path, {}).start())
