"""The parameters that plans write are those of the real vLLM: names, shapes, and what its own loader puts where."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.models.architecture import read_architecture
from megarl.reshard.engines import EngineLayout, engine_side
from megarl.reshard.side import tensor_table
from megarl.rollout.engine_environment import default_python
from megarl.weights.mapping import build_weight_map
from tiny import CLASSES

sys.path.insert(0, str(Path(__file__).parent.parent / "reshard"))
from slow_layouts import EngineSizes, engine_rank, hugging_face_tensors

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
SPECIAL = {"deepseek_v3": {"num_experts_per_tok": 2, "topk_method": "noaux_tc"}, "mixtral": {"num_key_value_heads": 1}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tp", "ep", "families"),
    [(1, 1, sorted(CLASSES)), (2, 1, ("deepseek_v3", "mixtral", "qwen2")), (2, 2, ("deepseek_v3", "qwen3_moe"))],
)
def test_vllm_loads_what_plans_write(tmp_path: Path, tp: int, ep: int, families: Sequence[str]) -> None:
    for family in families:
        config_class, _, special = CLASSES[family]
        config_class(**(SIZES | special | SPECIAL.get(family, {})), architectures=[CLASSES[family][1].__name__]).save_pretrained(
            tmp_path / family
        )
        tensors = hugging_face_tensors(read_architecture(tmp_path / family))
        save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / family / "model.safetensors")
    load_with_vllm([tmp_path / family for family in families], tp, expert_parallel=ep > 1)
    for family in families:
        architecture = read_architecture(tmp_path / family)
        table = tensor_table(build_weight_map(architecture, 1, with_transformer_engine=False), 4)
        side = engine_side(architecture, EngineLayout(engine="vllm", tp=tp, ep=ep), table)
        tensors = hugging_face_tensors(architecture)
        for rank in range(tp):
            loaded = load_file(tmp_path / family / f"rank_{rank}.safetensors")
            described = dict(zip(side.parameters, side.shapes, strict=True))
            assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == described, family
            expected = engine_rank(tensors, architecture, EngineSizes(engine="vllm", tp=tp, ep=ep), rank)
            for name, tensor in loaded.items():
                assert torch.equal(tensor, expected[name].float()), (family, rank, name)


def load_with_vllm(folders: list[Path], tp: int, *, expert_parallel: bool) -> None:
    """One process of vLLM's environment for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("vllm_parameters.py")
    # the last names the shared memory of the ranks
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_DIST_IDENT": f"megarl_{port}"}
    ranks = [
        subprocess.Popen(
            [default_python("vllm"), script, *map(str, (rank, tp, port, int(expert_parallel))), *folders],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(tp)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
