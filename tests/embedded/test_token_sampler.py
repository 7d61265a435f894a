"""The Gumbel sampler against the distribution it must draw from, and the repetition stop against a slow search."""

import random

import pytest
import torch

from megarl.config.schema import RepetitionStopConfig
from megarl.engines.token_sampler import GumbelSampler, RepetitionStop
from tiny_rollout import repeats_first_at, sampling

NUM_ROWS = 4000
PROMPT_MASK = torch.ones(NUM_ROWS, 1, dtype=torch.int64)
CHI_SQUARE_99 = {3: 11.34, 5: 15.09}  # 99 % quantile by degrees of freedom


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return ((observed - expected).square() / expected).sum().item()


def sample(logits: torch.Tensor, seed: int, **settings: float) -> torch.Tensor:
    sampler = GumbelSampler([(seed, row) for row in range(NUM_ROWS)], sampling(**settings), PROMPT_MASK)
    scores = logits.expand(NUM_ROWS, -1).contiguous()
    return sampler(torch.zeros(NUM_ROWS, 1, dtype=torch.long), scores).argmax(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -2.5, 1.1]])
    drawn = torch.cat([sample(logits, seed, temperature=temperature) for seed in range(5)])
    observed = torch.bincount(drawn, minlength=6).double()
    expected = (logits.double() / temperature).softmax(-1)[0] * drawn.numel()
    assert chi_square(observed, expected) < CHI_SQUARE_99[5]
    wrong = (logits.double() / (1.1 * temperature)).softmax(-1)[0] * drawn.numel()
    assert chi_square(observed, wrong) > 3 * CHI_SQUARE_99[5]  # the test has the power to see a wrong temperature


def test_top_k_top_p_and_min_p_keep_only_their_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert set(sample(logits, 0, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, 0, top_p=0.7).tolist()) == {0, 1}  # 0.64 alone is below 0.7
    assert set(sample(logits, 0, top_p=0.6).tolist()) == {0}
    assert set(sample(logits, 0, min_p=0.1).tolist()) == {0, 1, 2}  # e^-2 = 0.135 of the first
    assert set(sample(logits, 0, min_p=0.2).tolist()) == {0, 1}
    assert set(sample(logits, 0, min_p=0.1, temperature=0.5).tolist()) == {0, 1}  # e^-4 of the first


def test_penalties_count_tokens_of_the_row_alone_and_leave_its_log_probabilities() -> None:
    """Against a loop over tokens in float64; padding, the token 0, is in no prompt."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 3, 3, 5, 5, 1], [4, 6, 6, 2, 3, 0, 3]])
    for penalties in (
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"repetition_penalty": 1.6},
        {"presence_penalty": -0.2, "frequency_penalty": 0.3, "repetition_penalty": 0.8},
    ):
        settings = sampling(temperature=0.0, **penalties)
        sampler = GumbelSampler([(0, 0), (0, 1)], settings, mask)
        penalised = sampler(ids, logits)
        for row in range(2):
            prompt = [int(token) for token, real in zip(ids[row, :4], mask[row], strict=True) if real]
            response = ids[row, 4:].tolist()
            for token in range(7):
                expected, times = float(logits[row, token]), response.count(token)
                if token in prompt + response:
                    expected = expected / settings.repetition_penalty if expected > 0 else expected * settings.repetition_penalty
                expected -= settings.frequency_penalty * times + settings.presence_penalty * (times > 0)
                assert abs(float(penalised[row, token]) - expected) <= 1e-6
        token = penalised.argmax(dim=-1)
        plain = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert (sampler.logprobs[0].double() - plain).abs().max() <= 1e-6


def test_successive_steps_of_a_row_are_independent_draws() -> None:
    sampler = GumbelSampler([(5, row) for row in range(NUM_ROWS)], sampling(), PROMPT_MASK)
    scores, ids = torch.zeros(NUM_ROWS, 2), torch.zeros(NUM_ROWS, 1, dtype=torch.long)
    first, second = (sampler(ids, scores).argmax(dim=-1) for _ in range(2))
    pairs = torch.bincount(2 * first + second, minlength=4).double()
    assert chi_square(pairs, torch.full((4,), NUM_ROWS / 4)) < CHI_SQUARE_99[3]


@pytest.mark.parametrize(("smallest", "largest", "count"), [(1, 1, 2), (1, 3, 3), (2, 5, 2), (3, 4, 4), (4, 9, 2)])
def test_rows_end_where_they_first_repeat_themselves(smallest: int, largest: int, count: int) -> None:
    """Random rows of two tokens after a prompt that repeats itself, which does not count."""
    generator = random.Random(count)
    rows = [[generator.randrange(2) for _ in range(60)] for _ in range(40)]
    rows[0] = [0, 1, 1] * 20
    prompts = torch.zeros(len(rows), 12, dtype=torch.int64)
    stop = RepetitionStop(
        RepetitionStopConfig(min_pattern_size=smallest, max_pattern_size=largest, min_count=count), len(rows), prompts.shape[1]
    )
    ids = torch.cat([prompts, torch.tensor(rows)], dim=1)
    for length in range(1, 61):
        done = stop(ids[:, : 12 + length], None)
        assert all(done[row] for row in range(len(rows)) if repeats_first_at(rows[row], smallest, largest, count) == length)
    assert stop.lengths == [repeats_first_at(row, smallest, largest, count) for row in rows]
    assert sum(length is not None for length in stop.lengths) >= 2
