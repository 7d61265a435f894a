"""What context parallelism costs and saves: activation memory per rank, bytes sent per rank, and the ring's overlap.

    python benchmarks/context_parallel.py [--tokens 8192] [--layers 2]

One sequence goes forward and backward through a small model on forked gloo ranks. Activations are what autograd keeps for the
backward pass, without the weights. Bytes sent are counted in attention's calls of torch.distributed, one layer, forward and
backward, and compared with the formula. The timeline is of one rank of a ring of four.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.config.schema import Config
from megarl.data.packing import pack_examples
from megarl.data.template import SFTExample
from megarl.parallel import ring_attention
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy

HIDDEN, HEADS, KEY_HEADS, WIDTH = 256, 8, 2, 32
METHODS: dict[str, dict[str, Any]] = {
    "all_gather": {},
    "all_to_all": {"context_parallel_method": "all_to_all"},
    "ring": {"context_parallel_method": "ring"},
    "hybrid": {"context_parallel_method": "hybrid", "ulysses_size": 2},
}
TIMELINE_COLUMNS = 96


def write_model(folder: Path, layers: int, tokens: int) -> None:
    """A random model in which attention outweighs the rest."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": layers, "vocab_size": 512}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, max_position_embeddings=tokens, tie_word_embeddings=True)).save_pretrained(
        folder
    )


def config_of(folder: Path, cp: int, method: str, tokens: int) -> Config:
    """A supervised run of the model."""
    policy = {"parallel": {"cp": cp, **METHODS[method]}, "max_tokens_per_micro_batch": tokens, "logprob_chunk_tokens": 64}
    return Config.model_validate(
        {
            "kind": "sft",
            "steps": 1,
            "model": {"path": folder},
            "policy": policy,
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        }
    )


def formula(cp: int, method: str, tokens: int) -> float:
    """Bytes that one rank sends in one layer, forward and backward, float32."""
    query, keys = 4 * tokens // cp * HEADS * WIDTH, 4 * tokens // cp * 2 * KEY_HEADS * WIDTH
    if method == "all_gather":  # gathers keys and values; scatters their gradients
        return 2 * (cp - 1) * keys
    if method == "all_to_all":  # queries, keys, values and results, and their gradients; a key head for each rank at least
        return 2 * (cp - 1) / cp * (2 * query + keys * max(1, cp // KEY_HEADS))
    if method == "ring":  # keys and values twice; their gradients come home
        return 2 * (cp - 1) * keys + cp * keys
    ring = cp // 2
    exchanged = 2 * (1 / 2) * (2 * query + keys)
    return exchanged + (2 * (ring - 1) + ring) * keys


class Counter:
    """Bytes that this rank sends over groups that are not of one rank."""

    def __init__(self) -> None:
        self.sent = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in the calls that attention makes."""

        def counting(function: Callable[..., Any], sent: Callable[..., int]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.sent += sent(*args, **kwargs)
                return function(*args, **kwargs)

            return call

        def to_all(output: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup) -> int:
            return local.nbytes * (group.size() - 1)

        def from_all(local: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> int:
            return local.nbytes * (group.size() - 1)

        def exchange(output: torch.Tensor, blocks: torch.Tensor, group: dist.ProcessGroup) -> int:
            return blocks.nbytes * (group.size() - 1) // group.size()

        def to_next(operations: list[dist.P2POp]) -> int:
            return sum(one.tensor.nbytes for one in operations if one.op is dist.isend)

        with (
            patch.object(dist, "all_gather_into_tensor", counting(dist.all_gather_into_tensor, to_all)),
            patch.object(dist, "reduce_scatter_tensor", counting(dist.reduce_scatter_tensor, from_all)),
            patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, exchange)),
            patch.object(dist, "batch_isend_irecv", counting(dist.batch_isend_irecv, to_next)),
        ):
            yield


@contextmanager
def kept_bytes(policy: Policy, sizes: dict[int, int]) -> Iterator[None]:
    """Fill ``sizes`` with the storages that autograd keeps, without those of weights."""
    weights = {parameter.untyped_storage().data_ptr() for chunk in policy.engine.chunks for parameter in chunk.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def measure(folder: Path, cp: int, method: str, tokens: int, layers: int) -> None:
    """One rank."""
    config = config_of(folder, cp, method, tokens)
    policy = Policy(config, total_updates=1)
    token_ids = tuple(torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(0)).tolist())
    example = SFTExample(row_id="0", token_ids=token_ids, num_prompt_tokens=tokens - 64)
    batch = build_supervised_batch(pack_examples([example]))
    counter, sizes = Counter(), dict[int, int]()
    start = time.perf_counter()
    with counter.watching(), kept_bytes(policy, sizes):
        policy.engine.forward_backward(batch, supervised_objective)
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0:
        torch.save((sum(sizes.values()), counter.sent / layers, seconds), folder / "result.pt")


def draw_timeline(folder: Path, tokens: int) -> None:
    """One rank of a ring: what it computes and what it waits for."""
    policy = Policy(config_of(folder, 4, "ring", tokens), total_updates=1)
    token_ids = tuple(torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(0)).tolist())
    batch = build_supervised_batch(pack_examples([SFTExample(row_id="0", token_ids=token_ids, num_prompt_tokens=tokens - 64)]))
    spans: list[tuple[str, float, float]] = []

    def timed(letter: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spans.append((letter, start, time.perf_counter()))
            return result

        return call

    with (
        patch.object(ring_attention, "block_attention", timed("F", ring_attention.block_attention)),
        patch.object(ring_attention, "block_gradients", timed("B", ring_attention.block_gradients)),
        patch.object(ring_attention._Arriving, "wait", timed("w", ring_attention._Arriving.wait)),
    ):
        policy.engine.forward_backward(batch, supervised_objective)
    if dist.get_rank() == 0:
        torch.save(spans, folder / "timeline.pt")


def main() -> None:
    """Print the two tables and the timeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options.layers, options.tokens)
        print(f"one sequence of {options.tokens} tokens, {options.layers} layers, float32")
        names = f"{'cp':>3} {'method':<11} {'activations MiB':>16} {'times cp 1':>11}"
        print(f"{names} {'sent MB a layer':>16} {'formula':>9} {'seconds':>8}")
        whole = 0.0
        for cp, method in [(1, "all_gather")] + [(cp, method) for cp in (2, 4, 8) for method in METHODS]:
            if method == "hybrid" and cp == 2:
                continue  # all_to_all
            run_local_ranks(measure, (folder, cp, method, options.tokens, options.layers), cp, 600)
            kept, sent, seconds = torch.load(folder / "result.pt")
            whole = whole or kept
            expected = formula(cp, method, options.tokens) if cp > 1 else 0.0
            row = f"{cp:>3} {method if cp > 1 else '-':<11} {kept / 2**20:>16.1f} {kept / whole:>11.3f}"
            print(f"{row} {sent / 1e6:>16.2f} {expected / 1e6:>9.2f} {seconds:>8.2f}", flush=True)
        run_local_ranks(draw_timeline, (folder, options.tokens), 4, 600)
        print_timeline(torch.load(folder / "timeline.pt"), options.layers)


def print_timeline(spans: list[tuple[str, float, float]], layers: int) -> None:
    """The last layer's forward and backward turns: F and B compute, w waits for keys, values or gradients."""
    turns = [span for span in spans if span[0] != "w"]
    forward = [turn for turn in turns if turn[0] == "F"][-len(turns) // (2 * layers) :]
    backward = [turn for turn in turns if turn[0] == "B"][: len(turns) // (2 * layers)]
    begin, end = forward[0][1], backward[-1][2]
    line = [" "] * TIMELINE_COLUMNS
    for letter, start, stop in spans:
        if begin <= start and stop <= end:
            first, last = (int((moment - begin) / (end - begin) * (TIMELINE_COLUMNS - 1)) for moment in (start, stop))
            line[first : last + 1] = letter * (last + 1 - first)
    waited = sum(stop - start for letter, start, stop in spans if letter == "w")
    computed = sum(stop - start for letter, start, stop in spans if letter != "w")
    print(f"rank 0 of 4, {1000 * (end - begin):.0f} ms: |{''.join(line)}|")
    print(f"computing {1000 * computed:.0f} ms, waiting for transfers {1000 * waited:.0f} ms, in all layers")


if __name__ == "__main__":
    main()
