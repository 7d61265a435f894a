"""Answers found in responses, and compared: values by hand, and from the rules of SQuAD's evaluate-v1.1.py, written again here."""

import collections
import random
import re
import string

import pytest

from megarl.builtin.scorers.document_qa import (
    DocumentQAScorer,
    VerdictReader,
    contains,
    exact_match,
    gold_answers,
    normalise,
    token_f1,
)

pytestmark = pytest.mark.timeout(60)


def scorer(*match, extract=None, pattern=None):
    return DocumentQAScorer(pattern=pattern, extract=extract, match=list(match)).build(None)


def squad_normalise(text):
    """Steps of SQuAD's normalize_answer: lower, remove punctuation, remove articles, fix white space."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(prediction, truth):
    prediction, truth = squad_normalise(prediction).split(), squad_normalise(truth).split()
    common = sum((collections.Counter(prediction) & collections.Counter(truth)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(truth)
    return 2 * precision * recall / (precision + recall)


NORMALISED = [
    ("The  Eiffel Tower!", "eiffel tower"),
    ("an apple, a day", "apple day"),
    ("O'Neil-Smith", "oneilsmith"),
    ("Theatre and analysis", "theatre and analysis"),
    ("$1,234.50", "123450"),
    ("“L’été” – 1990–95", "lété 199095"),
    ("STRASSE", "strasse"),
    ("Straße", "strasse"),
    ("１２ ｋｍ", "12 km"),
    ("e\u0301te\u0301", "\u00e9t\u00e9"),
    ("a\u00a0cat\u2003sat", "cat sat"),
    ("東京。", "東京"),
    ("(A)", "a"),
    ("the", "the"),
    ("+", "+"),
    (" \n", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1", "substring"),
    [
        ("Paris.", "paris", 1, 1.0, 1),
        ("in Paris, France", "Paris", 0, 2 * (1 / 3) / (4 / 3), 1),  # precision 1/3, recall 1
        ("the cat sat on the mat", "a cat on a mat", 0, 2 * 3 / (4 + 3), 0),  # cat sat on mat / cat on mat
        ("new new york", "new york city", 0, 2 * 2 / (3 + 3), 0),  # the second "new" finds no partner
        ("14", "4", 0, 0.0, 0),
        ("4 or 5", "4", 0, 0.5, 1),
        ("London", "Paris", 0, 0.0, 0),
        ("Paris", "Paris in France", 0, 0.5, 0),  # 2 · 1 / (1 + 3); a part of the gold answer does not contain it
        ("B", "A", 0, 0.0, 0),
        ("the", "A", 0, 0.0, 0),
        ("他住在东京", "东京", 0, 2 * 2 / (5 + 2), 1),
        ("東京都", "京東", 0, 2 * 2 / (3 + 2), 0),
    ],
)
def test_comparisons_by_hand(answer, gold, exact, f1, substring):
    assert exact_match(answer, gold) == exact
    assert token_f1(answer, gold) == pytest.approx(f1, abs=1e-12)
    assert contains(answer, gold) == substring


def test_ascii_texts_are_compared_as_squad_does():
    random_numbers = random.Random(3)
    words = ["the", "A", "cat", "Cat's", "an", "1,000", "(dog)", "U.S.", "on", "theme", "-", "mat!"]
    for _ in range(500):
        answer, gold = (" ".join(random_numbers.choices(words, k=random_numbers.randint(1, 6))) for _ in range(2))
        if squad_normalise(answer) and squad_normalise(gold):
            assert normalise(answer) == squad_normalise(answer)
            assert exact_match(answer, gold) == (squad_normalise(answer) == squad_normalise(gold))
            assert token_f1(answer, gold) == pytest.approx(squad_f1(answer, gold), abs=1e-12)


@pytest.mark.parametrize(
    ("extract", "response", "answer"),
    [
        ("the_answer_is", "So the answer is Rome. Wait. Therefore, **The answer is:** Paris\nDone.", "Paris"),
        ("the_answer_is", "The answer is:\n\n  the city of Paris.", "the city of Paris."),
        ("the_answer_is", "the answer is $\\boxed{\\text{Paris}}$.", "Paris"),
        ("the_answer_is", "<think>the answer is Rome</think> I do not know", None),
        ("the_answer_is", "<think>hm</think> the answer is 7", "7"),
        ("the_answer_is", "the answer is", None),
        ("the_answer_is", "Paris", None),
        ("boxed", "\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("boxed", "\\boxed{1} then \\boxed{2", "1"),
        ("boxed", "\\boxed{a \\boxed{b}", "b"),
        ("boxed", "{1}", None),
        ("boxed", "\\boxed{ }", None),
        ("answer_tag", "<answer>a</answer> no, <answer>\nb </answer>", "b"),
        ("answer_tag", "<answer>a</answer> <answer>b", "a"),
        ("answer_tag", "a</answer>", None),
        ("answer_tag", "<answer></answer>", None),
        (None, "  Paris ", "Paris"),
        (None, "  ", None),
    ],
)
def test_answers_are_found(extract, response, answer):
    found = scorer(extract=extract)(response, {"answer": "x"})
    assert found.answer == answer
    assert found.score == 0


def test_pattern_takes_its_first_group():
    score = scorer(pattern=r"A: (\w+)|none")
    assert (score("A: Rome. A: x", {"answer": "rome"}).score, score("none", {"answer": "none"}).answer) == (1, None)


def test_best_comparison_with_any_gold_answer_counts():
    reference = {"answer": "no", "answers": ["Charles Dickens", "Dickens, Charles John Huffam"]}
    assert scorer()("Dickens", reference).score == 0
    assert scorer("f1")("Dickens", reference).score == pytest.approx(2 / 3)
    assert scorer("exact", "f1", "substring")("by Charles Dickens", reference).score == 1
    assert scorer("exact", "f1")("no", reference).score == 0
    assert scorer()("No!", {"answer": "no"}).score == 1


@pytest.mark.parametrize("answers", [[], ["a", " "], "Paris", [3]])
def test_bad_gold_answers_are_failures(answers):
    with pytest.raises(ValueError, match=r"the prompt('s answers are| has the answer)"):
        gold_answers({"answer": "a", "answers": answers})


def test_verdicts():
    verdict = VerdictReader(pattern=r"\[\[(\w+)\]\]", positive="YES").build(None)
    assert verdict("It said [[NO]], but [[yes]]", {}) == 1
    assert verdict("[[YES]] or [[NO]]: [[NO]]", {}) == 0
    with pytest.raises(ValueError, match="no verdict"):
        verdict("I think so", {})


def test_a_pattern_without_group_is_refused():
    (line,) = DocumentQAScorer(pattern="Answer").mistakes()
    assert line.startswith("pattern: 'Answer' has no group")


@pytest.mark.parametrize("text", ["\\boxed{" * 200_000, "<answer>" * 200_000, "the answer is " * 200_000, "a, " * 400_000])
def test_long_hostile_responses_take_no_long_time(text):
    for extract in ("the_answer_is", "boxed", "answer_tag"):
        assert scorer("exact", "f1", "substring", extract=extract)(text, {"answer": "a b c"}).score < 1
