"""Files of rows in the shapes that people have: each is read as they expect, or refused by row, value and fix."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megarl.config.schema import DatasetsSource, JsonlSource
from megarl.data.sources import read_rows
from megarl.errors import DataError

ROWS = [{"asked": f"{n} * {n}?", "extra": {"truth": [str(n * n)]}} for n in (2, 3)]
FIELDS = {"prompt_field": "asked", "answer_field": "extra.truth.0"}
LINES = "\n".join(map(json.dumps, ROWS)).encode() + b"\n"
CSV = b'asked,answer\n"2 * 2,\nor what?",4\n3 * 3?,9\n'


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


READ = {
    "rows.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "mac.jsonl": LINES.replace(b"\n", b"\r"),
    "lines.json": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("kind", [JsonlSource, DatasetsSource])
@pytest.mark.parametrize("name", READ)
def test_files_with_the_same_rows(tmp_path, name, kind):
    path = tmp_path / name
    path.write_bytes(READ[name])
    rows = read_rows(kind.model_validate({"path": str(path), **FIELDS}), "train")
    assert [(row.prompt, row.answer) for row in rows] == [("2 * 2?", "4"), ("3 * 3?", "9")]
    assert rows[1].location in (f"{path}:2", f"{path} row 1")
    assert rows[0].reference["extra"] == {"truth": ["4"]}


@pytest.mark.parametrize(("name", "data"), [("t.csv", CSV), ("t.csv.gz", gzip.compress(CSV)), ("t.tsv", CSV.replace(b",", b"\t"))])
def test_tables(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    first, second = read_rows(JsonlSource(path=tmp_path / name, prompt_field="asked"), "train")
    assert (first.prompt.split("\n")[-1], first.answer, second.answer) == ("or what?", "4", "9")
    assert (first.location, second.location) == (f"{tmp_path / name}:2", f"{tmp_path / name}:4")


def test_folders_of_datasets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    for folder in ("saved", "dict", "saved/data-00000-of-00001.arrow"):
        rows = read_rows(DatasetsSource(path=str(tmp_path / folder), **FIELDS), "train")
        assert [row.answer for row in rows] == ["4", "9"]
    with pytest.raises(DataError, match=r"is a folder; .*type: datasets"):
        read_rows(JsonlSource(path=tmp_path / "saved"), "train")


def row(prompt="q", answer="a", **more):
    return json.dumps({"prompt": prompt, "answer": answer, **more}).encode()


REFUSED = [
    ("a.jsonl", b"", "has no rows"),
    ("a.jsonl", row() + b'\n{"prompt": "r", "ans', ":2: not JSON"),
    ("a.jsonl", b"[" * 100_000, "nested too deeply"),
    ("a.jsonl", row() + b'\n{"prompt": "q", "answer": "a", "x": ' + b'{"y":' * 100_000, ":2: its brackets are nested too deeply"),
    ("a.jsonl", b'{"prompt": "q", "answer": ' + b"7" * 5000 + b"}", ":1: a number has thousands of digits"),
    ("a.jsonl", b'{"prompt": "q", "answer": NaN}', ":1: field 'answer' is nan, not a number"),
    ("a.jsonl", b'{"prompt": "q", "answer": 1e999}', ":1: field 'answer' is inf"),
    ("a.jsonl", b'{"prompt": "q", "answer": -Infinity}', ":1: field 'answer' is -inf"),
    ("a.jsonl", row(answer=True), "'answer' is a bool (true)"),
    ("a.jsonl", row(answer=None), "'answer' is a NoneType (null)"),
    ("a.jsonl", row(answer=["x", "y"]), "name one of its entries, e.g. answer.0"),
    ("a.jsonl", row(answer={"x": 1}), "'answer' is a dict"),
    ("a.jsonl", row(prompt=None), "'prompt' is a NoneType (null)"),
    ("a.jsonl", row(prompt="a\0b"), "'prompt' has the character NUL at 1"),
    ("a.jsonl", row(answer="a\0b"), "'answer' has the character NUL at 1"),
    ("a.jsonl", row(prompt="half \ud83d"), "'prompt' has \\ud83d at character 5"),
    ("a.jsonl", row(answer="\udc00"), "'answer' has \\udc00 at character 0"),
    ("a.jsonl", row(note=[{"deep": "\ud800"}]), "field 'note.0.deep' has \\ud800"),
    ("a.jsonl", row(**{"\ud800": 1}), "a field's name has \\ud800"),
    ("a.json", json.dumps([{"prompt": "q", "answer": "\ud83d"}]).encode(), " row 0: field 'answer' has \\ud83d"),
    ("a.jsonl", b'{"prompt": "q", "prompt": "r", "answer": "a"}', "the key 'prompt' stands twice"),
    ("a.jsonl", b'{"prompt": "q", "answer": "a", "x": {"y": 1, "y": 2}}', "the key 'y' stands twice"),
    ("a.jsonl", b"3", ":1: a int, not a JSON object"),
    ("a.json", b"[3]", " row 0: a int, not a JSON object"),
    ("a.jsonl", '{"prompt": "é", "answer": "a"}'.encode("latin-1"), "iconv -f latin1 -t utf-8 a.jsonl"),
    ("a.jsonl", row().decode().encode("utf-16"), "iconv -f utf-16 -t utf-8 a.jsonl"),
    ("a.jsonl", row().decode().encode("utf-16-le"), "iconv -f utf-16"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(LINES)[:30] + b"\0" * 40, "is not a whole gzip file"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0\0", "is compressed with zstd"),
    ("a.parquet", parquet(ROWS)[:-20], "cannot be read as Parquet"),
    ("a.csv", b"prompt,answer\nq\n", ":2: 1 cells under 2 column names"),
    ("a.csv", b"prompt,answer,prompt\nq,a,r\n", "two columns are called 'prompt'"),
    ("a.csv", b'prompt,answer\n"q,a\n', "not CSV"),
    ("a.csv", b"prompt,answer\n", "has no rows"),
    ("a.jsonl", b'{"question": "q", "answer": "a"}', "set prompt_field, e.g. to question"),
    ("a.jsonl", b'{"prompt": "q", "meta": {"ground_truth": "4"}}', "set answer_field, e.g. to meta.ground_truth"),
    ("a.jsonl", b'{"Prompt": "q", "answer": "4"}', "set prompt_field, e.g. to Prompt"),
    ("a.jsonl", b'{"chosen": "Human: x Assistant: y", "rejected": "z", "answer": "a"}', "behind the last 'Assistant:'"),
    ("a.jsonl", row(prompt=[{"role": "user"}]), "message 0 must have the strings 'role' and 'content', and its content is None"),
    ("a.jsonl", row(prompt=[{"from": "human", "value": "x"}]), "'from' and 'value' are called 'role' and 'content'"),
    ("a.jsonl", row(prompt=[{"role": "user", "content": None}]), "its content is None"),
    ("a.jsonl", row(prompt=[{"role": 1, "content": "x"}]), "its role is 1"),
    ("a.jsonl", row(prompt=["x"]), "message 0 is a str"),
    ("a.jsonl", row(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "message 0 has a part of type 'image'"),
    ("a.jsonl", row(prompt=[{"role": "user", "content": "\ud83d"}]), "prompt.0.content' has \\ud83d"),
]


@pytest.mark.parametrize(("name", "data", "expected"), REFUSED)
def test_what_cannot_be_meant_is_refused(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        read_rows(JsonlSource(path=tmp_path / name), "train")
    message = str(error.value)
    assert expected in message and name in message
    assert len(message) <= 300 and message.isprintable()


def test_messages_as_chats_have_them(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}], "name": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]}
    (tmp_path / "a.jsonl").write_bytes(row(prompt=[parts, call, {"role": "tool", "content": "3 C"}]))
    (read,) = read_rows(JsonlSource(path=tmp_path / "a.jsonl"), "train")
    assert read.prompt[0] == {"role": "user", "content": "Is it cold?"}
    assert read.prompt[1] == {name: value for name, value in call.items() if name != "name"}
    assert read.prompt_text == "user: Is it cold?\nassistant: \ntool: 3 C"


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "2+2?"}]


def test_the_last_message_of_a_chat_is_the_answer(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "4"}]}))
    (read,) = read_rows(JsonlSource(path=tmp_path / "a.jsonl", prompt_field="messages", answer_field="messages"), "train")
    assert (read.prompt, read.answer) == (CHAT, "4")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match="ends with a message of role 'user'"):
        read_rows(JsonlSource(path=tmp_path / "a.jsonl", prompt_field="messages", answer_field="messages"), "train")


def test_pairs_of_chats(tmp_path):
    def pair(**more):
        responses = {name: [*CHAT, {"role": "assistant", "content": text}] for name, text in (("chosen", "4"), ("rejected", "5"))}
        (tmp_path / "a.jsonl").write_text(json.dumps(responses | more))
        prompt_field = "prompt" if "prompt" in more else "chosen"
        (read,) = read_rows(JsonlSource(path=tmp_path / "a.jsonl", prompt_field=prompt_field), "train", in_pairs=True)
        return read.prompt, read.answer, read.rejected

    assert pair() == (CHAT, "4", "5")
    assert pair(prompt=CHAT) == (CHAT, "4", "5")
    with pytest.raises(DataError, match="does not begin with the prompt in 'prompt'; set prompt_field: chosen"):
        pair(prompt="2+2?")
    with pytest.raises(DataError, match="must be chats that begin alike"):
        pair(rejected=[CHAT[0], {"role": "assistant", "content": "5"}])
