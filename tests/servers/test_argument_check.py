"""What is remembered of an engine's answers about arguments, and what happens where it cannot be asked.

A shell script stands in for the engine's Python; tests/engines/test_engine_arguments.py asks the real ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.config.schema import Config
from megarl.engines.argument_check import check_engine_arguments
from megarl.errors import ConfigError, RolloutError

STAND_IN = """#!/bin/sh
[ "$3" = version ] && cat {folder}/version && exit 0
echo asked >> {folder}/asked
cat {folder}/answer
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with an engine of version 1.0 that knows max_num_seqs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "python").write_text(STAND_IN.format(folder=tmp_path))
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "version").write_text("1.0\n")
    answer_with(tmp_path)
    return tmp_path


def answer_with(folder: Path, **problems: str) -> None:
    names = ["max_model_len", "max_num_seqs", "model", "port"]
    (folder / "answer").write_text(json.dumps({"names": names, "destinations": {one: one for one in names}, "problems": problems}))


def check(folder: Path, arguments: dict[str, Any], **section: Any) -> None:
    rollout = {"engine": "vllm", "vllm": {"python": folder / "python", "arguments": arguments, "start_timeout": 20, **section}}
    values = {"kind": "rl", "steps": 1, "model": {"path": folder}, "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}}}
    check_engine_arguments(Config.model_validate(values | {"rollout": rollout}))


def times_asked(folder: Path) -> int:
    return (folder / "asked").read_text().count("asked") if (folder / "asked").exists() else 0


def test_what_was_accepted_is_not_asked_again_until_something_changes(folder: Path) -> None:
    for expected, arguments, version in (
        (1, {"max_num_seqs": 64}, "1.0"),
        (1, {"max_num_seqs": 64}, "1.0"),
        (2, {"max_num_seqs": 32}, "1.0"),
        (3, {"max_num_seqs": 64}, "1.1"),
        (3, {"max_num_seqs": 32}, "1.0"),
        (3, {}, "1.2"),
    ):
        (folder / "version").write_text(version)
        check(folder, arguments)
        assert times_asked(folder) == expected


def test_a_refusal_is_not_remembered(folder: Path) -> None:
    answer_with(folder, max_num_seqs="argument --max-num-seqs: invalid int value: 'x\x1b[2J'\n" + "y" * 500)
    for attempt in (1, 2):
        with pytest.raises(ConfigError) as refused:
            check(folder, {"max_num_seqs": "x", "max_num_seq": 1, "port": 3, "model": "m"})
        assert times_asked(folder) == attempt
    kind, typo, port, model = refused.value.mistakes
    assert kind.startswith("rollout.vllm.arguments.max_num_seqs: vLLM 1.0 refuses it: --max-num-seqs: invalid int value: 'x [2J' y")
    assert kind.endswith("; give a value that it takes, or remove it") and len(kind) <= 300 and kind.isprintable()
    assert typo == "rollout.vllm.arguments.max_num_seq: vLLM 1.0 has no such argument; the nearest is max_num_seqs"
    assert port == "rollout.vllm.arguments.port: MegaRL sets it itself; remove it and set rollout.vllm.port"
    assert model == "rollout.vllm.arguments.model: MegaRL sets it itself; remove it and set model.path"
    answer_with(folder)
    check(folder, {"max_num_seqs": "x"})


def test_without_a_place_to_remember_it_is_asked_every_time(folder: Path) -> None:
    (folder / "home").write_text("a file where the home folder should be")
    for attempt in (1, 2):
        check(folder, {"max_num_seqs": 64})
        assert times_asked(folder) == attempt


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo not JSON", "Expecting value"),
        ("echo '[]'", "indices must be integers"),
        ("echo ModuleNotFoundError: it moved >&2; exit 1", "it moved"),
        ("kill -9 $$", "it exited with code -9"),
        ("exec sleep 60", "no answer within 3 s"),
    ],
)
def test_an_engine_that_cannot_be_asked_is_a_warning(
    folder: Path, script: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "python").write_text(f'#!/bin/sh\n[ "$3" = version ] && echo 1.0 && exit 0\n{script}\n')
    check(folder, {"max_num_seq": 64}, start_timeout=3)
    (record,) = caplog.records
    assert record.getMessage().startswith("warning: rollout.vllm.arguments: vLLM 1.0 could not be asked about them: ")
    assert words in record.getMessage() and "\n" not in record.getMessage()
    assert not list((folder / "home").rglob("vllm-*"))


def test_a_python_without_the_engine_is_refused(folder: Path) -> None:
    (folder / "python").write_text("#!/bin/sh\necho there is no module vllm >&2\nexit 1\n")
    with pytest.raises(RolloutError, match=r"python has no vLLM \(there is no module vllm\); give rollout\.vllm\.python an env"):
        check(folder, {"max_num_seqs": 64})


def test_servers_that_already_run_are_not_asked(folder: Path) -> None:
    (folder / "python").unlink()
    check(folder, {}, url="http://127.0.0.1:9")
