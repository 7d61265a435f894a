"""New weights from 4 trainer ranks into a real engine with 2 workers, in the same server: slices through memory that both share and
over gloo, against gather and broadcast.

    python benchmarks/live_sync.py --engine vllm --rounds 5

A Llama of 168 million float32 parameters (671 MB), random. The settings of ``rollout.weight_transfer`` take turns; each makes a
plan and a group with a first update, which is not counted. Every update brings other weights, and after it the engine's
log-probabilities are compared with transformers'.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from megarl.config.schema import Config
from megarl.engines.build import build_engine
from megarl.engines.protocol import SamplingParams
from megarl.loop.weight_sync import MainRankEngine, WeightSync
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy
from megarl.weights.files.sources import SafetensorsSource
from megarl.weights.transfer import load_weights

RANKS, WORKERS = 4, 2
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
PROMPT = (1, 2, 3, 4, 5)
TRANSFERS = {
    "slices, shared memory": {"transport": "shared_memory"},
    "slices, gloo": {"transport": "gloo"},
    "broadcast": {"method": "broadcast"},
}
MODELS = 2  # whose weights take turns
ARGUMENTS: dict[str, dict[str, Any]] = {
    "vllm": {"block_size": 32, "kv_cache_memory_bytes": 64 << 20},
    "sglang": {"max_total_tokens": 4096},
}
GREEDY = SamplingParams(
    num_samples=1, max_new_tokens=4, temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=(), repetition_stop=None, seed=0
)


def write_models(folder: Path) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=16, vocab_size=16384, tie_word_embeddings=False)
    for number in range(MODELS):
        torch.manual_seed(number)
        LlamaForCausalLM(config).save_pretrained(folder / f"model{number}")


def config_of(folder: Path, engine: str, transfer: dict[str, str]) -> Config:
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": folder / "model0"},
        "policy": {"parallel": {"tp": 2, "pp": 2}},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {
            "engine": engine,
            "max_prompt_tokens": 128,
            "max_new_tokens": 32,
            "weight_transfer": {**transfer, "max_restarts": 0},
            engine: {"tensor_parallel_size": WORKERS, "arguments": ARGUMENTS[engine]},
        },
    }
    return Config.model_validate(values)


@torch.no_grad()
def check(main: MainRankEngine, model: Path) -> None:
    """The engine answers with these weights."""
    (answer,) = main.run(main.engine.generate(PROMPT, GREEDY))
    reference = LlamaForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([PROMPT + answer.token_ids])
    logprobs = reference(ids).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0]
    assert (logprobs - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def compare(folder: Path, engine: str, rounds: int) -> None:
    configs = {name: config_of(folder, engine, transfer) for name, transfer in TRANSFERS.items()}
    config = configs["broadcast"]
    policy = Policy(config, 1)
    weight_map, chunks, layout = policy.weight_map, policy.engine.chunks, policy.engine.layout
    main = None
    if dist.get_rank() == 0:
        runner = asyncio.Runner()
        server = build_engine(config, folder, weight_map.hugging_face_shapes())
        runner.run(server.start())
        main = MainRankEngine(server, runner.run, print)
    try:
        times: dict[str, list[float]] = {name: [] for name in configs}
        sent = torch.zeros((), dtype=torch.int64)
        version = 0
        for _ in range(rounds):
            for name in configs:
                sync = WeightSync(configs[name], policy, main)  # the engine's workers keep the group that they joined last
                for is_first in (True, False):
                    model = folder / f"model{version % MODELS}"
                    load_weights(chunks, SafetensorsSource(model, weight_map), weight_map, layout)
                    dist.barrier()
                    started = time.perf_counter()
                    sync.push(version)
                    if not is_first:
                        times[name].append(time.perf_counter() - started)
                    if main is not None:
                        check(main, model)
                    version += 1
                sent.fill_(sync.bytes_sent or int(sent))
        dist.all_reduce(sent)
        if main is not None:
            shapes = weight_map.hugging_face_shapes().values()
            model_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes)
            # rank 0 holds a quarter of the model, and sends the whole to every worker
            broadcast = model_bytes * (RANKS - 1) // RANKS + WORKERS * model_bytes
            report(engine, times, {name: broadcast if name == "broadcast" else int(sent) for name in times})
    finally:
        if main is not None:
            runner.run(main.engine.close())


def report(engine: str, times: dict[str, list[float]], moved: dict[str, int]) -> None:
    print(f"{RANKS} ranks (tp 2, pp 2) → {engine} tp {WORKERS}")
    print("| method | seconds (median) | all rounds | times the first's | bytes sent |")
    print("|---|---|---|---|---|")
    base = median(next(iter(times.values())))
    for name, values in times.items():
        rounds = ", ".join(f"{value:.2f}" for value in values)
        middle = median(values)
        print(f"| {name} | {middle:.2f} | {rounds} | {middle / base:.2f} | {moved[name] / 1e6:,.0f} MB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        run_local_ranks(compare, (Path(folder), arguments.engine, arguments.rounds), RANKS, 900)


if __name__ == "__main__":
    main()
