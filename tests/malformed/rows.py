"""Malformed rows of JSON-lines files and other sources."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table import Case, Templates, config_in, sft_config_in

GOOD = b'{"prompt": "a", "answer": "b"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000


def _rows(
    label: str, content: bytes, *names: str | tuple[str, ...], kind: str = "sft", name: str = "rows.jsonl", **keys: Any
) -> Case:
    """A run on a file of rows."""

    def make(folder: Path, templates: Templates) -> list[str]:
        (folder / name).write_bytes(content)
        source = {"type": "jsonl", "path": str(folder / name)} | keys
        data = {"template": "{prompt}\n", "train": source}
        maker = config_in if kind == "rl" else sft_config_in
        return ["train", maker(folder, templates, data=data, evaluation={}, kind=kind)]

    return Case(f"data: {label}", make, names)


def _source(
    label: str, source: dict[str, Any], *names: str | tuple[str, ...], prepare: Callable[[Path], object] | None = None
) -> Case:
    """A run on another source; FOLDER in its values is the case's folder."""

    def make(folder: Path, templates: Templates) -> list[str]:
        if prepare is not None:
            prepare(folder)
        own = {key: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value for key, value in source.items()}
        data = {"template": "{prompt}\n", "train": own}
        return ["train", sft_config_in(folder, templates, data=data)]

    return Case(f"data: {label}", make, names)


def _row(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _no_parquet(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "train.parquet").write_bytes(b"PAR1 no parquet PAR1")


def _no_arrow(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "state.json").write_text("{}")
    (folder / "set" / "dataset_info.json").write_text("{}")


CASES = [
    _rows("no rows", b"", "rows.jsonl"),
    _rows("only blank lines", b"\n\n  \n", "rows.jsonl"),
    _rows("a cut line", GOOD + b'{"prompt": "a"', "rows.jsonl:2", "JSON"),
    _rows("100,000 nested brackets", GOOD + b'{"prompt": "a", "answer": ' + DEEP + b"}\n", "rows.jsonl:2"),
    _rows("nested deep inside an object", GOOD + b'{"prompt": "a", "answer": "b", "more": ' + DEEP + b"}\n", "rows.jsonl:2"),
    _rows("brackets that never close", GOOD + b"[" * 100_000 + b"\n", "rows.jsonl:2"),
    _rows("a number of 5,000 digits", GOOD + b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", "rows.jsonl:2"),
    _rows(
        "another field's number of 5,000 digits",
        GOOD + b'{"prompt": "a", "answer": "b", "n": ' + b"9" * 5000 + b"}\n",
        "rows.jsonl:2",
    ),
    _rows("NaN as answer", GOOD + b'{"prompt": "a", "answer": NaN}\n', "rows.jsonl:2", "NaN"),
    _rows("Infinity as answer", GOOD + b'{"prompt": "a", "answer": -Infinity}\n', "rows.jsonl:2"),
    _rows("NaN as prompt", GOOD + b'{"prompt": NaN, "answer": "b"}\n', "rows.jsonl:2"),
    _rows("1e999 as answer", GOOD + b'{"prompt": "a", "answer": 1e999}\n', "rows.jsonl:2"),
    _rows("null as answer", GOOD + _row(prompt="a", answer=None), "rows.jsonl:2", "answer"),
    _rows("null as prompt", GOOD + _row(prompt=None, answer="b"), "rows.jsonl:2", "prompt"),
    _rows("a number as prompt", GOOD + _row(prompt=3, answer="b"), "rows.jsonl:2", "prompt"),
    _rows("an object as prompt", GOOD + _row(prompt={"a": 1}, answer="b"), "rows.jsonl:2", "prompt"),
    _rows("an empty list as prompt", GOOD + _row(prompt=[], answer="b"), "rows.jsonl:2", "prompt"),
    _rows("a message without a role", GOOD + _row(prompt=[{"content": "a"}], answer="b"), "rows.jsonl:2", "prompt"),
    _rows("a message without content", GOOD + _row(prompt=[{"role": "user"}], answer="b"), "rows.jsonl:2", "prompt"),
    _rows("a message that is a text", GOOD + _row(prompt=["a"], answer="b"), "rows.jsonl:2", "prompt"),
    _rows(
        "a message whose role is a number", GOOD + _row(prompt=[{"role": 3, "content": "a"}], answer="b"), "rows.jsonl:2", "prompt"
    ),
    _rows("a lone surrogate in the answer", GOOD + b'{"prompt": "a", "answer": "\\ud800"}\n', "rows.jsonl:2", "surrogate"),
    _rows("a lone surrogate in the prompt", GOOD + b'{"prompt": "\\udfff", "answer": "b"}\n', "rows.jsonl:2", "surrogate"),
    _rows(
        "a lone surrogate in another field", GOOD + b'{"prompt": "a", "answer": "b", "c": "\\ud800"}\n', "rows.jsonl:2", "surrogate"
    ),
    _rows(
        "a lone surrogate as a field's name", GOOD + b'{"prompt": "a", "answer": "b", "\\ud800": 1}\n', "rows.jsonl:2", "surrogate"
    ),
    _rows("a field missing", GOOD + _row(prompt="a", answr="b"), "rows.jsonl:2", "answer", "answr"),
    _rows("a field missing among long ones", GOOD + _row(**{"k" * 500 + str(i): 1 for i in range(50)}), "rows.jsonl:2", "prompt"),
    _rows("a field missing beside control characters", GOOD + _row(**{"a\x1b[31m\n": 1}), "rows.jsonl:2", "prompt"),
    _rows("a list as row", GOOD + b"[1, 2]\n", "rows.jsonl:2"),
    _rows("a text as row", GOOD + b'"a"\n', "rows.jsonl:2"),
    _rows("null as row", GOOD + b"null\n", "rows.jsonl:2"),
    _rows("not UTF-8", GOOD + b'{"prompt": "\xe9", "answer": "b"}\n', "rows.jsonl", "UTF-8"),
    _rows("UTF-16", GOOD.decode().encode("utf-16"), "rows.jsonl", "UTF-8"),
    _rows("NUL bytes", GOOD + b"\x00\x00\x00\x00\n", "rows.jsonl:2"),
    _rows("a control character in a text", GOOD + b'{"prompt": "a\x07", "answer": "b"}\n', "rows.jsonl:2"),
    _rows("half of a gzip file", gzip.compress(GOOD * 1000)[:40], "rows.jsonl.gz", name="rows.jsonl.gz"),
    _rows("a parquet file that is none", b"PAR1 none PAR1", "rows.parquet", name="rows.parquet"),
    _rows(
        "an example above sft.max_tokens", GOOD + _row(prompt="a" * 300, answer="b"), ("train/1", "rows.jsonl:2"), "sft.max_tokens"
    ),
    _rows(
        "a prompt above max_prompt_tokens",
        GOOD + _row(prompt="a" * 300, answer="b"),
        ("train/1", "rows.jsonl:2"),
        "max_prompt_tokens",
        kind="rl",
    ),
    _rows("an answer field that is nowhere", GOOD, "rows.jsonl:1", "gold", answer_field="gold"),
    _rows("no preferred response", GOOD, "rows.jsonl:1", "chosen", kind="preference"),
    _rows(
        "a rejected response that is a number",
        GOOD.replace(b"answer", b"chosen").replace(b"}", b', "rejected": null}'),
        "rows.jsonl:1",
        "rejected",
        kind="preference",
    ),
    _source("a missing file", {"type": "jsonl", "path": "FOLDER/nowhere.jsonl"}, "nowhere.jsonl"),
    _source("a folder as file", {"type": "jsonl", "path": "FOLDER"}, "folder"),
    _source("a path with NUL", {"type": "jsonl", "path": "a\0b"}, "path"),
    _source("a path of 5,000 characters", {"type": "jsonl", "path": "p" * 5000}, "path"),
    _source("a path with a newline", {"type": "jsonl", "path": "a\nb"}, ("a\\nb", "a b")),
    _source("an unknown task", {"type": "reasoning_gym", "task": "chain_summ"}, "chain_summ", "chain_sum"),
    _source("an unknown option of a task", {"type": "reasoning_gym", "task": "chain_sum", "options": {"digits": 3}}, "digits"),
    _source(
        "an impossible option of a task",
        {"type": "reasoning_gym", "task": "chain_sum", "options": {"min_terms": 9, "max_terms": 2}},
        "chain_sum",
    ),
    _source(
        "an option of another type", {"type": "reasoning_gym", "task": "chain_sum", "options": {"min_terms": "two"}}, "chain_sum"
    ),
    _source("a dataset that is nowhere", {"type": "datasets", "path": "FOLDER/nowhere"}, "nowhere"),
    _source("a folder with a broken parquet file", {"type": "datasets", "path": "FOLDER/set"}, "set", prepare=_no_parquet),
    _source("a saved dataset without its files", {"type": "datasets", "path": "FOLDER/set"}, "set", prepare=_no_arrow),
]
