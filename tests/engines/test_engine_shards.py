"""Real engines start from shards. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_parameters import check_loaded, free_port, run_in_engine, write_numbered_model
from megarl.engines import sglang, vllm
from megarl.families.base.engine_rules import EngineLayout
from megarl.reshard.engine_shards import write_engine_shards
from megarl.weights.files.convert import Options
from real_engines import ARGUMENTS, all_gone, make_engine, server_processes
from tiny import write_tiny_model
from tiny_deepseek import DEEPSEEK_KEYS
from tiny_rollout import make_tiny_model, sampling, worst_gap

PROMPTS = [tuple(3 + (7 * index) % 120 for index in range(90)), (1, 2, 3)]
MODEL_ARGUMENT = {"vllm": "model", "sglang": "model_path"}
DEEPSEEK: dict[str, Any] = {"num_experts_per_tok": 2} | DEEPSEEK_KEYS
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 without the query's latent": DEEPSEEK | {"q_lora_rank": None},
    "mixtral": {"num_key_value_heads": 1},
    "qwen3_moe": {"mlp_only_layers": []},
} | {family: {} for family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")}
WITH_EXPERTS = list(MODELS)[:4]


def write_shards(folder: Path, layout: EngineLayout) -> Path:
    """Of the model in ``folder``/model or ``folder`` itself."""
    model = folder / "model" if (folder / "model").exists() else folder
    write_engine_shards(model, folder / "shards", layout, None, Options(None, 1 << 20), lambda done, total: None)
    return folder / "shards"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("tp", "ep", "models"), [(1, 1, list(MODELS)), (2, 1, list(MODELS)), (2, 2, WITH_EXPERTS)])
def test_loaders_fill_every_parameter(tmp_path: Path, engine: Any, tp: int, ep: int, models: list[str]) -> None:
    layout = EngineLayout(engine=engine, tp=tp, ep=ep)
    folders = [tmp_path / str(number) for number in range(len(models))]
    for folder, model in zip(folders, models, strict=True):
        write_numbered_model(folder, model.split()[0], **MODELS[model])
        write_shards(folder, layout)
    if engine == "vllm":
        environment = os.environ | {"VLLM_DIST_IDENT": f"megarl_{os.getpid()}"}  # names the shared memory of the ranks
        sizes = [tp, int(ep > 1)]
    else:
        environment = os.environ | {"PYTHONPATH": str(sglang.CPU_FOLDER), "SGLANG_CPU_OMP_THREADS_BIND": "0|0"}
        sizes = [tp, ep]
    run_in_engine(engine, f"{engine}_shards.py", tp, [*map(str, (free_port(), *sizes, *folders))], environment, tmp_path)
    for folder in folders:
        check_loaded(folder, layout)


# A dense model with tied embeddings on one rank, one with experts on two.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_server_from_shards_answers_as_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, tp: int) -> None:
    if tp == 1:
        model = make_tiny_model(1, tmp_path / "model")
    else:  # vLLM's attention on CPU refuses heads of 16, and SGLang pads sizes per rank that 32 does not divide
        sizes = {"head_dim": 32, "mlp_only_layers": [], "moe_intermediate_size": 64}
        model = write_tiny_model(tmp_path / "model", "qwen3_moe", **sizes)
    shards = write_shards(tmp_path, EngineLayout(engine=name, tp=tp))
    arguments = ARGUMENTS[name] | {"load_format": "sharded_state", MODEL_ARGUMENT[name]: str(shards)}
    engine = make_engine(name, tmp_path, tensor_parallel_size=tp, arguments=arguments)
    for module in (vllm, sglang):  # no update has told the server a version
        monkeypatch.setattr(module, "token_versions", lambda name, spans, num_tokens: (0,) * num_tokens)
    params = sampling(temperature=0.0)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        processes = server_processes(engine)
        try:
            groups = [runner.run(engine.sample(prompt, params)) for prompt in PROMPTS]
        finally:
            runner.run(engine.close())
    gap = worst_gap(model, PROMPTS, groups, params.temperature)
    print(f"{engine.name} tp {tp}: worst log-probability gap {gap:.1e}")
    assert gap <= 1e-4
    for prompt, (generation,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generation.token_ids == tuple(expected[0, len(prompt) :].tolist())
    assert all_gone(processes)
