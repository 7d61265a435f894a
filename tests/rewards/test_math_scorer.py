"""The math scorer: gold answers and equivalent forms, where an answer stands in a response, and bounded time for hostile ones."""

import random
import time

import pytest

from math_cases import GOLDS
from megarl.builtin.mathematics.score import why_ungradable
from megarl.builtin.scorers import MathScorer


@pytest.fixture(scope="module")
def math():
    return MathScorer().build(None)


@pytest.mark.parametrize(("gold", "right", "wrong"), GOLDS, ids=[gold for gold, _, _ in GOLDS])
def test_gold_answers(math, gold, right, wrong):
    assert why_ungradable(gold) is None
    score = {answer: math(f"So it is \\boxed{{{answer}}}.", {"answer": gold}) for answer in [gold, *right, *wrong]}
    assert score == dict.fromkeys([gold, *right], 1.0) | dict.fromkeys(wrong, 0.0)


PLACES = [
    ("<think>\\boxed{5}</think> The answer is 7.", "7", 1),
    ("<think>\\boxed{5}</think> Done.", "5", 0),
    ("It is \\boxed{5}, or not.</think>\n\\boxed{7}", "7", 1),  # the opening tag is in the prompt
    ("It is \\boxed{5}.</think>\nDone.", "5", 0),
    ("<think>It is \\boxed{7}.", "7", 0),
    ("\\boxed{7}<think>Is it \\boxed{8}?", "7", 1),
    ("First \\boxed{5}. No: \\boxed{7}.", "5", 0),
    ("\\boxed{7} Now \\boxed{", "7", 0),
    ("\\boxed{7} Now \\boxed{\\frac{1}{2}", "7", 0),
    ("\\boxed{7} Now \\boxed{}", "7", 0),
    ("\\boxed 7", "7", 1),
    ("$$\\fbox{7}$$", "7", 1),
    ("\\boxed{\\left\\{ 1, 2 \\right\\}}", "\\{1,2\\}", 1),
    ("\\boxed{12}. Others say the answer is 13.", "12", 1),
    ("<answer>5</answer> or rather <answer>7</answer>", "7", 1),
    ("<answer>5</answer> or rather <answer>7", "5", 0),
    ("<answer></answer>", "7", 0),
    ("9*2=18\n#### 18", "18", 1),
    ("**Final Answer:** 73", "73", 1),
    ("**Final Answer**\n\n$x = 73$", "73", 1),
    ("The final answer is $\\frac{3}{4}$. I hope it is correct.", "0.75", 1),
    ("The answer is 2, not 18.", "18", 0),
    ("The answer is 18 dollars because 9 times 2 is 18.", "18", 1),
    ("The answer is 5. No wait, the answer is 7.", "7", 1),
    ("The answer is 5. No wait, the answer is 7.", "5", 0),
    ("The answer is:\n$$\n\\frac{1}{2}\n$$", "0.5", 1),
    ("**Answer**: Evelyn", "\\text{Evelyn}", 1),
    ("The solutions are $x=2$ and $x=3$.", "2,3", 1),
    ("The answer is $2$, since $3$ fails.", "3", 0),
    ("The answer is $(3, 4)$.", "(3,4)", 1),
    ("The correct answer is (B) 14.", "B", 1),
    ("答案是18。", "18", 1),
    ("First 3.\nThen 4.\nShe has 3 + 4 = 7 eggs.", "7", 1),
    ("She pays $5 + $13 = $18", "18", 1),
    ("So it is 7.\nHope this helps!", "7", 1),
    ("She has 16 - 9.\n#### 7", "7", 1),
    ("", "7", 0),
]


@pytest.mark.parametrize(("response", "gold", "score"), PLACES)
def test_where_the_answer_stands(math, response, gold, score):
    assert math(response, {"answer": gold}) == score


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("", "is no answer"),
        (" \n", "is no answer"),
        ("NaN", "is no answer"),
        ("None", "is no answer"),
        ("?", "is no answer"),
        ("\\boxed{}", "is no answer"),
        ("9 * 2 = 18\n#### ", "is no answer"),
        ("\\frac{3}{4", "brackets that do not match"),
        ("(3,4", "brackets that do not match"),
        ("He has 9 eggs and sells all of them for 18", "is a sentence"),
        ("18\n19", "several lines"),
        ("\\boxed{5} or \\boxed{7}", "several boxes"),
        ("12 +", "cannot be read"),
        ("x \\equiv 3 \\pmod{7}", "cannot be read"),
        ("9^{9^{9}}", "cannot be read"),
        ("\\int_0^1 x dx", "cannot be read"),
        ("4" * 1001, "has 1001 characters"),
    ],
)
def test_gold_answers_that_nothing_can_be_compared_with(math, gold, reason):
    assert reason in why_ungradable(gold)
    with pytest.raises(ValueError, match=reason) as error:
        math("7", {"answer": gold})
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def _hostile():
    draw = random.Random(1)
    noise = "".join(draw.choice("\\{}$()[]0123x ,.=^_abc") for _ in range(100_000))
    texts = ["(" * 4000, "7." * 50_000, "\\frac{" * 20_000, "{" * 100_000, "\\boxed{" * 14_000, "\\boxed{" * 7000 + "}" * 7000]
    texts += [
        "the quick brown fox " * 5000,
        "9" * 100_000,
        "$" * 100_000,
        "$ x " * 25_000,
        "the answer is " * 7000,
        "answer " * 14_000,
    ]
    texts += [
        "<think>" * 14_000,
        "<think></think>" * 6000,
        "<answer>" * 12_000,
        "1," * 50_000,
        "\n" * 100_000,
        "\\" * 100_000,
        noise,
    ]
    boxed = ["10^{10^{10}}", "9^{9^{9}}", "9**9**9", "((((9!)!)!)!)!", "1000000000!", "\\binom{1000000000}{500000000}", "9" * 900]
    boxed += [
        "(" * 30 + "1" + ")" * 30,
        "\\sqrt{" * 30 + "2" + "}" * 30,
        "\\frac{1}{" * 40 + "2" + "}" * 40,
        "1.5^{99999999}",
        "|" * 200,
    ]
    boxed += [
        "(x+1)^{1000000}",
        "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{1000000000}",
        "\\sum_{i=1}^{1000000000} 2^i",
        "\\log_{10}(10^{10^8})",
    ]
    boxed += [
        "1e999999999",
        "\\frac{1}{0}",
        "e^{e^{e^{e^9}}}",
        "7^{99999999} \\mod 13",
        "\\gcd(10^{9999999},3)",
        "1+" * 150 + "1",
        "-" * 500,
    ]
    boxed += [
        "__import__('os').system('touch hostile')",
        "\ud83d",
        "\x007",
        "\\int_0^1 \\sin(\\cos(x^x)) dx",
        "\\prod_{i=1}^{10^9} i",
    ]
    return texts + [f"\\boxed{{{text}}}" for text in boxed]


@pytest.mark.parametrize("gold", ["7", "\\frac{x+1}{2}", "(1,2)"])
def test_hostile_responses_score_zero_in_bounded_time(math, gold):
    math("\\boxed{\\frac{x}{2}}", {"answer": "x+1"})  # libraries are imported
    for response in _hostile():
        begin = time.process_time()
        assert math(response, {"answer": gold}) == 0, response[:60]
        assert time.process_time() - begin < 1.5, response[:60]
