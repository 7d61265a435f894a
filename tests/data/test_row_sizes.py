"""Rows are measured once, alike in one process and in several, and too long ones go by the policy."""

import json

import pytest

from megarl.config.schema import Config
from megarl.data.row_sizes import RowSizes
from megarl.data.sampler import build_prompt_source
from megarl.data.sources import read_rows
from megarl.errors import DataError
from megarl.workers.batches import in_processes


@pytest.fixture
def settings(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1+" * (index % 9) + "1", "answer": "1"}) + "\n" for index in range(1000)))
    data = {"train": {"type": "jsonl", "path": str(path)}, "template": "{prompt}="}
    model = {"path": tokenizer.name_or_path}
    return lambda **more: Config.model_validate({"kind": "rl", "steps": 1, "model": model, "data": data, **more})


def test_sizes_are_those_of_the_tokenizer_and_are_kept(settings, tokenizer, tmp_path, monkeypatch):
    config = settings()
    rows = read_rows(config.data.train, "train")
    expected = [[len(tokenizer.encode(row.prompt + "=", add_special_tokens=False))] for row in rows]
    assert RowSizes(config, tokenizer, tmp_path / "checks").measure("rows", rows, "prompts").tolist() == expected
    monkeypatch.setattr("megarl.data.row_sizes.measure_of", None)  # nothing is measured again
    assert RowSizes(config, tokenizer, tmp_path / "checks").measure("rows", rows, "prompts").tolist() == expected
    monkeypatch.undo()
    monkeypatch.setattr("megarl.data.row_sizes._FEW_ROWS", 1)
    assert RowSizes(config, tokenizer, None, in_processes).measure("rows", rows, "prompts").tolist() == expected


def test_rows_that_are_too_long(settings, tokenizer, capsys):
    limit = {"rollout": {"max_prompt_tokens": 10}}
    with pytest.raises(DataError, match=r"rows\.jsonl:6: prompt train/5 has 12 tokens"):
        build_prompt_source(settings(**limit), tokenizer)
    for policy, kept in (("leave_out", 556), ("cut_middle", 1000)):
        config = settings(**limit)
        config = config.model_copy(update={"data": config.data.model_copy(update={"too_long": policy})})
        source = build_prompt_source(config, tokenizer)
        assert len(list(source.rows())) == kept
        assert max(len(prompt.token_ids) for prompt in source.take(500)) <= 10
        assert "444 of 1,000 rows are too long" in capsys.readouterr().out
