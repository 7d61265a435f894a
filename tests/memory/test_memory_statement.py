"""The stated memory against what forked ranks hold and need, and against published numbers of parameters."""

import asyncio
import gc
import importlib.util
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megarl.config.schema import Config, RolloutConfig
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import SamplingParams
from megarl.families.registry import read_architecture
from megarl.memory.statement import Device, RankMemory, state_memory, state_relayout
from megarl.weights.mapping import build_weight_map

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "config" / "models"
QWEN_7B = 7_615_616_512  # parameters that the model card of Qwen2.5-7B counts: 7.61B, in the safetensors index
LAYOUTS = (
    "tied embeddings",
    "norms of outputs and of all heads, tp 2, bfloat16",
    "pp 2, vpp 2",
    "cp 2, all-gather",
    "cp 4, ring, full recompute",
    "offloaded activations",
    "ep 2",
    "latent attention, ep 2, etp 1, tp 2",
    "with critic, tp 2",
)


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_stated_equals_measured(name: str) -> None:
    """Live tensors of two real training steps: the worst rank's peak, and of the rank stated to be the worst what it holds and what
    an update adds."""
    memory = benchmark()
    row = memory.compare(next(case for case in memory.CASES if case.name == name))
    assert abs(row.gap) <= 0.04
    held_before = memory.stated(row, "held before a step")
    assert held_before == pytest.approx(row.measured["held before a step"], rel=0.1)
    measured = row.measured["policy update"] - row.measured["held before a step"]
    assert memory.stated(row, "policy update") - held_before == pytest.approx(measured, rel=0.06)
    assert memory.stated(row, "policy optimizer step") == pytest.approx(row.measured["policy optimizer step"], rel=0.08)


def config_of(folder: Path, model: str, **values: object) -> Config:
    shutil.copytree(MODELS / model, folder / model)
    base = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(folder / model), "dtype": "bfloat16"},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {"engine": "vllm", "max_prompt_tokens": 2048, "max_new_tokens": 6144},
    }
    return Config.model_validate(base | values)


def held(memory: RankMemory) -> dict[str, float]:
    return {f"{part.owner} {part.name}": part.num_bytes for part in memory.held}


def test_weights_gradients_and_optimizer_state_of_a_published_model(tmp_path: Path) -> None:
    """2, 4 and 12 bytes for each parameter (bfloat16 with float32 main weights), the last over all data parallel ranks."""
    config = config_of(tmp_path, "Qwen2.5-7B")
    (alone,) = state_memory(config, 1, "cuda")
    assert held(alone) == pytest.approx(
        {"policy weights": 2 * QWEN_7B, "policy gradients": 4 * QWEN_7B, "policy optimizer state": 12 * QWEN_7B}, rel=1e-5
    )
    (shared,) = state_memory(config, 8, "cuda")
    assert held(shared)["policy weights"] == held(alone)["policy weights"]
    assert held(shared)["policy optimizer state"] == pytest.approx(12 * QWEN_7B / 8, rel=1e-5)


def test_every_stage_is_stated_and_the_worst_is_first(tmp_path: Path) -> None:
    """The first of four stages has four micro-batches in flight; the stages together hold the whole model."""
    policy = {"parallel": {"pp": 4}, "max_tokens_per_micro_batch": 8192}
    kinds = state_memory(config_of(tmp_path, "Qwen2.5-7B", policy=policy), 8, "cuda")
    assert [kind.num_ranks for kind in kinds] == [2, 2, 2, 2]
    assert [kind.peak for kind in kinds] == sorted((kind.peak for kind in kinds), reverse=True)
    assert kinds[0].stages == {"policy": 0}
    assert sum(held(kind)["policy weights"] for kind in kinds) == pytest.approx(2 * QWEN_7B, rel=1e-5)
    activations = {kind.stages["policy"]: part.num_bytes for kind in kinds for part in kind.added if part.name == "activations"}
    assert activations[0] == pytest.approx(4 / 3 * activations[1], rel=0.01) == pytest.approx(2 * activations[2], rel=0.01)


def test_a_gpu_has_one_layer_of_offloaded_activations(tmp_path: Path) -> None:
    """28 layers, four micro-batches in flight in the first of four stages; a CPU's host memory is its own."""
    policy = {"parallel": {"pp": 4}, "max_tokens_per_micro_batch": 8192, "recompute": "full"}
    values = [config_of(tmp_path, "Qwen2.5-7B", policy=policy)]
    values.append(Config.model_validate(values[0].model_dump() | {"policy": policy | {"offload_activations": True}}))

    def update(config: Config, device: Device) -> float:
        return next(kind for kind in state_memory(config, 4, device) if kind.stages["policy"] == 0).moments["policy update"]

    one = 8192 * 3584 * 2
    without, with_offload = values
    assert update(without, "cuda") - update(with_offload, "cuda") == pytest.approx((4 * 7 - 1) * one)
    assert update(without, "cpu") == update(with_offload, "cpu")


def test_one_learner_after_the_other_changes_layout(tmp_path: Path) -> None:
    """18 bytes for each published parameter: weights, gradients, and state, which data parallel ranks share out. What is left has
    no gradients. A critic is as large as the policy but for its output layer; offloaded, it is there only while it moves."""
    values = {"algorithm": {"preset": "ppo", "kl": {"place": "none", "coefficient": 0.0}}, "critic": {"offload": "all"}}
    before = config_of(tmp_path, "Qwen2.5-7B", **values)
    after = Config.model_validate(before.model_dump() | {"policy": {"parallel": {"tp": 2}}})
    kinds = state_relayout(before, after, 2, "cuda")
    assert [kind.num_ranks for kind in kinds] == [2]
    critic = QWEN_7B - 152064 * 3584 + 3584
    left = {"critic": (2 + 12 / 2) * critic, "policy": (2 + 12 / 2) * QWEN_7B}
    buckets = 2 * (64 << 20)
    assert kinds[0].moments == pytest.approx(
        {
            "policy changes layout": left["policy"] + 18 * QWEN_7B / 2 + buckets,
            "critic changes layout": 18 * QWEN_7B / 2 + left["critic"] + (6 + 12 / 2) * critic + buckets,
        },
        rel=1e-3,
    )


def test_log_probabilities_do_not_grow_with_length(tmp_path: Path) -> None:
    sizes = []
    for tokens in (8192, 32768):
        rollout = {"engine": "vllm", "max_prompt_tokens": 64, "max_new_tokens": tokens - 64}
        policy = {"max_tokens_per_micro_batch": tokens}
        config = config_of(tmp_path / str(tokens), "Qwen2.5-7B", rollout=rollout, policy=policy)
        (memory,) = state_memory(config, 1, "cuda")
        sizes.append(memory.moments["policy scoring"] - sum(held(memory).values()))
    assert sizes[1] <= 4.01 * sizes[0]  # one layer's activations; a vocabulary of 152,064 would be 37 GB more


class Inline(ThreadPoolExecutor):
    """Runs in the calling thread, where the dispatch mode sees what is allocated."""

    def submit(self, function: Any, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


def test_embedded_engine(tmp_path: Path) -> None:
    """Weights and the peak while a full batch of full length is sampled."""
    memory = benchmark()
    case = memory.Case(name="engine", length=256)
    rollout = {"max_prompt_tokens": 48, "max_new_tokens": 12, "prompts_per_step": 2, "samples_per_prompt": 8}
    config = memory.config_of(case, tmp_path, 4).model_copy(update={"rollout": RolloutConfig.model_validate(rollout)})
    (stated,) = state_memory(config, 1, "cpu")
    architecture = read_architecture(tmp_path)
    shapes = build_weight_map(architecture, 1, with_transformer_engine=False).hugging_face_shapes()
    sampling = SamplingParams(
        max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(), repetition_stop=None, num_samples=8, seed=1
    )

    async def sample(engine: EmbeddedEngine) -> None:
        await asyncio.gather(*(engine.generate((5,) * 48, sampling) for _ in range(2)))

    with memory.LiveTensors() as meter:
        engine = EmbeddedEngine(tmp_path, torch.float32, config.rollout.embedded, shapes)
        engine._worker = Inline()
        asyncio.run(engine.start())
        asyncio.run(engine.update_weights(((name, torch.zeros(shape)) for name, shape in shapes.items()), 0))
        gc.collect()
        weights = meter.live
        peak = meter.measure(lambda: asyncio.run(sample(engine)))
    assert held(stated)["engine weights"] == pytest.approx(weights, rel=0.02)
    added = max(stated.moments["prompts"], stated.moments["sampling"]) - sum(held(stated).values())
    assert added == pytest.approx(peak - weights, rel=0.1)
