"""Scores of mathematics: the response's final answer against the reference's, in bounded time whatever either of them holds."""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache

from megarl.builtin.mathematics.answers import MAX_CHARACTERS, Answer, Words, is_prose, read_answer
from megarl.builtin.mathematics.equality import MAX_SECONDS, TooLongError, equal, is_readable, limited_time
from megarl.builtin.mathematics.final_answer import final_answers, given_answer, has_different_boxes
from megarl.builtin.mathematics.text import is_balanced, tidy, words_of
from megarl.errors import quoted

logger = logging.getLogger(__name__)

_NOTHING = ("", "nan", "none", "null", "n/a", "na", "inf", "-inf", "undefined answer", "tbd", "todo")


def math_score(response: str, reference: Mapping[str, object]) -> float:
    """Return 1 if the response's final answer equals the reference's, 0 if not, or if it cannot be told within MAX_SECONDS.

    Raises:
        ValueError: the reference's answer cannot be graded.
    """
    gold_text = reference["answer"]
    gold = _gold(gold_text)
    try:
        with limited_time(MAX_SECONDS):
            return float(_is_right(gold, response))
    except TooLongError:
        logger.warning(
            "math: comparing %s with the answer %s took more than %g seconds and scores 0",
            quoted(" ".join(final_answers(response)[:1])),
            quoted(gold_text),
            MAX_SECONDS,
        )
        return 0.0
    except RecursionError:
        return 0.0


def why_ungradable(gold: str) -> str | None:
    """Say why no answer could be compared reliably with this gold one, and what to do; None for one that can be graded."""
    if has_different_boxes(gold):
        return "has several boxes with different answers; leave one"
    text = given_answer(gold)
    if words_of(tidy(text)) in _NOTHING or not re.search(r"\w|\\infty|∞|\\emptyset|\\varnothing", text):
        return "is no answer; write one, or leave the row out"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters; give the final answer alone, or behind ####"
    if "\n" in text:
        return "has several lines and no \\boxed{} or ####; give the final answer alone"
    try:
        with limited_time(5 * MAX_SECONDS):
            answer = read_answer(text)
            if is_prose(answer):
                return "is a sentence, which responses cannot be compared with; give the final answer alone, or behind ####"
            if isinstance(answer, Words) and not is_balanced(tidy(text)):
                return "has brackets that do not match; correct it"
            if not is_readable(answer):
                return "cannot be read as mathematics; rewrite it, put words in \\text{}, or score the row by type: exact"
    except (TooLongError, RecursionError):
        return "takes too long to read as mathematics; simplify it, or leave the row out"
    return None


@lru_cache(maxsize=4096)
def _gold(text: str) -> Answer:
    if reason := why_ungradable(text):
        raise ValueError(f"the reference answer {quoted(text)} {reason}")
    return read_answer(given_answer(text))


def _is_right(gold: Answer, response: str) -> bool:
    candidates = final_answers(response)
    if isinstance(gold, Words):
        return any(equal(gold, read_answer(candidate)) for candidate in candidates)
    for candidate in candidates:
        answer = read_answer(candidate)
        # of a sentence the next candidate is the number in it; a box that holds one is the only candidate
        if not isinstance(answer, Words) and is_readable(answer):
            return equal(gold, answer)
    return False
