"""The ``document_qa`` scorer: short answers to questions on documents, compared by rule, and by a judge where that says no.

Normalisation, exact match and F1 are those of SQuAD's official evaluation script
(Rajpurkar et al. 2016, arXiv 1606.05250), which knows ASCII only; for ASCII texts they give its values.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megarl.builtin.scorers.answers import AnswerScorer
from megarl.builtin.scorers.base import RunApart, Scorer, pattern_mistakes
from megarl.section import Section, key

PLACEHOLDERS = ("{question}", "{reference}", "{answer}")
OWN_FIELDS = ("model", "messages", "temperature", "max_tokens", "stream", "n")  # of a request; the judge needs them as they are

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


class JudgeConfig(Section):
    """A language model that judges answers, behind vLLM, SGLang or another server with the OpenAI interface; temperature 0."""

    url: str = key(..., "URL", "The server's address up to its version, e.g. http://judge:8000/v1.")
    api_key_env: str | None = key(
        None,
        "environment variable",
        "Holds the server's key, which is sent as Authorization: Bearer; no key when not given.",
    )
    model: str = key(..., "-", "The model's name at the server.")
    prompt: str = key(
        "Question: {question}\n\nCorrect answer: {reference}\n\nGiven answer: {answer}\n\nDo the two answers mean the same? Do not "
        "answer the question yourself. Say briefly why, and end with [[YES]] or [[NO]].",
        "-",
        "What it is asked, with {question}, {reference} (the gold answers) and {answer} (the response's) in it, never documents.",
    )
    verdict: str = key(r"\[\[(\w+)\]\]", "regular expression", "The first group of its last match in the reply is the verdict.")
    positive: str = key("YES", "-", "The verdict, in any case, that scores 1; any other scores 0.", min_length=1)
    max_tokens: int = key(512, "tokens", "Longest reply; one that is cut is a failure.", ge=1)
    max_answer_characters: int = key(2000, "characters", "A longer answer is not shown to the judge and scores 0 with it.", ge=1)
    timeout: float = key(60.0, "seconds", "Time that one request may take.", gt=0)
    retries: int = key(4, "retries", "How often a judge that is away, late or overloaded is asked again.", ge=0, le=20)
    retry_delay: float = key(1.0, "seconds", "Wait before the first retry; it doubles with each one.", ge=0)
    arguments: dict[str, Any] = key(
        dict, "-", "More fields of the request under the server's names, e.g. chat_template_kwargs: {enable_thinking: false}."
    )

    @property
    def longest_wait(self) -> float:
        """Seconds that all requests about one answer and the waits between them may take."""
        return self.timeout * (self.retries + 1) + self.retry_delay * (2**self.retries - 1)

    def mistakes(self) -> Iterator[str]:
        """Yield one line for each mistake, beginning with the key."""
        for placeholder in PLACEHOLDERS:
            if placeholder not in self.prompt:
                yield f"prompt: {self.prompt[:60]!r}... has no {placeholder}; add it, as the judge sees nothing else"
        yield from pattern_mistakes("verdict", self.verdict, "verdict")
        for name in OWN_FIELDS:
            if name in self.arguments:
                yield f"arguments.{name}: is set by MegaRL; remove it"


class DocumentQAScorer(AnswerScorer):
    """The best of the chosen comparisons of the answer with any of the row's answers; a judge may score it higher."""

    type: Literal["document_qa"] = key("document_qa", "-", "Compares short answers.")
    extract: Literal["the_answer_is", "boxed", "answer_tag"] | None = key(
        None,
        "-",
        "In place of a pattern: the answer follows the last 'the answer is', or stands in the last \\boxed{} or "
        "<answer></answer>; the whole response when neither is given.",
    )
    match: list[Literal["exact", "f1", "substring"]] = key(
        list,
        "-",
        "The best of these counts, after SQuAD's normalisation: equal texts, F1 of tokens, gold answer within the answer; exact "
        "alone when empty.",
    )
    judge: JudgeConfig | None = key(
        None, "-", "Judges answers that do not score 1 by the rule; the higher score counts. No judge when not given."
    )

    def log_names(self) -> tuple[str, ...]:
        """Return the score, and its two parts."""
        return (self.log_name, f"{self.log_name}_rule", f"{self.log_name}_judge")

    def key_variables(self) -> Iterator[tuple[str, str | None]]:
        """Yield the key that names a server's environment variable, and its value."""
        if self.judge is not None:
            yield "judge.api_key_env", self.judge.api_key_env

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        if self.extract is not None and self.pattern is not None:
            yield f"extract: {self.extract} is given beside pattern {self.pattern!r}, and both find the answer; remove one of them"
        if "substring" in self.match and self.extract is None and self.pattern is None:
            yield (
                "match: substring over the whole response gives 1 to one that repeats the document; set extract, for example to "
                "the_answer_is, or remove substring"
            )
        if self.judge is not None:
            yield from (f"judge.{line}" for line in self.judge.mistakes())
        yield from super().mistakes()

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer by rule, which gives a RuleScore; its judge is asked outside the workers."""
        extractor = EXTRACTORS[self.extract] if self.extract is not None else str.strip
        comparisons = [COMPARISONS[name] for name in self.match or ("exact",)]
        pattern = None if self.pattern is None else re.compile(self.pattern)

        def score(response: str, reference: Mapping[str, object]) -> RuleScore:
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

    def compared_with(self, reference: Mapping[str, object]) -> list[Any]:
        """Return what ``why_refused`` looks at in a row, and its name there."""
        name = "answers" if "answers" in reference else "answer"
        return [name, reference[name]]

    @staticmethod
    def why_refused(*values: Any) -> str | None:
        """Say why no response can be compared with the row's answer; None where one can."""
        try:
            gold_answers({values[0]: values[1]})
        except ValueError as error:
            return f"{error}; write one, or leave the row out"
        return None


@dataclass(frozen=True, slots=True)
class VerdictReader:
    """What a worker process is told of a judge, whose replies it reads.

    Attributes:
        pattern: its first group is the verdict.
        positive: the verdict that scores 1.
    """

    pattern: str
    positive: str

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer of a reply: 1 when its last verdict is ``positive``, else 0; it raises ValueError where there is none."""
        pattern = re.compile(self.pattern)

        def score(reply: str, reference: Mapping[str, object]) -> float:
            verdicts = [found[1] for found in pattern.finditer(reply) if found[1] is not None]
            if not verdicts:
                raise ValueError(f"no verdict {pattern.pattern!r} in {reply[-200:]!r}")
            return 1.0 if verdicts[-1].strip().casefold() == self.positive.casefold() else 0.0

        return score


def gold_answers(reference: Mapping[str, object]) -> list[str]:
    """Return ``answers`` of the prompt's row, or its one ``answer`` where it has no such list.

    Raises:
        ValueError: there is none, or one is not a text or blank.
    """
    gold = reference["answers"] if "answers" in reference else [reference["answer"]]
    if not isinstance(gold, list | tuple) or not gold:
        raise ValueError(f"the prompt's answers are {gold!r}, not a list with at least one text")
    if blank := [one for one in gold if not isinstance(one, str) or not one.strip()]:
        raise ValueError(f"the prompt has the answer {blank[0]!r}, which is no text that a response could give")
    return list(gold)


def after_the_answer_is(response: str) -> str | None:
    """Return what follows the last "the answer is" after any thinking, up to the end of the line, or what a box in that holds."""
    _, *tails = _THE_ANSWER_IS.split(conclusion(response))
    if not tails:
        return None
    answer = tails[-1].lstrip(" \t\n\r:*").split("\n", 1)[0].rstrip(" \t\r*")
    return in_box(answer) or answer or None


def in_box(response: str) -> str | None:
    r"""Return what the last closed ``\boxed{...}`` after any thinking holds, without LaTeX's marks of plain text."""
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
    """Return what stands in the last ``<answer>...</answer>`` after any thinking."""
    before, end, _ = conclusion(response).rpartition("</answer>")
    _, begin, answer = before.rpartition("<answer>")
    return answer.strip() or None if begin and end else None


def conclusion(response: str) -> str:
    """Return the response after its last ``</think>``; all of it where it has none."""
    return response.rpartition(_END_OF_THOUGHT)[2]


def normalise(text: str) -> str:
    """Apply SQuAD's normalisation: lower case, no punctuation, no articles (a, an, the), single spaces.

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
    """Return 1 if both are equal after ``normalise``."""
    return float(normalise(answer) == normalise(gold))


def token_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's tokens, each counted as often as it stands in both."""
    answer_tokens, gold_tokens = _TOKEN.findall(normalise(answer)), _TOKEN.findall(normalise(gold))
    num_same = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    return 2 * num_same / (len(answer_tokens) + len(gold_tokens)) if num_same else 0.0


def contains(answer: str, gold: str) -> float:
    """Return 1 if the gold answer's tokens stand in the answer, side by side; so "4" is not in "14"."""
    answer_tokens, gold_tokens = _TOKEN.findall(normalise(answer)), _TOKEN.findall(normalise(gold))
    length = len(gold_tokens)
    return float(any(answer_tokens[start : start + length] == gold_tokens for start in range(len(answer_tokens) - length + 1)))


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "the_answer_is": after_the_answer_is,
    "boxed": in_box,
    "answer_tag": in_answer_tag,
}
COMPARISONS: Mapping[str, Callable[[str, str], float]] = {"exact": exact_match, "f1": token_f1, "substring": contains}
