"""Runs in vLLM's environment: loads shards into vLLM's own model classes and saves one rank's parameters.

    python vllm_shards.py RANK PORT SIZE EXPERT_PARALLEL(0 or 1) FOLDER ...

Reads ``shards`` and writes ``rank_RANK.safetensors`` in every folder. The first model has experts, or vLLM makes no group for them.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model


def main() -> None:
    """Load each folder."""
    rank, port, size, expert_parallel = map(int, sys.argv[1:5])
    torch.set_default_dtype(torch.float32)
    for number, folder in enumerate(map(Path, sys.argv[5:])):
        arguments = EngineArgs(
            model=str(folder / "shards"),
            load_format="sharded_state",
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
            for tensor in model.state_dict().values():
                tensor.fill_(torch.nan)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        for name, tensor in model.state_dict().items():
            assert not tensor.isnan().any(), name
        save_file({name: p.data.contiguous() for name, p in model.named_parameters()}, folder / f"rank_{rank}.safetensors")


if __name__ == "__main__":
    main()
