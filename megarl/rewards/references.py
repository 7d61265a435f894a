"""Whether responses can be compared with what rows give as answers, found out before the first response is made."""

from collections.abc import Callable, Mapping
from typing import Any

from megarl.errors import quoted
from megarl.rewards.document_qa import gold_answers
from megarl.rewards.math_scorer import why_ungradable

CHECKED = ("math", "exact", "document_qa", "reasoning_gym")  # types of scorers that compare with something


def compared_with(scorer: str, reference: Mapping[str, Any]) -> list[Any]:
    """What a scorer of that type looks at, as JSON values; equal ones need one check."""
    if scorer == "document_qa":
        has_several = "answers" in reference
        return [scorer, "answers" if has_several else "answer", reference["answers" if has_several else "answer"]]
    return [scorer, "entry" in reference if scorer == "reasoning_gym" else reference["answer"]]


def build(argument: Any) -> Callable[[Any], list[str | None]]:
    """The function of a process that checks batches of what ``compared_with`` gives; it needs no argument."""
    return lambda batch: [why_refused(*item) for item in batch]


def why_refused(scorer: str, *values: Any) -> str | None:
    """Why the scorer cannot compare responses with that, and what to do; None where it can."""
    if scorer == "math":
        reason = why_ungradable(values[0])
        return reason and f"the answer {quoted(values[0])} {reason}"
    if scorer == "exact":
        return None if values[0].strip() else "the answer is empty, so that an empty response would be right; write one"
    if scorer == "reasoning_gym":
        return None if values[0] else "the row is not of a reasoning_gym source, so its answer cannot be scored by one"
    try:
        gold_answers({values[0]: values[1]})
    except ValueError as error:
        return f"{error}; write one, or leave the row out"
    return None
