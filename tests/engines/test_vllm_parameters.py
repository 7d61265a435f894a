"""The parameters that plans write are those of the real vLLM: names, shapes, and what its own loader puts where."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine_parameters import check_loaded, free_port, run_in_engine, write_numbered_model
from megarl.families.base.engine_rules import EngineLayout
from tiny import CLASSES

SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_experts_per_tok": 2, "topk_method": "noaux_tc"},
    "mixtral": {"num_key_value_heads": 1},
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tp", "ep", "families"),
    [(1, 1, sorted(CLASSES)), (2, 1, ("deepseek_v3", "mixtral", "qwen2", "phi3", "olmo2")), (2, 2, ("deepseek_v3", "qwen3_moe"))],
)
def test_vllm_loads_what_plans_write(tmp_path: Path, tp: int, ep: int, families: Sequence[str]) -> None:
    for family in families:
        write_numbered_model(tmp_path / family, family, **SPECIAL.get(family, {}))
    folders = [str(tmp_path / family) for family in families]
    # names the shared memory of the ranks
    environment = os.environ | {"VLLM_DIST_IDENT": f"megarl_{os.getpid()}"}
    run_in_engine("vllm", "vllm_parameters.py", tp, [str(free_port()), str(tp), str(int(ep > 1)), *folders], environment, tmp_path)
    for family in families:
        check_loaded(tmp_path / family, EngineLayout(engine="vllm", tp=tp, ep=ep))
