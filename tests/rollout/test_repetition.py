"""The repetition stop of the embedded engine against a slow search."""

import random

import pytest
import torch

from megarl.config.schema import RepetitionStopConfig
from megarl.engines.token_sampler import RepetitionStop
from tiny_rollout import repeats_first_at


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
