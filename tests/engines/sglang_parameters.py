"""Runs in SGLang's environment: loads checkpoints into SGLang's own model classes and saves one rank's live tensors.

    python sglang_parameters.py RANK RENDEZVOUS TP,EP,DEVICE,FOLDER ...

Writes ``rank_RANK.safetensors`` into every folder: all parameters and persistent buffers as they are in an open weight update,
after ``restore_weights_before_loading`` and before ``process_weights_after_loading``. All layouts have equally many ranks, which
find each other through a file in the folder RENDEZVOUS. DEVICE is ``cpu`` or ``gpu``: on CPU, SGLang pads sizes that do not divide
(configs/update_config.py), on GPUs it does not.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.distributed import bootstrap
from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader import get_model_loader
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs


def main() -> None:
    """Load each folder; ranks form new groups where the layout changes."""
    rank, barrier = int(sys.argv[1]), Path(sys.argv[2])
    groups_of = None
    for job in sys.argv[3:]:
        tp, ep, device, folder = job.split(",", 3)
        layout = int(tp), int(ep)
        arguments = server_arguments(folder, *layout)
        if groups_of not in (None, layout):
            destroy_model_parallel()
            destroy_distributed_environment()
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
        if groups_of != layout:
            os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{barrier}/{tp}_{ep}"
            bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=0)
            groups_of = layout
        initialize_moe_config()
        model_config = ModelConfig.from_server_args(arguments)
        bootstrap.init_layer_runtime(model_config=model_config)
        if device == "cpu":
            model_config = adjust_config_with_unaligned_cpu_tp(model_config, LoadConfig(), max(layout))
        save_file(live_tensors(Path(folder), model_config), Path(folder) / f"rank_{rank}.safetensors")


def server_arguments(folder: str, tp: int, ep: int) -> ServerArgs:
    """As megarl/reshard/plan/engine_layouts.py tells an engine of ``tp`` and ``ep`` to be started."""
    num_ranks = max(tp, ep)
    return ServerArgs(
        model_path=folder,
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        dtype="float32",
        disable_cuda_graph=True,
        tp_size=num_ranks,
        ep_size=ep,
        dp_size=num_ranks // tp,
        enable_dp_attention=ep > tp,
        disable_shared_experts_fusion=True,
    )


def live_tensors(folder: Path, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """What a server that started with random weights holds when an update has loaded the folder's and is still open."""
    loader = get_model_loader(LoadConfig(load_format="dummy"), model_config)
    model = loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))
    DefaultModelLoader.restore_weights_before_loading(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_weights(load_file(folder / "model.safetensors").items())
    persistent = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    return {name: tensor.detach().contiguous() for name, tensor in (*model.named_parameters(), *buffers)}


if __name__ == "__main__":
    main()
