"""docs/metrics.md is the registry, and reductions over optimizer steps are what it says, worked by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.algorithms.step_metrics import BatchMetrics, combined
from megarl.metrics import SECTIONS, UPDATE_METRICS, Reduction, find_metric, metrics_markdown

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_current() -> None:
    expected = (ROOT / "docs" / "metrics.md").read_text()
    assert metrics_markdown() == expected, "run: make docs"
    command = [sys.executable, "-m", "megarl.metrics"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout == expected


def test_every_metric_says_what_it_is() -> None:
    for _, metrics in SECTIONS.values():
        for name, metric in metrics.items():
            assert metric.unit and metric.meaning and find_metric(name), name


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("critic_value_mean", Reduction.TOKEN_MEAN),
        ("critic_gradient_norm_max", Reduction.MAXIMUM),
        ("held_out/margin", Reduction.SEQUENCE_MEAN),
        ("staleness/12_gap_corrected", Reduction.TOKEN_MEAN),
        ("accuracy/sums", Reduction.PROMPT_MEAN),
        ("reward_mean/a task", Reduction.SEQUENCE_MEAN),
        ("rollout/pass@8", Reduction.PROMPT_MEAN),
    ],
)
def test_names_with_variable_parts_are_found(name: str, reduction: Reduction) -> None:
    metric = find_metric(name)
    assert metric is not None and metric.reduction is reduction
    assert find_metric(f"x{name}") is None


# of three optimizer steps with 2, 6 and 8 trained tokens and 1, 2 and 5 responses, whose values are 3, 1 and 2
BY_HAND = {
    Reduction.TOKEN_MEAN: (2 * 3 + 6 * 1 + 8 * 2) / 16,
    Reduction.SEQUENCE_MEAN: (1 * 3 + 2 * 1 + 5 * 2) / 8,
    Reduction.UPDATE_MEAN: 2.0,
    Reduction.SUM: 6.0,
    Reduction.MAXIMUM: 3.0,
    Reduction.MINIMUM: 1.0,
    Reduction.LAST: 2.0,
}


@pytest.mark.parametrize("name", UPDATE_METRICS)
def test_every_metric_of_updates_is_reduced_as_the_page_says(name: str) -> None:
    batches = [
        BatchMetrics(metrics={name: value}, num_tokens=num_tokens, num_sequences=num_sequences)
        for value, num_tokens, num_sequences in ((3.0, 2, 1), (1.0, 6, 2), (2.0, 8, 5))
    ]
    assert combined(batches)[name] == pytest.approx(BY_HAND[UPDATE_METRICS[name].reduction])


def test_updates_have_every_reduction_that_is_worked_by_hand() -> None:
    assert {metric.reduction for metric in UPDATE_METRICS.values()} == BY_HAND.keys()
