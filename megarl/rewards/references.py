"""Whether responses can be compared with what rows give as answers, found out before the first response is made."""

from collections.abc import Callable, Mapping
from typing import Any

from megarl.builtin.scorers import AnswerScorer, ScorerConfig
from megarl.section import sections_of

_COMPARING = {name: section for name, section in sections_of(ScorerConfig).items() if issubclass(section, AnswerScorer)}


def compared_with(scorer: AnswerScorer, reference: Mapping[str, Any]) -> list[Any]:
    """Return the scorer's type and what it looks at, as JSON values; equal ones need one check."""
    return [scorer.type, *scorer.compared_with(reference)]


def build(argument: Any) -> Callable[[Any], list[str | None]]:
    """Make the function of a process that checks batches of what ``compared_with`` gives; it needs no argument."""
    return lambda batch: [why_refused(*item) for item in batch]


def why_refused(scorer: str, *values: Any) -> str | None:
    """Say why a scorer of that type cannot compare responses with these values, and what to do; None where it can."""
    return _COMPARING[scorer].why_refused(*values)
