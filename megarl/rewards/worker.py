"""What a worker process of scorers answers, and what of that the trainer takes."""

import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megarl.builtin.scorers import WorkerScorer
from megarl.builtin.scorers.document_qa import RuleScore
from megarl.workers.limits import isolated

Request = tuple[str, str | Sequence[str], Mapping[str, Any]]
Score = float | list[float]


def build_scorers(argument: tuple[Mapping[str, WorkerScorer], bool]) -> Callable[[Request], object]:
    """Make the function that answers requests ``(name of scorer, response, reference)`` with the score, as JSON has it.

    The argument is the scorers by name, and whether this process is in a sandbox.

    For a scorer of steps, a list of steps is in the place of the response, and a list of numbers in that of the score. One of type
    document_qa gives the fields of a RuleScore: its judge is asked outside the workers.
    """
    scorers, is_sandboxed = argument
    functions = {name: scorer.build(isolated if is_sandboxed else None) for name, scorer in scorers.items()}

    def score(request: Request) -> object:
        name, response, reference = request
        result = functions[name](response, reference)
        return asdict(result) if isinstance(result, RuleScore) else checked_scores(result, response)

    return score


def read_score(answer: object, response: str | Sequence[str]) -> Score | RuleScore:
    """Read a worker's answer, which may be a response's own work; ValueError when it is no score."""
    if not isinstance(answer, dict):
        return checked_scores(answer, response)
    score, found = answer.get("score"), answer.get("answer")
    if answer.keys() != {"score", "answer"} or not (found is None or isinstance(found, str)):
        raise ValueError("the worker answered with something else than a score")
    return RuleScore(score=checked_score(score), answer=found)


def checked_score(value: object) -> float:
    """Return a scorer's value as a float; ValueError when it is not a finite number."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"the scorer returned {reprlib.repr(value)}, not a finite number")
    return number


def checked_scores(value: object, response: str | Sequence[str]) -> Score:
    """Return what a scorer gave for a response, or for a list of steps; ValueError when it is not one finite number for each."""
    if isinstance(response, str):
        return checked_score(value)
    if not isinstance(value, list | tuple) or len(value) != len(response):
        given = f"{len(value)} numbers" if isinstance(value, list | tuple) else reprlib.repr(value)
        raise ValueError(f"the scorer returned {given}, not a list with one number for each of {len(response)} steps")
    return [checked_score(one) for one in value]
