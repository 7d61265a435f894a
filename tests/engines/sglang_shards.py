"""Runs in SGLang's environment: loads shards into SGLang's own model classes and saves one rank's parameters.

    python sglang_shards.py RANK PORT TP EP FOLDER ...

Reads ``shards`` and writes ``rank_RANK.safetensors`` in every folder.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader import get_model_loader
from sglang.srt.runtime_context import SpawnRanks, publish

from sglang_parameters import server_arguments


def main() -> None:
    """Load each folder."""
    rank, port, tp, ep = map(int, sys.argv[1:5])
    for number, folder in enumerate(map(Path, sys.argv[5:])):
        arguments = server_arguments(str(folder / "shards"), tp, ep)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
        if number == 0:
            bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
        initialize_moe_config()
        model_config = ModelConfig.from_server_args(arguments)
        bootstrap.init_layer_runtime(model_config=model_config)
        loader = get_model_loader(LoadConfig(load_format="sharded_state"), model_config)
        model = loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))
        save_file({name: p.data.contiguous() for name, p in model.named_parameters()}, folder / f"rank_{rank}.safetensors")


if __name__ == "__main__":
    main()
