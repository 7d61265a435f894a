"""The parameters that plans write are those of the real SGLang: names, shapes, and what its own loader puts where."""

import os
from pathlib import Path
from typing import Any

import pytest

from engine_parameters import check_loaded, run_in_engine, write_numbered_model
from megarl.engines.sglang import CPU_FOLDER
from megarl.families.base.engine_rules import EngineLayout
from tiny import CLASSES
from tiny_deepseek import DEEPSEEK_KEYS

# divide among two ranks without the padding that SGLang adds on CPU, to multiples of 32 for each
ALIGNED: dict[str, dict[str, Any]] = {family: {"intermediate_size": 128} for family in CLASSES}
ALIGNED["qwen3_moe"] |= {"moe_intermediate_size": 64, "mlp_only_layers": []}
ALIGNED["deepseek_v3"] |= {"moe_intermediate_size": 64, "num_experts_per_tok": 2} | DEEPSEEK_KEYS
WITHOUT_QUERY_LATENT = ALIGNED["deepseek_v3"] | {"q_lora_rank": None}
UNALIGNED: dict[str, dict[str, Any]] = {"mixtral": {"num_key_value_heads": 1}, "qwen2": {"num_key_value_heads": 1}}

Case = tuple[int, int, str, str, dict[str, Any]]  # tp, ep, whose sizes, family, changes of its config
ONE_RANK: list[Case] = [
    *((1, 1, "cpu", family, changes) for family, changes in ALIGNED.items()),
    (1, 1, "cpu", "deepseek_v3", WITHOUT_QUERY_LATENT),
]
TWO_RANKS: list[Case] = [
    *((2, 1, "cpu", family, changes) for family, changes in ALIGNED.items()),
    (2, 1, "cpu", "deepseek_v3", WITHOUT_QUERY_LATENT),
    *((2, 1, "gpu", family, changes) for family, changes in UNALIGNED.items()),
    *((2, 2, "cpu", family, ALIGNED[family]) for family in ("deepseek_v3", "mixtral", "qwen3_moe")),
    *((1, 2, "cpu", family, ALIGNED[family]) for family in ("deepseek_v3", "qwen3_moe")),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", [ONE_RANK, TWO_RANKS], ids=["one rank", "two ranks"])
def test_sglang_loads_what_plans_write(tmp_path: Path, cases: list[Case]) -> None:
    jobs = []
    for number, (tp, ep, sizes_of, family, changes) in enumerate(cases):
        write_numbered_model(tmp_path / str(number), family, **changes)
        jobs.append(f"{tp},{ep},{sizes_of},{tmp_path / str(number)}")
    tp, ep, *_ = cases[0]
    environment = os.environ | {"PYTHONPATH": str(CPU_FOLDER), "SGLANG_CPU_OMP_THREADS_BIND": "0|0"}
    run_in_engine("sglang", "sglang_parameters.py", max(tp, ep), [str(tmp_path), *jobs], environment, tmp_path)
    for number, (tp, ep, *_) in enumerate(cases):
        check_loaded(tmp_path / str(number), EngineLayout(engine="sglang", tp=tp, ep=ep))
