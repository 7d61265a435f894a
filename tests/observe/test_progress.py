"""What the terminal shows, written to a text buffer."""

import io

from rich.console import Console

from megarl.observe.progress import RunProgress

METRICS = {"reward_mean": 0.53125, "loss": 1e-9, "entropy": 1.25, "kl_old": 3.0, "accuracy": 0.625}
PHASES = {"generate": 1.5, "update": 0.5, "other": 0.04}


def run(*, terminal: bool, enabled: bool = True) -> str:
    buffer, seconds = io.StringIO(), [1000.0]
    console = Console(file=buffer, force_terminal=terminal, width=200)
    with RunProgress(20, start_step=10, enabled=enabled, console=console, clock=lambda: seconds[0]) as progress:
        seconds[0] += 60
        progress.update(12, METRICS, PHASES)
        progress.message("stalled: prompt [train/17] has waited 120 s")
        seconds[0] += 60
        progress.update(15, {"loss": 0.5}, {})
    return buffer.getvalue()


def test_one_line_for_each_step_without_a_terminal() -> None:
    assert run(terminal=False).splitlines() == [
        "step 12/20  accuracy 62.5%  reward_mean 0.5312  entropy 1.25  2.0 s (generate 1.5, update 0.5, other 0.0)  ETA 0:04:00",
        "stalled: prompt [train/17] has waited 120 s",
        "step 15/20  accuracy 62.5%  loss 0.5  ETA 0:02:00",
    ]


def test_live_display_on_a_terminal() -> None:
    shown = run(terminal=True)
    assert "\x1b[" in shown
    for part in ("12/20", "ETA 0:04:00", "reward_mean 0.5312", "generate 1.5", "prompt [train/17]", "15/20", "ETA 0:02:00"):
        assert part in shown


def test_only_messages_when_progress_is_off() -> None:
    for terminal in (True, False):
        assert run(terminal=terminal, enabled=False) == "stalled: prompt [train/17] has waited 120 s\n"


def test_no_steps_done_has_no_estimate() -> None:
    buffer = io.StringIO()
    with RunProgress(20, console=Console(file=buffer, width=200)) as progress:
        progress.update(0, {"accuracy": 0.0}, {})
    assert buffer.getvalue() == "step 0/20  accuracy 0.0%  ETA -\n"
