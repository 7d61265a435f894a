"""The calculator and the puzzle of the towers."""

import pickle
from typing import Any

import pytest
import reasoning_gym

from megarl.builtin.environments.calculator import Calculator, calculate
from megarl.builtin.environments.tower_of_hanoi import TowerOfHanoi


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", "14"),
        (" -7 ", "-7"),
        ("123456789*987654321", "121932631112635269"),
        ("1/3 + 1/6", "1/2"),
        ("0.1+0.2", "3/10"),
        ("(2-5)*-2", "6"),
        ("1/0", "error"),
        ("2**999999999", "error"),
        ("__import__('os')", "error"),
        ("True+1", "error"),
        ("1+", "error"),
        ("", "error"),
        ("(" * 150 + ")" * 50, "error"),
        ("1e999999999", "error"),
        ("1+" * 100 + "1", "error"),  # too long
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


def test_a_turn_without_a_call_is_the_answer() -> None:
    calculator = Calculator()
    assert calculator.reset("", {}, 0) is None  # type: ignore[func-returns-value]
    assert calculator.step("I ask <calculator>2+2</calculator>") == ("4", None, False)
    assert calculator.step("<calculator>1</calculator> <calculator>5*5</calculator>") == ("25", None, False)
    assert calculator.step("The answer is 25") == (None, None, True)
    assert Calculator(pattern=r"\[(.*)\]", answer="= {value}").step("[6/4]") == ("= 3/2", None, False)


@pytest.mark.parametrize("options", [{"pattern": "call"}, {"answer": "value"}, {"pattern": "("}])
def test_wrong_options_of_the_calculator(options: dict[str, str]) -> None:
    with pytest.raises(Exception, match=r"has no group|has no \{value\}|unterminated"):
        Calculator(**options)


def played(moves: list[str], seed: int = 0, disks: int = 3) -> list[Any]:
    dataset = reasoning_gym.create_dataset("tower_of_hanoi", size=1, seed=seed, min_disks=disks, max_disks=disks, max_pegs=3)
    game = TowerOfHanoi()
    answers: list[Any] = [game.reset("", {"task": "tower_of_hanoi", "entry": dataset[0]}, 0)]
    for move in moves:
        game = pickle.loads(pickle.dumps(game))
        answers.append(game.step(move))
    return answers


def test_the_generators_solution_is_worth_1_and_detours_less() -> None:
    entry = reasoning_gym.create_dataset("tower_of_hanoi", size=1, seed=0, min_disks=3, max_disks=3, max_pegs=3)[0]
    start = entry["metadata"]["start_peg"]
    solution = entry["answer"].split("\n")
    assert len(solution) == 7
    first, *middle, last = played(solution)
    assert f"Peg {start}: 3 2 1" in first
    assert all(reward is None and not done and "Peg 1: " in seen for seen, reward, done in middle)
    assert last == ("solved", 1.0, True)
    disk, source, target = (int(solution[0].split()[index]) for index in (2, 5, 8))
    other = 6 - source - target
    detour = [f"Move disk {disk} from Peg {source} to Peg {other}", f"Move disk {disk} from Peg {other} to Peg {target}"]
    assert played(["I think: " + detour[0], detour[1], *solution[1:]])[-1] == ("solved", 7 / 8, True)


def test_illegal_moves_change_nothing() -> None:
    entry = reasoning_gym.create_dataset("tower_of_hanoi", size=1, seed=0, min_disks=3, max_disks=3, max_pegs=3)[0]
    solution = entry["answer"].split("\n")
    start, target = entry["metadata"]["start_peg"], entry["metadata"]["target_peg"]
    illegal = [f"Move disk 2 from Peg {start} to Peg {target}", f"Move disk 1 from Peg {start} to Peg 4", "no move", ""]
    answers = played([*illegal, *solution])
    assert answers[1:5] == [("illegal", None, False)] * 4
    assert answers[-1] == ("solved", 1.0, True)
    on_smaller = solution[0].replace("disk 1", "disk 2")
    assert played([solution[0], on_smaller])[-1] == ("illegal", None, False)


def test_prompts_of_other_tasks_are_a_failure() -> None:
    with pytest.raises(ValueError, match="not of a reasoning_gym source with task tower_of_hanoi"):
        TowerOfHanoi().reset("", {"answer": "4"}, 0)
