"""reasoning-gym's tower_of_hanoi played move by move."""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from megarl.builtin.environments.base import BaseEnvironment
from megarl.builtin.environments.protocol import Environment
from megarl.section import key

_MOVE = re.compile(r"Move disk (\d+) from Peg (\d+) to Peg (\d+)")


class TowerOfHanoiEnvironment(BaseEnvironment):
    """reasoning-gym's tower_of_hanoi played move by move."""

    plays: ClassVar[str | None] = "tower_of_hanoi"

    type: Literal["tower_of_hanoi"] = key("tower_of_hanoi", "-", "Carries out one move each turn.")

    def load(self) -> Callable[..., Environment]:
        """Return the environment's class."""
        return TowerOfHanoi


class TowerOfHanoi:
    """Each turn is one move, as the task's question wants it; the policy is told where the disks are, or that it may not move so.

    The task's own verifier says whether a move is legal and what the whole solution is worth: 1, or less for detours. Without a
    solution within ``rollout.environment.max_turns`` there is no reward.
    """

    def __init__(self) -> None:
        import reasoning_gym  # here, because it takes seconds, which no episode's time-out should pay for

        self._task: Any = reasoning_gym.create_dataset("tower_of_hanoi", size=1, seed=0)
        self._entry: Mapping[str, Any] = {}
        self._moves: list[str] = []
        self._pegs: dict[int, list[int]] = {}  # disks of each peg, from below

    def reset(self, prompt: str, reference: Mapping[str, Any], seed: int) -> str:
        """Set up the puzzle of a reasoning_gym row; the first message shows it."""
        if reference.get("task") != "tower_of_hanoi":
            raise ValueError("the prompt is not of a reasoning_gym source with task tower_of_hanoi")
        self._entry = reference["entry"]
        puzzle = self._entry["metadata"]
        self._pegs = {peg: [] for peg in range(1, puzzle["num_pegs"] + 1)}
        self._pegs[puzzle["start_peg"]] = list(range(puzzle["num_disks"], 0, -1))
        return self._shown()

    def step(self, response: str) -> tuple[str, float | None, bool]:
        """Carry out the first move of the turn; a turn without one is an illegal move."""
        move = _MOVE.search(response)
        if move is None or self._score([*self._moves, move[0]]) == 0:
            return "illegal", None, False
        _, start, target = map(int, move.groups())
        self._moves.append(move[0])
        self._pegs[target].append(self._pegs[start].pop())
        if len(self._pegs[self._entry["metadata"]["target_peg"]]) < self._entry["metadata"]["num_disks"]:
            return self._shown(), None, False
        return "solved", self._score(self._moves), True

    def _score(self, moves: list[str]) -> float:
        """Return 0 for an illegal move among them."""
        return float(self._task.score_answer("\n".join(moves), self._entry))

    def _shown(self) -> str:
        return ", ".join(f"Peg {peg}: {' '.join(map(str, disks)) or '-'}" for peg, disks in self._pegs.items())
