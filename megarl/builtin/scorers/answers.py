"""Scorers that compare the response's answer with the row's, and the plainest of them."""

import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megarl.builtin.scorers.base import BaseScorer, RunApart, Scorer, pattern_mistakes
from megarl.errors import quoted
from megarl.section import key


class AnswerScorer(BaseScorer):
    """A scorer that says whether the response's answer is right."""

    pattern: str | None = key(
        None, "regular expression", "Its first group is the answer, and a response without it scores 0; all of it when not given."
    )

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        yield from pattern_mistakes("pattern", self.pattern, "answer")

    def compared_with(self, reference: Mapping[str, object]) -> list[Any]:
        """Return what it looks at in a row, as JSON values; rows with equal ones need one check by ``why_refused``."""
        return [reference["answer"]]

    @staticmethod
    @abstractmethod
    def why_refused(*values: object) -> str | None:
        """Say why no response can be compared with what ``compared_with`` gave, and what to do; None where one can."""


class ExactScorer(AnswerScorer):
    """1 if the answer equals the row's, apart from case and white space."""

    type: Literal["exact"] = key("exact", "-", "Compares texts.")

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        return of_first_group(self.pattern, exact)

    @staticmethod
    def why_refused(*values: Any) -> str | None:
        """Say why no response can be compared with the row's answer; None where one can."""
        return None if values[0].strip() else "the answer is empty, so that an empty response would be right; write one"


class MathScorer(AnswerScorer):
    """1 if the response's final answer is mathematically equal to the row's."""

    type: Literal["math"] = key("math", "-", "Compares mathematics.")

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        import latex2sympy2_extended  # noqa: F401  (here, because it takes a second and other scorers do without)
        import math_verify  # noqa: F401

        from megarl.builtin.mathematics.score import math_score  # here, as every command would compile its patterns

        # It warns in every worker that its time-outs are off, as they should be: they would be a silent "wrong" after 5 seconds.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        return of_first_group(self.pattern, math_score)

    @staticmethod
    def why_refused(*values: Any) -> str | None:
        """Say why no response can be compared with the row's answer; None where one can."""
        from megarl.builtin.mathematics.score import why_ungradable

        reason = why_ungradable(values[0])
        return reason and f"the answer {quoted(values[0])} {reason}"


def of_first_group(pattern: str | None, score_answer: Scorer) -> Scorer:
    """Make a scorer of responses, whose answer is the pattern's first group, or all of them, of a scorer of answers."""
    if pattern is None:
        return score_answer
    compiled = re.compile(pattern)

    def score(response: str, reference: Mapping[str, object]) -> Any:
        match = compiled.search(response)
        # A response without an answer is a wrong response, not a failed scorer.
        return 0.0 if match is None or match[1] is None else score_answer(match[1], reference)

    return score


def exact(answer: str, reference: Mapping[str, Any]) -> float:
    """Return 1 if the answer equals the reference's, apart from case and white space."""
    return 1.0 if _normalise(answer) == _normalise(reference["answer"]) else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())
