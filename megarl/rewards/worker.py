"""What a worker process of scorers answers."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megarl.rewards.scorers import ScorerSpec, build_scorer


def build_scorers(specs: Sequence[ScorerSpec]) -> Callable[[tuple[str, str, Mapping[str, Any]]], float]:
    """The function that answers requests ``(name of scorer, response, reference)`` with the score."""
    scorers = {spec.name: build_scorer(spec) for spec in specs}

    def score(request: tuple[str, str, Mapping[str, Any]]) -> float:
        name, response, reference = request
        return checked_score(scorers[name](response, reference))

    return score


def checked_score(value: object) -> float:
    """A scorer's return value as a float; ValueError when it is not a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"the scorer returned {value!r}, not a finite number")
    return float(value)
