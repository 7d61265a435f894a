"""Megatron → Megatron on 4 gloo ranks: the reshard plan against gather and broadcast, and against megatron-core's own resharding.

    python benchmarks/reshard.py --rounds 5

A Llama-shaped model of 168 million float32 parameters (671 MB), random, in memory. Each round runs the three methods one after
another; every result is compared with a destination filled without them. Bytes are those that arrive from other ranks.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from megatron.core.resharding.refit import swap_model_weights
from torch import Tensor
from transformers import LlamaConfig

from megarl.config.schema import ModelConfig, ParallelConfig, RoleConfig
from megarl.families.registry import read_architecture
from megarl.models.build import CausalLM, build_model_chunks
from megarl.parallel.launch import run_local_ranks
from megarl.parallel.layout import Layout, build_layout
from megarl.reshard.megatron import TransferSettings, WeightTransfer
from megarl.weights.files.sources import RandomSource
from megarl.weights.mapping import WeightMap, build_weight_map
from megarl.weights.transfer import global_parameters, hugging_face_tensors, load_weights

RANKS = 4
TRANSFERS = [({"tp": 2, "pp": 2}, {"tp": 4}), ({"tp": 2, "pp": 2}, {"tp": 2})]
SETTINGS = TransferSettings(bucket_bytes=64 << 20, gpus_per_node=RANKS, timeout_seconds=300.0)
Model = tuple[list[CausalLM], Layout]


def build(weight_map: WeightMap, model: ModelConfig, parallel: dict[str, int]) -> Model:
    role = RoleConfig(parallel=ParallelConfig.model_validate(parallel))
    layout = build_layout(role.parallel)
    chunks = build_model_chunks(weight_map.architecture, model, role, layout, seed=0)
    load_weights(chunks, RandomSource(weight_map, seed=0), weight_map, layout)
    return chunks, layout


def gather_and_broadcast(weight_map: WeightMap, source: Model, destination: Model) -> None:
    """Every tensor whole to rank 0 and from there to every rank, which keeps its part."""
    whole = dict(hugging_face_tensors(source[0], weight_map, source[1], torch.float32))
    layout = destination[1]
    received: dict[str, Tensor] = {}
    for name, tensor in global_parameters(destination[0], weight_map, layout).items():
        shard = weight_map.shard(name, layout.tp_rank, layout.config.tp)
        for part, shape in zip(weight_map.parameters[name].hugging_face, weight_map.parameters[name].shapes, strict=True):
            received[part] = whole[part] if dist.get_rank() == 0 else torch.empty(shape)
            dist.broadcast(received[part], src=0)
        start = 0
        for overlap in shard.slices:
            length = overlap.stop - overlap.start
            values = received[overlap.name].narrow(overlap.dim, overlap.start, length)
            tensor.narrow(shard.dim, start, length).copy_(values)
            start += length
        received.clear()


def digests(weight_map: WeightMap, model: Model) -> dict[str, int]:
    parameters = global_parameters(model[0], weight_map, model[1])
    return {name: int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for name, tensor in parameters.items()}


def seconds(function: Callable[[], None]) -> float:
    dist.barrier()
    started = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - started


@torch.no_grad()
def compare(folder: Path, rounds: int) -> None:
    model = ModelConfig(path=folder, vocabulary_pad_multiple=1, transformer_impl="local")
    weight_map = build_weight_map(read_architecture(folder), 1, with_transformer_engine=False)
    model_bytes = 4 * sum(torch.Size(shape).numel() for shape in weight_map.hugging_face_shapes().values())
    for first, second in TRANSFERS:
        source, destination = build(weight_map, model, first), build(weight_map, model, second)
        expected = digests(weight_map, destination)
        started = time.perf_counter()
        transfer = WeightTransfer(weight_map, source, destination, SETTINGS)
        planning = time.perf_counter() - started
        methods: dict[str, Callable[[], None]] = {
            "reshard plan": transfer.move,
            "gather and broadcast": lambda source=source, destination=destination: gather_and_broadcast(
                weight_map, source, destination
            ),
            "megatron-core": lambda source=source, destination=destination: swap_model_weights(source[0], destination[0], "gloo"),
        }
        times: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds + 1):
            for name, method in methods.items():
                for tensor in global_parameters(destination[0], weight_map, destination[1]).values():
                    tensor.fill_(float("nan"))
                times[name].append(seconds(method))
                assert digests(weight_map, destination) == expected, name
        moved = torch.tensor(transfer.bytes_received)
        dist.all_reduce(moved)
        if dist.get_rank() == 0:
            # rank 0 has a share of the source, and every rank gets everything; megatron-core's plan moves whole shards likewise
            total = {"reshard plan": int(moved), "gather and broadcast": model_bytes * (RANKS - 1) * (RANKS + 1) // RANKS}
            report(first, second, times, total, planning)


def report(
    first: dict[str, int], second: dict[str, int], times: dict[str, list[float]], moved: dict[str, int], planning: float
) -> None:
    """The first round, which makes plans and buffers, is not counted."""
    print(f"{first} → {second} on {RANKS} ranks; planned in {planning:.2f} s")
    print("| method | seconds (median) | all rounds | times the plan's | bytes received | times the plan's |")
    print("|---|---|---|---|---|---|")
    base = median(times["reshard plan"][1:])
    for name, values in times.items():
        rounds = ", ".join(f"{value:.2f}" for value in values[1:])
        middle = median(values[1:])
        traffic = f"{moved[name] / 1e6:,.0f} MB | {moved[name] / moved['reshard plan']:.2f}" if name in moved else "– | –"
        print(f"| {name} | {middle:.2f} | {rounds} | {middle / base:.2f} | {traffic} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = LlamaConfig(**sizes, num_key_value_heads=16, vocab_size=16384, tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        run_local_ranks(compare, (Path(folder), arguments.rounds), RANKS, 600)


if __name__ == "__main__":
    main()
