"""What a worker process of scorers answers."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megarl.rewards.document_qa import RuleScore
from megarl.rewards.scorers import ScorerSpec, build_scorer

Request = tuple[str, str | Sequence[str], Mapping[str, Any]]
Result = float | list[float] | RuleScore


def build_scorers(specs: Sequence[ScorerSpec]) -> Callable[[Request], Result]:
    """The function that answers requests ``(name of scorer, response, reference)`` with the score.

    For a scorer of steps, a list of steps is in the place of the response, and a list of numbers in that of the score. One of type
    document_qa gives a RuleScore: its judge is asked outside the workers.
    """
    scorers = {spec.name: build_scorer(spec) for spec in specs}

    def score(request: Request) -> Result:
        name, response, reference = request
        result = scorers[name](response, reference)
        return result if isinstance(result, RuleScore) else checked_scores(result, response)

    return score


def checked_score(value: object) -> float:
    """A scorer's return value as a float; ValueError when it is not a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"the scorer returned {value!r}, not a finite number")
    return float(value)


def checked_scores(value: object, response: str | Sequence[str]) -> float | list[float]:
    """What a scorer returned for a response, or for a list of steps; ValueError when it is not one finite number for each."""
    if isinstance(response, str):
        return checked_score(value)
    if not isinstance(value, list | tuple) or len(value) != len(response):
        given = f"{len(value)} numbers" if isinstance(value, list | tuple) else repr(value)
        raise ValueError(f"the scorer returned {given}, not a list with one number for each of {len(response)} steps")
    return [checked_score(one) for one in value]
