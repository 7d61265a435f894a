"""Synthetic documents: same seed same rows, lengths as asked, and answers that follow from all of the evidence, nothing less."""

import json
import re

import pytest

from scripts import load_script, refusal, run_script

pytestmark = pytest.mark.timeout(120)
SCRIPT = load_script("examples/long_context_laptop/make_documents.py")
SETTINGS = {"min-tokens": 500, "max-tokens": 900, "size": 12, "template": "{prompt} A: "}


@pytest.fixture
def make(tokenizer, tmp_path):
    def rows(*hops, **changes):
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        settings = {**SETTINGS, "tokenizer": tokenizer.name_or_path, **changes}
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        arguments += [part for one in hops for part in ("--hops", one)]
        assert run_script(SCRIPT, tmp_path / "out.jsonl", *arguments) == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return rows


def possible_answers(text, question):
    """All codes that the question could mean, given the text: a reader of our own, who knows the two kinds of facts.

    A person of whom the text does not say whom they follow may follow anybody whom nobody follows yet.
    """
    follows = dict(re.findall(r"(\w+) follows (\w+)\.", text))
    codes = dict(re.findall(r"The code of (\w+) is (\d+)\.", text))
    name = re.search(r"What is the code of (\w+)\?|Start at (\w+) ", question)
    steps = re.search(r"move (?:once|(\d+) times)", question)
    people = {name[1] or name[2]}
    for _ in range(0 if steps is None else int(steps[1] or 1)):
        free = set(codes) - set(follows.values())
        people = {other for one in people for other in ([follows[one]] if one in follows else free - {one})}
    return {codes.get(one) for one in people}


def test_rows_depend_on_the_seed_only(make):
    first, again, fewer, other = make(1, 3), make(1, 3), make(1, 3, size=5), make(1, 3, seed=1)
    assert first == again
    assert fewer == first[:5]
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in other}
    assert len({row["prompt"] for row in first}) == len(first) == 12


def test_fields_and_lengths(make, tokenizer):
    rows = make(1, 2, size=40)
    for row in rows:
        assert row["prompt"] == f"{row['documents'][0]}\n{row['question']}"
        assert row["answers"] == [row["answer"]]
        assert row["length"] == len((row["prompt"] + " A: ").encode())  # the tokenizer's tokens are bytes
        assert 500 <= row["length"] <= 900
    lengths = [row["length"] for row in rows]
    assert min(lengths) < 600
    assert max(lengths) > 800
    assert [row["task"] for row in rows[:4]] == ["needle", "multi_hop", "needle", "multi_hop"]


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_the_answer_follows_from_all_of_the_evidence_and_nothing_less(make, hops):
    for row in make(hops, max_tokens=1500):
        text = row["documents"][0]
        assert len(row["evidence"]) == row["hops"] == hops
        assert text.count(row["answer"]) == 1
        assert possible_answers(text, row["question"]) == {row["answer"]}
        for fact in row["evidence"]:
            assert text.count(fact) == 1
            left = possible_answers(text.replace(fact, ""), row["question"])
            assert left == {None} or len(left) > 1, fact  # no code, or several that could be it


def test_evidence_is_spread_and_needles_are_everywhere(make):
    depths = []
    for row in make(1, 3, size=60, max_tokens=1500):
        text = row["documents"][0]
        locations = sorted(text.index(fact) / len(text) for fact in row["evidence"])
        if row["hops"] == 1:
            depths += locations
        else:
            assert locations[-1] - locations[0] > 1 / 4
    assert min(depths) < 0.2
    assert max(depths) > 0.8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min-tokens": 901}, "--min-tokens 901 is above --max-tokens 900"),
        ({"hops": 9}, r"question and facts take \d+ tokens, above --max-tokens 900; raise it"),
        ({"digits": 2, "hops": 50}, "--digits 2 gives 90 codes for 150 people"),
        ({"min-tokens": 900}, r"a prompt came out at 9\d\d tokens, not 900 to 900"),
        ({"prompt": "{documents}"}, "--prompt '{documents}' has {question} 0 times"),
        ({"tokenizer": "nowhere"}, "tokenizer folder nowhere does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, tmp_path, tokenizer, settings, expected):
    settings = {**SETTINGS, "tokenizer": tokenizer.name_or_path, **settings}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert re.search(expected, refusal(capsys, SCRIPT, tmp_path / "out.jsonl", *arguments))
    assert not list(tmp_path.iterdir())
