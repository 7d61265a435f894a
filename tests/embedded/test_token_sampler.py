"""The Gumbel sampler against the distribution it must draw from, and the repetition stop against a slow search."""

import random

import pytest
import torch

from megarl.config.schema import RepetitionStopConfig
from megarl.engines.token_sampler import GumbelSampler, RepetitionStop
from tiny_rollout import repeats_first_at

NUM_ROWS = 4000
CHI_SQUARE_99 = {3: 11.34, 5: 15.09}  # 99 % quantile by degrees of freedom


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return ((observed - expected).square() / expected).sum().item()


def sample(logits: torch.Tensor, seed: int, **settings: float) -> torch.Tensor:
    sampler = GumbelSampler(
        [(seed, row) for row in range(NUM_ROWS)],
        temperature=settings.get("temperature", 1.0),
        top_k=int(settings.get("top_k", 0)),
        top_p=settings.get("top_p", 1.0),
    )
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


def test_top_k_and_top_p_keep_only_their_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert set(sample(logits, 0, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, 0, top_p=0.7).tolist()) == {0, 1}  # 0.64 alone is below 0.7
    assert set(sample(logits, 0, top_p=0.6).tolist()) == {0}


def test_successive_steps_of_a_row_are_independent_draws() -> None:
    sampler = GumbelSampler([(5, row) for row in range(NUM_ROWS)], temperature=1.0, top_k=0, top_p=1.0)
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
