"""Runs in vLLM's environment: loads checkpoints into vLLM's own model classes and saves one rank's parameters.

    python vllm_parameters.py RANK PORT SIZE EXPERT_PARALLEL(0 or 1) FOLDER ...

Writes ``rank_RANK.safetensors`` into every folder. The first model has experts, or vLLM makes no group for them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model


def main() -> None:
    """Load each folder."""
    rank, port, size, expert_parallel = map(int, sys.argv[1:5])
    torch.set_default_dtype(torch.float32)
    for number, folder in enumerate(map(Path, sys.argv[5:])):
        arguments = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            tensor_parallel_size=size,
            enable_expert_parallel=bool(expert_parallel),
            distributed_executor_backend="mp",
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if number == 0:
                init_distributed_environment(size, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
                initialize_model_parallel(size, backend="gloo")
            model = initialize_model(vllm_config=config)
            for parameter in model.parameters():
                parameter.data.zero_()
            model.load_weights(load_file(folder / "model.safetensors").items())
        save_file({name: p.data.contiguous() for name, p in model.named_parameters()}, folder / f"rank_{rank}.safetensors")


if __name__ == "__main__":
    main()
