"""Ragged batches with everything that goes wrong: empty responses, environment tokens, a group of one, equal rewards."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megarl.data.packing import no_routing
from megarl.types import NO_VERSION, PackedBatch, TokenOutputs

# p: prompt, r: response token of the policy, e: token of the environment
SEQUENCES = ("pprrr", "p", "ppprerrr", "ppp", "prreeer", "pprrrr", "prr", "ppprreerr", "pr", "prrrrrr")
GROUPS = (0, 0, 1, 1, 1, 2, 2, 2, 3, 2)  # 3 is a group of one; 0 has an empty response
EQUAL_REWARD_GROUP = 1
LONGEST = 7  # trained tokens
GREEDY_LENGTHS = (0, 7, 5, 6)  # tokens of each group's greedy response
TASKS = (0, 0, 1, 1, 1, 0, 0, 0, 1, 0)


@dataclass(frozen=True)
class Ragged:
    """One batch as tensors and, for loops, as one list of token positions for each sequence.

    Attributes:
        trained: for each sequence the positions of its trained tokens in the packed batch.
    """

    packed: PackedBatch
    outputs: TokenOutputs
    trained: list[list[int]]

    def steps(self) -> list[list[tuple[int, float]]]:
        """For each sequence the positions and rewards of the ends of its steps."""
        starts, rewards = self.packed.cu_seqlens.tolist(), self.packed.step_rewards.tolist()
        return [
            [(p, rewards[p]) for p in range(starts[i], starts[i + 1]) if rewards[p] == rewards[p]] for i in range(len(SEQUENCES))
        ]


def ragged(seed: int, dtype: torch.dtype = torch.float64, spread: float = 0.3) -> Ragged:
    """Random rewards, and log-probabilities that differ by about ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    text = "".join(SEQUENCES)
    starts = [sum(len(sequence) for sequence in SEQUENCES[:i]) for i in range(len(SEQUENCES) + 1)]

    def near(values: Tensor) -> Tensor:
        return values + spread * torch.randn(len(text), generator=generator, dtype=torch.float64)

    greedy = torch.Generator().manual_seed(seed + 1000)
    groups = torch.tensor(GROUPS)
    greedy_rewards = torch.randn(max(GROUPS) + 1, generator=greedy, dtype=torch.float64)
    rewards = torch.randn(len(SEQUENCES), generator=generator, dtype=torch.float64)
    rewards[groups == EQUAL_REWARD_GROUP] = 0.7
    mask = torch.tensor([letter == "r" for letter in text])
    base = -3 * torch.rand(len(text), generator=generator, dtype=torch.float64) - 0.1
    old, reference, sampler = (near(base) * mask for _ in range(3))
    steps = torch.Generator().manual_seed(seed + 2000)
    step_rewards = [
        # sometimes steps end in an environment's answer, never in the prompt; some responses have none
        float(torch.randn((), generator=steps)) if letter != "p" and torch.rand((), generator=steps) < 0.4 else torch.nan
        for letter in text
    ]
    packed = PackedBatch(
        token_ids=torch.randint(0, 50, (len(text),), generator=generator),
        cu_seqlens=torch.tensor(starts),
        loss_mask=mask,
        sampler_logprobs=sampler.to(dtype),
        weight_versions=torch.where(mask, 0, NO_VERSION),
        step_rewards=torch.tensor(step_rewards, dtype=dtype),
        routed_experts=no_routing(len(text)),
        group_ids=groups,
        task_ids=torch.tensor(TASKS),
        rewards=rewards.to(dtype),
        truncated=torch.tensor([sequence.count("r") >= LONGEST - 1 for sequence in SEQUENCES]),
        greedy_rewards=greedy_rewards[groups].to(dtype),
        greedy_lengths=torch.tensor(GREEDY_LENGTHS)[groups],
    )
    entropies = torch.rand(len(text), generator=generator, dtype=torch.float64) * mask
    values = torch.randn(len(text), generator=generator, dtype=torch.float64) * mask
    outputs = TokenOutputs(old=old.to(dtype), entropies=entropies.to(dtype), reference=reference.to(dtype), values=values.to(dtype))
    trained = [[p for p in range(starts[i], starts[i + 1]) if mask[p]] for i in range(len(SEQUENCES))]
    return Ragged(packed=packed, outputs=outputs, trained=trained)


def assert_tokens(actual: Tensor, expected: list[list[float]], batch: Ragged, tolerance: float) -> None:
    """Trained tokens have the expected values, all others 0."""
    everywhere = [0.0] * actual.numel()
    for positions, values in zip(batch.trained, expected, strict=True):
        for position, value in zip(positions, values, strict=True):
            everywhere[position] = value
    assert actual.tolist() == pytest.approx(everywhere, rel=tolerance, abs=tolerance)
