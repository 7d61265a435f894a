import json

import datasets
import pytest

from megarl.config.schema import DatasetsSource, JsonlSource, ReasoningGymSource
from megarl.data.sources import read_rows
from megarl.errors import DataError


def jsonl(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return JsonlSource(path=path)


def test_jsonl_rows_keep_every_field_and_skip_blank_lines(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    lines = [
        json.dumps({"prompt": "1+1?\u2028", "answer": 2, "level": 3}, ensure_ascii=False),
        "",
        json.dumps({"prompt": chat, "answer": "4"}),
    ]
    first, second = read_rows(jsonl(tmp_path, "\n".join(lines)), "train")
    assert (first.row_id, first.prompt, first.answer) == ("train/0", "1+1?\u2028", "2")
    assert first.reference == {"prompt": "1+1?\u2028", "answer": "2", "level": 3}
    assert (second.row_id, second.prompt) == ("train/1", chat)
    assert second.prompt_text == "system: Be brief.\nuser: 2+2?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", ', ":3: not JSON"),
        ('["a"]', ":1: a list, not a JSON object"),
        ('{"prompt": "a"}', ":1: no field 'answer' (it has: prompt)"),
        ('{"question": "a", "answer": "b"}', "set prompt_field"),
        ('{"prompt": "a", "answer": null}', "'answer' is a NoneType"),
        ('{"prompt": "a", "answer": true}', "'answer' is a bool"),
        ('{"prompt": 3, "answer": "b"}', "'prompt' is a int"),
        ('{"prompt": " ", "answer": "b"}', "'prompt' is an empty string"),
        ('{"prompt": [], "answer": "b"}', "'prompt' is an empty list"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}], "answer": "b"}', "message 1 must"),
    ],
)
def test_malformed_jsonl_names_file_line_and_reason(tmp_path, text, expected):
    source = jsonl(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_rows(source, "train")
    assert str(source.path) in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_binary_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_rows(JsonlSource(path=tmp_path / "none.jsonl"), "train")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(JsonlSource(path=tmp_path / "binary"), "train")


def test_dataset_folder(tmp_path):
    table = datasets.Dataset.from_dict({"question": ["a", "b", " "], "target": ["1", "2", "3"], "n": [7, 8, 9]})
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    table.save_to_disk(tmp_path / "plain")
    for folder in ("dict", "plain"):
        source = DatasetsSource(path=str(tmp_path / folder), prompt_field="question", answer_field="target")
        rows = read_rows(source, "train")
        assert len(rows) == 3
        assert rows[1].reference == {"question": "b", "target": "2", "n": 8, "answer": "2"}
        assert rows[1].row_id == "train/1"
        with pytest.raises(DataError, match=r"row 2: field 'question' is an empty string"):
            rows[2]
    with pytest.raises(DataError, match=r"no split 'test' \(it has: train\)"):
        read_rows(DatasetsSource(path=str(tmp_path / "dict"), split="test"), "train")
    with pytest.raises(DataError, match="cannot load dataset"):
        read_rows(DatasetsSource(path=str(tmp_path / "absent")), "train")


def test_reasoning_gym_rows_are_the_generators_own():
    import reasoning_gym

    source = ReasoningGymSource(task="chain_sum", size=5, seed=3, options={"min_digits": 2, "max_digits": 2})
    rows = read_rows(source, "evaluation")
    expected = list(reasoning_gym.create_dataset("chain_sum", size=5, seed=3, min_digits=2, max_digits=2))
    assert [row.prompt for row in rows] == [entry["question"] for entry in expected]
    assert [row.answer for row in rows] == [entry["answer"] for entry in expected]
    assert rows[4].row_id == "evaluation/4"
    assert rows[4].reference["entry"] == expected[4]
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("chain_sums", {}, "the nearest is 'chain_sum'"),
        ("chain_sum", {"min_digits": 5, "max_digits": 2}, "max_digits must be >= min_digits"),
        ("chain_sum", {"digits": 5}, "unexpected keyword argument 'digits'"),
    ],
)
def test_wrong_reasoning_gym_task_or_option(task, options, expected):
    with pytest.raises(DataError, match=expected):
        read_rows(ReasoningGymSource(task=task, options=options), "train")
