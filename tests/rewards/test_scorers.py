import pytest
import reasoning_gym

from megarl.builtin.scorers import ReasoningGymScorer
from megarl.config.schema import RewardsConfig
from megarl.errors import ConfigError
from megarl.rewards.combine import RewardScorer
from megarl.workers.limits import isolated


def scorer(type, pattern=None, **fields):
    given = {} if pattern is None else {"pattern": pattern}
    (section,) = RewardsConfig.model_validate({"scorers": [{"type": type, **given, **fields}]}).scorers
    return section.build(None)


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [("  New\n York ", "new york", 1), ("ẞ", "SS", 1), ("NewYork", "new york", 0), ("", "4", 0), ("4.0", "4", 0)],
)
def test_exact(response, answer, score):
    assert scorer("exact")(response, {"answer": answer}) == score


def test_exact_extracts_the_first_group():
    score = scorer("exact", r"Answer:\s*(\S+)|none")
    assert score("12 or so. Answer: 7", {"answer": "7"}) == 1
    assert score("7", {"answer": "7"}) == 0
    assert score("none", {"answer": "None"}) == 0


def test_regex():
    score = scorer("regex", r"^<think>.*</think>")
    assert score("<think>x</think> 4", {}) == 1
    assert score("4 <think>x</think>", {}) == 0


EQUAL = [
    ("72", "72"),
    ("The answer is 72.", "72"),
    ("1,234", "1234"),
    ("0.5", "\\frac{1}{2}"),
    ("so it is $\\frac{2}{4}$", "1/2"),
    ("First 3, then \\boxed{\\dfrac{1}{2}}.", "0.5"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("$(x+1)^2$", "x^2 + 2x + 1"),
    ("(1, 2)", "(1,2)"),
    ("$\\{1, 2, 3\\}$", "\\{3, 2, 1\\}"),
    ("x = 5", "5"),
    ("-4", "-4"),
    ("1e5", "100000"),
    ("2.5e-3", "0.0025"),
    ("50%", "50\\%"),
    ("2\\pi", "$2\\pi$"),
    ("10 000", "10000"),
    ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("12 apples", "12"),
]
DIFFERENT = [
    ("71", "72"),
    ("4", "-4"),
    ("$\\frac{1}{3}$", "\\frac{1}{2}"),
    ("1", "\\frac{1}{2}"),
    ("(1, 3)", "(1, 2)"),
    ("2", "(1, 2)"),
    ("2", "2\\pi"),
    ("x+1", "x^2 + 2x + 1"),
    ("1e6", "100000"),
    ("I do not know", "3"),
    ("", "3"),
]


@pytest.fixture(scope="module")
def math():
    return scorer("math")


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_math_equal(math, response, answer):
    assert math(response, {"answer": answer}) == 1


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_math_different(math, response, answer):
    assert math(response, {"answer": answer}) == 0


def test_math_extracts_the_first_group_and_refuses_a_bad_reference(math):
    score = scorer("math", r"<answer>(.*?)</answer>")
    assert score("3 <answer>\\frac{1}{2}</answer> 4", {"answer": "0.5"}) == 1
    assert score("0.5", {"answer": "0.5"}) == 0
    with pytest.raises(ValueError, match="is no answer"):
        math("3", {"answer": ""})


@pytest.mark.parametrize(
    "task", ["chain_sum", "basic_arithmetic", "gcd", "spell_backward", "decimal_arithmetic", "countdown", "leg_counting"]
)
def test_reasoning_gym_own_answers_score_one_and_wrong_ones_less(task):
    # countdown executes answers; these are harmless
    score = ReasoningGymScorer().build(isolated)
    for entry in reasoning_gym.create_dataset(task, size=5, seed=7):
        reference = {"answer": entry["answer"], "task": task, "options": {}, "entry": entry}
        assert score(f"  {entry['answer']}\n", reference) == 1
        assert score("nothing at all", reference) < 1


def test_reasoning_gym_scores_by_the_tasks_options():
    loose, tight = ({"precision": 12, "max_num_decimal_places": places} for places in (1, 6))
    entry = {"question": "", "answer": "1.05", "metadata": {}}
    score = scorer("reasoning_gym")
    scores = [
        score("1.0", {"answer": "1.05", "task": "decimal_arithmetic", "options": options, "entry": entry})
        for options in (loose, tight)
    ]
    assert scores[0] == 1
    assert scores[1] < 1


def test_reasoning_gym_needs_its_own_rows():
    with pytest.raises(ValueError, match="not of a reasoning_gym source"):
        scorer("reasoning_gym")("4", {"answer": "4"})


@pytest.mark.parametrize(
    ("type", "fields", "expected"),
    [
        ("exact", {"pattern": "("}, "is not a regular expression"),
        ("math", {"pattern": "Answer: .*"}, "has no group"),
        ("python", {"function": "math.sqrt"}, "is not module:function"),
        ("python", {"function": "no_such_module:f"}, "No module named 'no_such_module'"),
        ("python", {"function": "math:root"}, "has no attribute 'root'"),
        ("python", {"function": "math:pi"}, "is a float, not a function"),
    ],
)
def test_wrong_scorers_are_one_line(type, fields, expected):
    with pytest.raises(ConfigError) as error:
        RewardScorer(RewardsConfig.model_validate({"scorers": [{"type": type, **fields}]}), {}, str)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>2 + 2\n= 4</think>\n<answer>4</answer>", 1.0),
        (" <think></think><answer>4</answer>\n", 1.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a<think>b</think></think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("<think>a < b, <b>bold</b></think><answer>4</answer>", 1.0),
        ("", 0.0),
    ],
)
def test_format_wants_every_section_once_and_nothing_else(response, score):
    assert scorer("format", tags=["think", "answer"])(response, {}) == score


def test_format_by_a_pattern_is_of_the_whole_response():
    whole = scorer("format", r"Answer: .+")
    assert [whole(text, {}) for text in ("Answer: 4", "Answer: 4\n\nor 5", "The Answer: 4", "Answer: ")] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("response", "ngram", "score"),
    [
        ("a b a b a b", 2, -(1 - 2 / 5)),  # ab, ba, ab, ba, ab
        ("a b a b a b", 3, -(1 - 2 / 4)),
        ("No no NO", 1, -(1 - 1 / 3)),
        ("one two three", 2, 0.0),
        ("one two", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_by_hand(response, ngram, score):
    assert scorer("repetition", ngram=ngram)(response, {}) == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "script", "score"),
    [
        ("The sum is 4.", "latin", 1.0),
        ("Die Lösung: x² − 3", "latin", 1.0),
        ("das heißt привет", "latin", 2 / 3),
        ("das heißt привет", "cyrillic", 1 / 3),
        ("答案 is 四", "chinese", 3 / 4),
        ("答えは四です", "japanese", 1.0),
        ("答えは四です", "chinese", 2 / 6),
        ("정답은 four 입니다", "korean", 2 / 3),
        ("नमस्ते दुनिया", "devanagari", 1.0),
        ("e\u0301te\u0301", "latin", 1.0),
        ("Ｆｕｌｌ 𝑥 = 3", "latin", 1.0),
        ("1 + 2 = 3", "greek", 1.0),
        ("", "thai", 1.0),
    ],
)
def test_language_by_hand(response, script, score):
    assert scorer("language", script=script)(response, {}) == pytest.approx(score)
