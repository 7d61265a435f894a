import math

import pytest

from megarl.errors import TrainingError
from megarl.observe.sentinels import EntropyFloor, check_logprob_gap


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
