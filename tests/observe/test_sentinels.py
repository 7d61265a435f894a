import math
from pathlib import Path

import pytest

from megarl.config.schema import ObserveConfig
from megarl.errors import TrainingError
from megarl.observe.sentinels import EntropyFloor, check_logprob_gap
from megarl.observe.sinks import MetricsWriter, first_value


@pytest.mark.parametrize("gap", [0.25, math.nan, math.inf])
def test_a_gap_ends_the_run_at_its_first_step_and_warns_later(gap: float) -> None:
    with pytest.raises(TrainingError, match=rf"step 0: .* differ by {gap:g} nats .* observe.max_logprob_gap 0.1;") as caught:
        check_logprob_gap(gap, 0.1, 0, first=True)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300
    warning = check_logprob_gap(gap, 0.1, 5, first=False)
    assert warning is not None and warning.startswith("step 5: ")


def test_a_small_gap_is_fine() -> None:
    assert check_logprob_gap(0.1, 0.1, 0, first=True) is None


def test_entropy_floor_warns_once_for_each_fall() -> None:
    floor = EntropyFloor(0.5)
    warnings = [floor.check(entropy, step) for step, entropy in enumerate([0.9, 0.5, 0.4, 0.3, 0.6, 0.2])]
    assert [warning is not None for warning in warnings] == [False, False, True, False, False, True]
    assert warnings[2] is not None and "step 2: mean token entropy 0.4 nats is below observe.min_entropy 0.5" in warnings[2]
    assert EntropyFloor(0.0).check(0.0, 1) is None


def test_entropy_alarm_is_relative_to_the_run_s_first_entropy() -> None:
    """On by default; a run that begins low is not one that collapses, and a resumed one still knows where it began."""
    share = ObserveConfig().min_entropy_share
    assert share == 0.1 and ObserveConfig().min_entropy == 0
    low = EntropyFloor(0.0, share)
    assert [low.check(entropy, step) is not None for step, entropy in enumerate([0.02, 0.01, 0.0019, 0.001])] == [0, 0, 1, 0]
    warning = EntropyFloor(0.0, share, first=1.0).check(0.05, 7)
    assert warning is not None and "entropy 0.05 nats is below 0.1 of the run's first 1 (observe.min_entropy_share)" in warning
    assert EntropyFloor(0.0, 0.0, first=1.0).check(0.0, 7) is None
    assert EntropyFloor(0.0, share).check(0.0, 0) is None, "nothing to fall from"


def test_the_first_entropy_of_a_run_is_in_its_log(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, metrics in enumerate([{"accuracy": 0.5}, {"loss": 1.0}, {"entropy": 0.7}, {"entropy": 0.2}]):
            writer.write(step, metrics)
    assert (
        first_value(tmp_path / "metrics.jsonl", "entropy", 3) == 0.7
        and first_value(tmp_path / "metrics.jsonl", "absent", 3) is None
    )
