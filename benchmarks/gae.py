"""GAE of a batch of long responses: MegaRL's vectorised function against loops over tokens, in the same run.

    python benchmarks/gae.py [--sequences 256] [--tokens 16384] [--threads 2]

Two loops do the same for each token in turn: one reads and writes tensor elements, as one first writes it; the other works on
Python floats, the fastest that a loop over tokens can be in Python. The first is timed on a few sequences and scaled up.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megarl.algorithms.gae import generalised_advantages

DISCOUNT, DECAY = 0.99, 0.95


def loop_over_floats(rewards: Tensor, values: Tensor) -> Tensor:
    """[sequences, tokens], every response trained on whole."""
    rows = []
    for reward_row, value_row in zip(rewards.tolist(), values.tolist(), strict=True):
        row = [0.0] * len(reward_row)
        advantage = following = 0.0
        for t in range(len(reward_row) - 1, -1, -1):
            advantage = reward_row[t] + DISCOUNT * following - value_row[t] + DISCOUNT * DECAY * advantage
            following = value_row[t]
            row[t] = advantage
        rows.append(row)
    return torch.tensor(rows, dtype=rewards.dtype)


def loop_over_tensor_elements(rewards: Tensor, values: Tensor) -> Tensor:
    """The same on elements of tensors."""
    advantages = torch.zeros_like(rewards)
    for sequence in range(rewards.size(0)):
        advantage = following = torch.zeros(())
        for t in range(rewards.size(1) - 1, -1, -1):
            error = rewards[sequence, t] + DISCOUNT * following - values[sequence, t]
            advantage = error + DISCOUNT * DECAY * advantage
            following = values[sequence, t]
            advantages[sequence, t] = advantage
    return advantages


def vectorised(rewards: Tensor, values: Tensor) -> Tensor:
    """The same packed, as the trainer calls it."""
    num_sequences, num_tokens = rewards.shape
    boundaries = torch.arange(num_sequences + 1) * num_tokens
    mask = torch.ones(rewards.numel(), dtype=torch.bool)
    packed = generalised_advantages(rewards.flatten(), values.flatten(), boundaries, mask, discount=DISCOUNT, trace_decay=DECAY)
    return packed.view_as(rewards)


def timed(function: Callable[[Tensor, Tensor], Tensor], rewards: Tensor, values: Tensor, repeats: int) -> tuple[Tensor, float]:
    """The result and the shortest of some wall times, seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(rewards, values)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, options.sequences, options.tokens, generator=generator)
    few = max(1, options.sequences // 128)

    ours, our_seconds = timed(vectorised, rewards, values, repeats=5)
    floats, float_seconds = timed(loop_over_floats, rewards, values, repeats=1)
    elements, element_seconds = timed(loop_over_tensor_elements, rewards[:few], values[:few], repeats=1)
    element_seconds *= options.sequences / few

    print(f"[{options.sequences}, {options.tokens}] float32, {torch.get_num_threads()} threads")
    print(f"{'method':<28} {'seconds':>9} {'ratio':>7} {'largest difference':>19}")
    for name, seconds, result in (
        ("vectorised", our_seconds, ours),
        ("loop over Python floats", float_seconds, floats),
        (f"loop over tensor elements ({few})", element_seconds, elements),
    ):
        difference = float((result - ours[: result.size(0)]).abs().max())
        print(f"{name:<28} {seconds:>9.3f} {seconds / our_seconds:>7.0f} {difference:>19.1e}")


if __name__ == "__main__":
    main()
