"""Keys of servers: named by environment variables, never shown, never saved."""

from pathlib import Path
from typing import Any

import pytest

from megarl.config.api_keys import authorization, check_api_keys
from megarl.config.load import dump_config
from megarl.config.schema import Config
from megarl.errors import ConfigError

KEY = "sk-not-to-be-seen-0123456789"


def build(**sections: Any) -> Config:
    values = {"kind": "rl", "steps": 1, "model": {"path": Path("m")}, "data": {"train": {"type": "jsonl", "path": "rows.jsonl"}}}
    return Config.model_validate(values | sections)


def scorers(*scorers: dict[str, Any]) -> dict[str, Any]:
    return {"scorers": list(scorers)}


JUDGE = {"url": "http://j/v1", "model": "j"}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"rollout": {"engine": "vllm", "vllm": {"url": "http://h", "api_key_env": "UNSET_KEY"}}}, "rollout.vllm.api_key_env: "),
    ({"rollout": {"engine": "sglang", "sglang": {"api_key_env": "SET_KEY"}}}, "rollout.sglang.api_key_env: is given without url"),
    ({"rollout": {"engine": "vllm", "vllm": {"arguments": {"api_key": KEY}}}}, "rollout.vllm.arguments.api_key: "),
    ({"rollout": {"engine": "vllm", "vllm": {"arguments": {"middleware": "x.y"}}}}, "rollout.vllm.arguments.middleware: "),
    (
        {"rollout": {"engine": "sglang", "sglang": {"arguments": {"admin-api-key": KEY}}}},
        "rollout.sglang.arguments.admin-api-key: ",
    ),
    (
        {"rewards": scorers({"type": "reward_server", "url": "http://h", "engine": "vllm", "api_key_env": "UNSET_KEY"})},
        "rewards.scorers.0.api_key_env: the environment variable UNSET_KEY is not set",
    ),
    (
        {"rewards": scorers({"type": "document_qa", "judge": JUDGE | {"api_key_env": "UNSET_KEY"}})},
        "rewards.scorers.0.judge.api_key_env: the environment variable UNSET_KEY is not set",
    ),
    # a key in the place of a variable's name
    ({"rollout": {"engine": "vllm", "vllm": {"url": "http://h", "api_key_env": KEY}}}, "that it names is not set"),
]


@pytest.mark.parametrize(("sections", "expected"), CASES)
def test_keys_that_cannot_be_used_are_refused_and_not_shown(
    sections: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET_KEY", raising=False)
    monkeypatch.setenv("SET_KEY", KEY)
    (line,) = check_api_keys(build(**sections))
    assert expected in line and KEY not in line
    assert len(line) <= 300


def test_a_key_is_not_part_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_KEY", KEY)
    config = build(rollout={"engine": "vllm", "vllm": {"url": "http://h", "api_key_env": "SET_KEY"}})
    assert list(check_api_keys(config)) == []
    assert KEY not in dump_config(config)
    assert authorization("SET_KEY") == {"Authorization": f"Bearer {KEY}"}
    assert authorization(None) == {}


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_KEY", " ")
    with pytest.raises(ConfigError, match="SET_KEY is not set"):
        authorization("SET_KEY")
