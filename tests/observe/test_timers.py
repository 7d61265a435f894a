"""Seconds by phase on a clock that the test turns."""

import pytest

from megarl.observe.timers import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_breakdown_adds_up_and_resets() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now += 0.5
    with timer.phase("generate"):
        clock.now += 2
    clock.now += 0.25
    for _ in range(2):
        with timer.phase("update"):
            clock.now += 3
    timer.move("generate", "score", 0.5)
    assert timer.step_breakdown() == {"generate": 1.5, "update": 6.0, "score": 0.5, "other": 0.75}
    clock.now += 1
    assert timer.step_breakdown() == {"other": 1.0}


def test_a_failed_phase_is_counted_and_closed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(KeyError), timer.phase("update"):
        clock.now += 2
        raise KeyError
    with timer.phase("update"):
        clock.now += 1
    assert timer.step_breakdown() == {"update": 3.0, "other": 0.0}


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer()
    with timer.phase("generate"):
        with pytest.raises(AssertionError, match="phase score inside phase generate"), timer.phase("score"):
            pass
        with pytest.raises(AssertionError, match="step ends inside phase generate"):
            timer.step_breakdown()
