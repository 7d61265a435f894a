"""How far the loss is from the loop, for a reader."""

from pathlib import Path

from hops import frames_to_the_surrogate

GOAL = 6


def test_six_functions_from_the_loop_to_the_surrogate(tmp_path: Path) -> None:
    frames = frames_to_the_surrogate(tmp_path)
    print("\n".join(frames))
    assert frames[0] == "loop/rl.py: train" and frames[-1] == "algorithms/surrogates.py: ppo_clip"
    assert len(frames) <= GOAL, frames
