"""Short answers to questions on documents: how they are found in a response and compared by rule.

Worker processes import this, so it stays light. Normalisation, exact match and F1 are those of SQuAD's official evaluation script
(Rajpurkar et al. 2016, arXiv 1606.05250), which knows ASCII only; for ASCII texts they give its values.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces: every character is a token
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_THE_ANSWER_IS = re.compile(r"the answer is", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True, slots=True)
class RuleScore:
    """What the rule says of a response.

    Attributes:
        score: 0 to 1.
        answer: the answer that was found in the response; None where there is none.
    """

    score: float
    answer: str | None


def document_qa_scorer(
    pattern: re.Pattern[str] | None, extract: str | None, match: Sequence[str]
) -> Callable[[str, Mapping[str, Any]], RuleScore]:
    """A scorer that finds the answer and gives the best of the chosen comparisons with any gold answer.

    Args:
        pattern: its first group is the answer.
        extract: a name in EXTRACTORS; None, without a pattern, takes the whole response.
        match: names in COMPARISONS; exact alone when empty.
    """
    extractor = EXTRACTORS[extract] if extract is not None else str.strip
    comparisons = [COMPARISONS[name] for name in match or ("exact",)]

    def score(response: str, reference: Mapping[str, Any]) -> RuleScore:
        gold = gold_answers(reference)
        if pattern is None:
            answer = extractor(response)
        else:
            found = pattern.search(response)
            answer = None if found is None or found[1] is None else found[1].strip()
        if not answer:  # a response without an answer is a wrong response, not a failed scorer
            return RuleScore(score=0.0, answer=None)
        return RuleScore(score=max(compare(answer, one) for compare in comparisons for one in gold), answer=answer)

    return score


def gold_answers(reference: Mapping[str, Any]) -> list[str]:
    """``answers`` of the prompt's row, or its one ``answer`` where it has no such list.

    Raises:
        ValueError: there is none, or one is not a text or blank.
    """
    gold = reference["answers"] if "answers" in reference else [reference["answer"]]
    if not isinstance(gold, list | tuple) or not gold:
        raise ValueError(f"the prompt's answers are {gold!r}, not a list with at least one text")
    if blank := [one for one in gold if not isinstance(one, str) or not one.strip()]:
        raise ValueError(f"the prompt has the answer {blank[0]!r}, which is no text that a response could give")
    return list(gold)


def verdict_scorer(pattern: re.Pattern[str], positive: str) -> Callable[[str, Mapping[str, Any]], float]:
    """A scorer of a judge's reply: 1 when the last verdict in it is ``positive``, 0 for any other verdict.

    It raises ValueError for a reply without a verdict.
    """

    def score(reply: str, reference: Mapping[str, Any]) -> float:
        verdicts = [found[1] for found in pattern.finditer(reply) if found[1] is not None]
        if not verdicts:
            raise ValueError(f"no verdict {pattern.pattern!r} in {reply[-200:]!r}")
        return 1.0 if verdicts[-1].strip().casefold() == positive.casefold() else 0.0

    return score


def after_the_answer_is(response: str) -> str | None:
    """What follows the last "the answer is" after any thinking, up to the end of the line, or what a box in that holds."""
    _, *tails = _THE_ANSWER_IS.split(conclusion(response))
    if not tails:
        return None
    answer = tails[-1].lstrip(" \t\n\r:*").split("\n", 1)[0].rstrip(" \t\r*")
    return in_box(answer) or answer or None


def in_box(response: str) -> str | None:
    r"""What the last closed ``\boxed{...}`` after any thinking holds, without LaTeX's marks of plain text."""
    text = conclusion(response)
    open_braces: list[int] = []  # where what they hold begins; 0 for a brace that is no box's
    begin = end = 0
    for brace in _BRACE.finditer(text):  # one pass, as a response may be a million open boxes
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[0] != "{" else 0)
        elif open_braces and (box := open_braces.pop()) > begin:
            begin, end = box, brace.start()
    return _LATEX_TEXT.sub(r"\1", text[begin:end]).strip() or None


def in_answer_tag(response: str) -> str | None:
    """What stands in the last ``<answer>...</answer>`` after any thinking."""
    before, end, _ = conclusion(response).rpartition("</answer>")
    _, begin, answer = before.rpartition("<answer>")
    return answer.strip() or None if begin and end else None


def conclusion(response: str) -> str:
    """The response after its last ``</think>``; all of it where it has none."""
    return response.rpartition(_END_OF_THOUGHT)[2]


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles (a, an, the), single spaces.

    Beyond ASCII: compatibility forms are unified (NFKC), case is folded, and all of Unicode's punctuation counts. An answer that
    consists of articles or punctuation only keeps them: the choice "A" would else be empty, and equal to "the".
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = "".join(character for character in text if not _is_punctuation(character))
    for candidate in (_ARTICLE.sub(" ", plain), plain, text):
        if words := candidate.split():
            return " ".join(words)
    return ""


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, gold: str) -> float:
    """1 if both are equal after ``normalise``."""
    return float(normalise(answer) == normalise(gold))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answer's tokens, each counted as often as it stands in both."""
    answer_tokens, gold_tokens = _TOKEN.findall(normalise(answer)), _TOKEN.findall(normalise(gold))
    num_same = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    return 2 * num_same / (len(answer_tokens) + len(gold_tokens)) if num_same else 0.0


def contains(answer: str, gold: str) -> float:
    """1 if the gold answer's tokens stand in the answer, side by side; so "4" is not in "14"."""
    answer_tokens, gold_tokens = _TOKEN.findall(normalise(answer)), _TOKEN.findall(normalise(gold))
    length = len(gold_tokens)
    return float(any(answer_tokens[start : start + length] == gold_tokens for start in range(len(answer_tokens) - length + 1)))


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "the_answer_is": after_the_answer_is,
    "boxed": in_box,
    "answer_tag": in_answer_tag,
}
COMPARISONS: Mapping[str, Callable[[str, str], float]] = {"exact": exact_match, "f1": token_f1, "substring": contains}
