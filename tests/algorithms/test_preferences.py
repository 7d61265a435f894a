"""Losses of preference pairs against loops over Python floats, with derivatives written by hand."""

import math
import random
from dataclasses import dataclass
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.objectives import Objective, select_tokens
from megarl.algorithms.preferences import PREFERENCE_LOSSES, preference_objective, reward_objective
from megarl.algorithms.sequences import SequenceTokens, sequence_numbers, trained_lengths
from megarl.config.schema import REFERENCE_FREE, PreferenceConfig
from megarl.data.packing import pack_pairs, with_scored_ends
from megarl.data.template import PreferencePair, SFTExample

LENGTHS = (((2, 3), (2, 1)), ((1, 1), (1, 5)), ((4, 1), (4, 1)), ((3, 6), (3, 2)))  # prompt and response of chosen and rejected
MICRO_BATCHES = ([[0, 1, 2, 3]], [[2], [0, 3], [1]])
CASES = {
    "dpo": PreferenceConfig(beta=0.3),
    "cdpo": PreferenceConfig(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceConfig(loss="ipo", beta=0.7),
    "robust": PreferenceConfig(loss="robust", beta=0.3, label_smoothing=0.2),
    "simpo": PreferenceConfig(loss="simpo", beta=2.0, simpo_margin=0.6),
    "orpo": PreferenceConfig(loss="orpo", beta=0.4),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclass(frozen=True)
class Term:
    """The loss of one pair, and its derivatives in what is compared of the chosen and the rejected response."""

    loss: float
    by_chosen: float
    by_rejected: float


def term(name: str, chosen: float, rejected: float) -> Term:
    config = CASES[name]
    b, e, x = config.beta, config.label_smoothing, chosen - rejected
    s = sigmoid(b * x)
    if name in ("dpo", "cdpo"):
        slope = b * (s - (1 - e))
        return Term(-(1 - e) * math.log(s) - e * math.log(1 - s), slope, -slope)
    if name == "robust":
        slope = -b * ((1 - e) * (1 - s) + e * s) / (1 - 2 * e)
        return Term((-(1 - e) * math.log(s) + e * math.log(1 - s)) / (1 - 2 * e), slope, -slope)
    if name == "ipo":
        return Term((x - 0.5 / b) ** 2, 2 * (x - 0.5 / b), -2 * (x - 0.5 / b))
    if name == "simpo":
        assert config.simpo_margin is not None
        p = sigmoid(b * x - config.simpo_margin)
        return Term(-math.log(p), -b * (1 - p), b * (1 - p))
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (chosen, rejected)]
    p = odds[0] / (odds[0] + odds[1])  # the sigmoid of the log of their ratio
    by_log_odds = -b * (1 - p)
    return Term(-chosen - b * math.log(p), -1 + by_log_odds / (1 - math.exp(chosen)), -by_log_odds / (1 - math.exp(rejected)))


PACKED = pack_pairs(
    [
        PreferencePair(
            **{
                name: SFTExample(row_id="", token_ids=(1,) * (prompt + response), num_prompt_tokens=prompt)
                for name, (prompt, response) in zip(("chosen", "rejected"), pair, strict=True)
            }
        )
        for pair in LENGTHS
    ]
)
NUM_TOKENS = PACKED.token_ids.numel()


def positions() -> list[list[int]]:
    """Of the trained tokens of each sequence."""
    found, start = [], 0
    for prompt, response in (sequence for pair in LENGTHS for sequence in pair):
        found.append(list(range(start + prompt, start + prompt + response)))
        start += prompt + response
    return found


def logprobs_of(seed: int) -> Tensor:
    generator = random.Random(seed)
    return torch.tensor([-generator.uniform(0.1, 3.0) for _ in range(NUM_TOKENS)], dtype=torch.float64)


def objective_of(config: PreferenceConfig, logprobs: Tensor, reference: Tensor | None, pairs: list[int]) -> Objective:
    """Of one micro-batch, as the engine calls it on one rank."""
    numbers = sequence_numbers(PACKED.cu_seqlens)
    index = (torch.isin(numbers // 2, torch.tensor(pairs)) & PACKED.loss_mask).nonzero()[:, 0]
    lengths = trained_lengths(PACKED.loss_mask, PACKED.cu_seqlens)
    sequences = SequenceTokens(numbers=numbers[index], lengths=lengths, sum_over_ranks=lambda values: values)
    data = select_tokens(build_preference_batch(PACKED, reference), index, torch.device("cpu"), sequences)
    return preference_objective(logprobs[index], torch.zeros_like(logprobs[index]), data, config=config)


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_metrics(name: str, micro_batches: list[list[int]]) -> None:
    config = CASES[name]
    for seed in range(3):
        logprobs = logprobs_of(seed).requires_grad_()
        reference = logprobs_of(seed + 100) if config.has_reference else None
        objectives = [objective_of(config, logprobs, reference, pairs) for pairs in micro_batches]
        torch.stack([objective.loss for objective in objectives]).sum().backward()
        sums = {name: sum(float(one.metrics[name]) for one in objectives) for name in objectives[0].metrics}

        policy, frozen = logprobs.tolist(), [0.0] * NUM_TOKENS if reference is None else reference.tolist()
        gradient = [0.0] * NUM_TOKENS
        loss = accuracy = margin = chosen_logprob = 0.0
        trained = positions()
        for pair in range(4):
            sides = trained[2 * pair], trained[2 * pair + 1]
            scales = [1 / len(side) if config.loss in ("ipo", "simpo", "orpo") else 1.0 for side in sides]
            chosen, rejected = (scale * sum(policy[t] - frozen[t] for t in side) for scale, side in zip(scales, sides, strict=True))
            one = term(name, chosen, rejected)
            loss += one.loss / 4
            for side, scale, slope in zip(sides, scales, (one.by_chosen, one.by_rejected), strict=True):
                for t in side:
                    gradient[t] += slope * scale / 4
            accuracy += (chosen > rejected) / 4
            margin += config.beta * (chosen - rejected) / 4
            chosen_logprob += sum(policy[t] for t in sides[0]) / 4
        # token weights are float32: 6e-8 relative
        assert sums["loss"] == pytest.approx(loss, rel=1e-6)
        assert logprobs.grad is not None
        torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        assert sums["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert sums["margin"] == pytest.approx(margin, rel=1e-5)
        assert sums["chosen_reward"] - sums["rejected_reward"] == pytest.approx(margin, rel=1e-5)
        assert sums["chosen_logprob"] == pytest.approx(chosen_logprob, rel=1e-6)


@pytest.mark.parametrize("pairs", [[0, 1, 2, 3], [1, 3]])
def test_loss_of_a_reward_model(pairs: list[int]) -> None:
    """Bradley-Terry with margin and centering, of a batch in which one token of each response counts."""
    config = PreferenceConfig(reward_margin=0.3, reward_centering=0.05)
    packed = with_scored_ends(PACKED)
    values = torch.linspace(-2, 3, packed.token_ids.numel(), dtype=torch.float64).sin().requires_grad_()
    numbers = sequence_numbers(packed.cu_seqlens)
    index = (torch.isin(numbers // 2, torch.tensor(pairs)) & packed.loss_mask).nonzero()[:, 0]
    lengths = trained_lengths(packed.loss_mask, packed.cu_seqlens)
    sequences = SequenceTokens(numbers=numbers[index], lengths=lengths, sum_over_ranks=lambda sums: sums)
    data = select_tokens(build_preference_batch(packed, None), index, torch.device("cpu"), sequences)
    objective = reward_objective(values[index], data, config=config)
    objective.loss.backward()
    ends = [end - 1 for end in packed.cu_seqlens[1:].tolist()]
    outputs, gradient = values.tolist(), [0.0] * packed.token_ids.numel()
    loss = accuracy = 0.0
    for pair in pairs:
        chosen, rejected = outputs[ends[2 * pair]], outputs[ends[2 * pair + 1]]
        p = sigmoid(chosen - rejected - 0.3)
        loss += (-math.log(p) + 0.05 * (chosen + rejected) ** 2) / 4
        gradient[ends[2 * pair]] = (-(1 - p) + 0.1 * (chosen + rejected)) / 4
        gradient[ends[2 * pair + 1]] = ((1 - p) + 0.1 * (chosen + rejected)) / 4
        accuracy += (chosen > rejected) / 4
    assert float(objective.loss) == pytest.approx(loss, rel=1e-6)
    assert float(objective.metrics["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_special_cases() -> None:
    """A policy that is its reference: DPO's log 2; and robust DPO over wrong labels is DPO on the right ones."""
    logprobs = logprobs_of(0)
    objective = partial(objective_of, logprobs=logprobs, pairs=[0, 1, 2, 3])
    assert float(objective(CASES["dpo"], reference=logprobs).loss) == pytest.approx(math.log(2), rel=1e-6)
    chosen, rejected = (torch.tensor([value], dtype=torch.float64) for value in (0.8, -1.3))
    right, wrong = (
        PREFERENCE_LOSSES["robust"].function(*pair, CASES["robust"]) for pair in ((chosen, rejected), (rejected, chosen))
    )
    expected = PREFERENCE_LOSSES["dpo"].function(chosen, rejected, CASES["dpo"])
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, expected)


def test_orpo_of_certain_responses_is_finite() -> None:
    chosen, rejected = (torch.tensor([value, 0.0], dtype=torch.float64, requires_grad=True) for value in (0.0, -0.5))
    loss = PREFERENCE_LOSSES["orpo"].function(chosen, rejected, CASES["orpo"])
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert all(values.isfinite().all() for values in (loss, chosen.grad, rejected.grad))
    assert (chosen.grad < 0).all()


def test_the_schema_offers_what_the_registry_has() -> None:
    assert set(get_args(PreferenceConfig.model_fields["loss"].annotation)) == set(PREFERENCE_LOSSES)
    assert set(REFERENCE_FREE) <= set(PREFERENCE_LOSSES)
