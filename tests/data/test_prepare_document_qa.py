"""Preparing document question answering sets: every kind of source, lengths, cuts in the middle, bad rows."""

import json
import re
from xml.etree import ElementTree

import datasets
import pytest

from megarl.data.document_qa import MARK
from scripts import load_script, refusal, run_script

pytestmark = pytest.mark.timeout(120)
SCRIPT = load_script("tools/prepare_document_qa.py")
GOOD = {"documents": "Paris is in France.", "question": "Where is Paris?", "answers": ["France"]}
BARE = ("--prompt", "{documents}?{question}", "--template", "{prompt}")  # one token a byte and nothing around it


@pytest.fixture
def source(tmp_path):
    def write(*rows):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def rows(source, *arguments):
        out = tmp_path / "out.jsonl"
        assert run_script(SCRIPT, source, out, "--tokenizer", tokenizer.name_or_path, *arguments) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return rows


def of_length(length):
    """A row whose prompt has so many tokens under BARE."""
    return {**GOOD, "documents": "d" * (length - len("?" + GOOD["question"]))}


def test_rows_of_every_source(source, prepare, tmp_path):
    gold = [{"text": ["a", "b", "a"]}, {"text": ["c"]}]
    columns = {"context": [["One.", "Two."], ["Three."]], "query": ["How?", "Who?"], "gold": gold}
    data = datasets.Dataset.from_dict(columns)
    data.save_to_disk(tmp_path / "saved")
    names = ("--documents-field", "context", "--question-field", "query", "--answers-field", "gold")
    first, second = prepare(tmp_path / "saved", *names, *BARE)
    assert first == {
        "prompt": "One.\n\nTwo.?How?",
        "answer": "a",
        "documents": ["One.", "Two."],
        "question": "How?",
        "answers": ["a", "b"],
        "length": len("One.\n\nTwo.?How?"),
    }
    assert second["answers"] == ["c"]
    assert [row["answers"] for row in prepare(source({**GOOD, "answers": 7}, {**GOOD, "answers": "x"}))] == [["7"], ["x"]]


def test_length_is_that_of_the_whole_template(source, prepare, tokenizer):
    (row,) = prepare(source(GOOD))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False)
    assert row["length"] == len(chat.encode()) > len(row["prompt"])
    assert GOOD["documents"] in row["prompt"]


def test_table_stages_and_rows_left_out(source, prepare, capsys, tmp_path):
    lengths = [100, 200, 300, 400, 1000]
    rows = prepare(source(*map(of_length, lengths)), *BARE, "--stage", "50-200", "--stage", "300-500")
    assert [row["length"] for row in rows] == lengths[:-1]
    printed = capsys.readouterr().out
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines())
    table = {first: rest for first, *rest in cells}
    assert table["rows"] == ["5", "4"]
    assert table["min"] == ["100", "100"]
    assert table["25%"] == ["200", "175"]  # linear between the ranks: 100 + 0.75 · 100
    assert table["median"] == ["300", "250"]
    assert table["75%"] == ["400", "325"]
    assert table["95%"] == ["880", "385"]  # 400 + 0.8 · 600, 300 + 0.85 · 100
    assert table["max"] == ["1000", "400"]
    assert table["1: 50 to 200 tokens"] == ["2", "2"]
    assert table["2: 300 to 500 tokens"] == ["2", "2"]
    assert table["in no stage"] == ["1", "0"]
    assert re.search(r"too long, left out: \S+in.jsonl:5: 1000 tokens, above 500", printed)
    left_out = [json.loads(line) for line in (tmp_path / "out.jsonl.too_long.jsonl").read_text().splitlines()]
    assert left_out == [{"row": f"{tmp_path}/in.jsonl:5", "length": 1000}]
    prepare(source(of_length(30)), *BARE)
    assert not (tmp_path / "out.jsonl.too_long.jsonl").exists()


def test_middle_out_keeps_head_and_tail(source, prepare, capsys):
    document = "".join(f"<{number}>" for number in range(1000))
    halves = [document[:2000], document[2000:]]
    rows = [{**GOOD, "documents": halves, "answers": answer} for answer in ("<0>", "<500>", "?")]
    result = prepare(source(*rows, GOOD), *BARE, "--max-tokens", 300, "--truncate", "middle_out")
    for row in result[:3]:
        (text,) = row["documents"]
        head, tail = text.split(MARK)
        assert document.startswith(head)
        assert document.endswith(tail)
        assert row["length"] == 300 == len(row["prompt"])
        assert abs(len(head) - len(tail)) <= 1
    assert result[3]["documents"] == [GOOD["documents"]]
    assert "cut in the middle to at most 300 tokens: 3 rows; 1 of them lost their answer's text" in capsys.readouterr().out


@pytest.mark.parametrize("max_tokens", range(80, 92))
def test_no_character_is_broken(source, prepare, max_tokens):
    document = "東京🙂é" * 50
    (row,) = prepare(source({**GOOD, "documents": document}), *BARE, "--max-tokens", max_tokens, "--truncate", "middle_out")
    head, tail = row["documents"][0].split(MARK)
    assert document.startswith(head)
    assert document.endswith(tail)
    assert max_tokens - 8 <= row["length"] <= max_tokens


def test_plot(source, prepare, tmp_path):
    prepare(source(of_length(100), of_length(900)), *BARE, "--stage", "1-500", "--max-tokens", 900, "--plot", tmp_path / "plot.svg")
    first = (tmp_path / "plot.svg").read_text()
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    prepare(source(of_length(100), of_length(900)), *BARE, "--stage", "1-500", "--max-tokens", 900, "--plot", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text() == first


BAD_ROWS = [
    ({**GOOD, "documents": ""}, "in.jsonl:2: field 'documents' is empty; fill it or leave the row out"),
    ({**GOOD, "documents": []}, "in.jsonl:2: field 'documents' is an empty list"),
    ({**GOOD, "documents": ["a", " \n"]}, "in.jsonl:2: field 'documents' has an empty text at 1"),
    ({**GOOD, "documents": ["a", 3]}, "field 'documents' is a list with a int; it must be a text or a list of texts"),
    ({**GOOD, "documents": {"text": "a"}}, "field 'documents' is a dict; it must be a text"),
    ({**GOOD, "documents": "a" * 6000}, "field 'documents' has 6,000 characters, above --max-characters 5,000"),
    (
        {"documents": "a", "answers": "b"},
        "in.jsonl:2: no field 'question' (it has: documents, answers); add it or set --question",
    ),
    ({**GOOD, "question": ["a"]}, "field 'question' is a list; it must be a text"),
    ({**GOOD, "question": " "}, "field 'question' is empty"),
    ({**GOOD, "answers": []}, "field 'answers' is an empty list"),
    ({**GOOD, "answers": ["a", ""]}, "field 'answers' has an empty text at 1"),
    ({**GOOD, "answers": None}, "field 'answers' is a NoneType"),
    ({**GOOD, "answers": True}, "field 'answers' is a bool"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_bad_rows_are_one_line_and_nothing_is_written(source, capsys, tmp_path, tokenizer, row, expected):
    path, out = source(GOOD, row), tmp_path / "out.jsonl"
    line = refusal(capsys, SCRIPT, path, out, "--tokenizer", tokenizer.name_or_path, "--max-characters", 5000)
    assert expected in line
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stage", "20-10"], "--stage 20-10: not a range of tokens"),
        (["--stage", "many"], "--stage many: not a range of tokens"),
        (["--stage", "1-100", "--stage", "100-200"], "--stage 100-200: begins at 100, within or below 1-100"),
        (["--stage", "101-200", "--stage", "1-100"], "--stage 1-100: begins at 1, within or below 101-200"),
        (["--truncate", "middle_out"], "--truncate middle_out needs --max-tokens or --stage"),
        (["--truncate", "middle_out", "--max-tokens", "52"], "leave no room for documents in 52 tokens"),
        (["--prompt", "{question}"], "--prompt '{question}' has {documents} 0 times"),
    ],
)
def test_wrong_arguments_are_one_line(source, capsys, tmp_path, tokenizer, arguments, expected):
    path = source({**GOOD, "documents": "long " * 100})
    line = refusal(capsys, SCRIPT, path, tmp_path / "out.jsonl", "--tokenizer", tokenizer.name_or_path, *BARE, *arguments)
    assert expected in line


def test_a_source_is_not_overwritten_and_a_missing_one_named(source, capsys, tokenizer, tmp_path):
    path = source(GOOD)
    assert "is the source itself" in refusal(capsys, SCRIPT, path, path, "--tokenizer", tokenizer.name_or_path)
    missing = refusal(capsys, SCRIPT, tmp_path / "no.jsonl", tmp_path / "out.jsonl", "--tokenizer", tokenizer.name_or_path)
    assert "no.jsonl: No such file or directory" in missing
    assert json.loads(path.read_text()) == GOOD
