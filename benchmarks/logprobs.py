"""Memory and time of log-probability + entropy + backward: MegaRL's chunked function against full logits, in the same run.

    python benchmarks/logprobs.py [--vocabulary 150000] [--hidden 512] [--chunk 1024]

Each measurement is a process of its own. The peak is the process's highest resident memory above what it held with the inputs
and their gradients allocated.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from torch import Tensor

from megarl.parallel.logprobs import vocab_parallel_logprobs


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers without chunking do."""
    logprobs = (hidden @ weight.t()).float().log_softmax(-1)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def measure(arguments: tuple[str, int, int, int, int]) -> tuple[float, float]:
    """Peak bytes and seconds of one forward and backward."""
    method, tokens, vocabulary, hidden_size, chunk = arguments
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    gradient_bytes = hidden.nbytes + weight.nbytes
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    start = time.perf_counter()
    if method == "full":
        logprobs, entropy = full_logits(hidden, weight, targets)
    else:
        logprobs, entropy = vocab_parallel_logprobs(hidden, weight, targets, vocabulary_size=vocabulary, chunk_tokens=chunk)
    (logprobs.sum() + 0.01 * entropy.sum()).backward()
    seconds = time.perf_counter() - start
    return resident_bytes("VmHWM") - before - gradient_bytes, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    options = parser.parse_args()
    chunk_bytes = 4 * options.chunk * options.vocabulary
    print(f"vocabulary {options.vocabulary}, hidden {options.hidden}, float32, {torch.get_num_threads()} threads")
    print(f"one chunk of {options.chunk} tokens: {chunk_bytes / 2**20:.0f} MiB of logits")
    print(f"{'method':<8} {'tokens':>7} {'peak MiB':>9} {'chunks':>7} {'seconds':>8}")
    for method, tokens in (("full", 4096), ("chunked", 4096), ("chunked", 16384)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.map(measure, [(method, tokens, options.vocabulary, options.hidden, options.chunk)])[0]
        print(f"{method:<8} {tokens:>7} {peak / 2**20:>9.0f} {peak / chunk_bytes:>7.2f} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
