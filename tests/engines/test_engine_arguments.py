"""The real engines' own parsers and rollout.<engine>.arguments. They need ``make engine-vllm engine-sglang``."""

from pathlib import Path
from typing import Any

import pytest

from megarl.config.schema import Config
from megarl.engines.argument_check import check_engine_arguments
from megarl.engines.environment import default_python
from megarl.errors import ConfigError
from megarl.loop.launch import launch_training
from real_engines import ARGUMENTS
from tiny_rollout import make_tiny_model

RIGHT: dict[str, dict[str, Any]] = {
    "vllm": {
        "max-model-len": "1k",
        "gpu_memory_utilization": 0.4,
        "enable_prefix_caching": False,
        "hf_overrides": {"a": 1},
        "compilation_config.mode": 3,
    },
    "sglang": {"attention_backend": "fa3", "enable_deterministic_inference": False, "json_model_override_args": {"a": 1}},
}
# name: value, and what is said of it; the first is a beginning of a name, which argparse alone would take
WRONG: dict[str, dict[str, tuple[Any, str]]] = {
    "vllm": {
        "max_num_seq": (64, "has no such argument; the nearest is max_num_seqs"),
        "max_num_batched_tokens": ("many", "invalid human_readable_int value: 'many'"),
        "dtype": ("int7", "invalid choice: 'int7' (choose from"),
        "enable_chunked_prefill": ("yes", "is a switch; expected true or false, not 'yes'"),
        "compilation_config": ({"level": 0}, "Unexpected keyword argument"),
        "help": (True, "the server only prints something and ends"),
        "tensor_parallel_size": (2, "MegaRL sets it itself; remove it and set rollout.vllm.tensor_parallel_size"),
        "host": ("0.0.0.0", "MegaRL sets it itself; remove it"),
    },
    "sglang": {
        "max_running_request": (32, "has no such argument; the nearest is max_running_requests"),
        "chunked_prefill_size": (1.5, "invalid int value: '1.5'"),
        "attention_backend": ("fa9", "invalid choice: 'fa9' (choose from"),
        "max_total_tokens": (False, "expected a value, not false"),
        "disable_cuda_graf": (False, "has no such argument; the nearest is disable_cuda_graph"),
        "tensor-parallel-size": (2, "MegaRL sets it itself; remove it and set rollout.sglang.tensor_parallel_size"),
        "model": ("m", "MegaRL sets it itself; remove it and set model.path"),
    },
}

pytestmark = pytest.mark.timeout(280)


def config_of(folder: Path, engine: str, python: Path, arguments: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "run_dir": folder / "run",
            "model": {"path": folder / "model"},
            "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
            "rewards": {"scorers": [{"type": "exact"}]},
            "rollout": {
                "engine": engine,
                "max_prompt_tokens": 100,
                "max_new_tokens": 32,
                engine: {"python": python, "arguments": arguments},
            },
            "policy": {"max_tokens_per_micro_batch": 1024},
        }
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_wrong_arguments_are_refused_before_models_are_built(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(0, tmp_path / "model")
    python = default_python(engine)
    monkeypatch.setenv("HOME", str(tmp_path))
    wrong = {name: value for name, (value, _) in WRONG[engine].items()}
    with pytest.raises(ConfigError) as refused:
        launch_training(config_of(tmp_path, engine, python, wrong), 1, resume=False)
    assert not (tmp_path / "run").exists()
    for line, (name, (_, words)) in zip(refused.value.mistakes, WRONG[engine].items(), strict=True):
        assert line.startswith(f"rollout.{engine}.arguments.{name}: ") and words in line, line
        assert len(line) <= 300 and line.isprintable()
    check_engine_arguments(config_of(tmp_path, engine, python, ARGUMENTS[engine] | RIGHT[engine]))
    assert len(list((tmp_path / ".cache").rglob(f"{engine}-*"))) == 1
