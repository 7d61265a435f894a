"""Servers that answer nonsense: reward servers, judges and engines given by URL."""

from pathlib import Path
from typing import Any

from table import Answer, Case, Templates, config_in

DEEP = b"[" * 100_000 + b"]" * 100_000
HTML = Answer(body=b"<html><body>Welcome</body></html>", content_type="text/html")
ANSI = b"\x1b[2J\x1b[31mred\x07"


def _case(label: str, answer: Answer | dict[str, Answer], *names: str | tuple[str, ...], **values: Any) -> Case:
    """A run whose config has these values; URL in them is the address of the case's server."""
    answers = answer if isinstance(answer, dict) else {"": answer}

    def make(folder: Path, templates: Templates) -> list[str]:
        return ["train", config_in(folder, templates, evaluation={}, **_with_url(values, templates.url))]

    return Case(label, make, names, answers=answers)


def _with_url(value: Any, url: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_url(one, url) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_url(one, url) for one in value]
    return value.replace("URL", url) if isinstance(value, str) else value


def _reward(label: str, answer: Answer, *names: str, engine: str = "sglang") -> Case:
    scorer = {"type": "reward_server", "url": "URL", "engine": engine}
    return _case(f"reward server: {label}", answer, "/classify", *names, rewards={"scorers": [scorer]})


def _judge(label: str, answer: Answer, *names: str) -> Case:
    judge = {"url": "URL/v1", "model": "m", "retries": 0, "timeout": 5.0}
    return _case(f"judge: {label}", answer, "judge", *names, rewards={"scorers": [{"type": "document_qa", "judge": judge}]})


def _engine(label: str, engine: str, answer: Answer | dict[str, Answer], *names: str | tuple[str, ...]) -> Case:
    rollout = {
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_new_tokens": 4,
        "engine": engine,
        engine: {"url": "URL", "start_timeout": 4.0, "update_timeout": 4.0},
    }
    return _case(f"{engine} by URL: {label}", answer, "http://", *names, rollout=rollout)


def _json(text: str | bytes, status: int = 200) -> Answer:
    return Answer(status=status, body=text if isinstance(text, bytes) else text.encode())


CASES = [
    _reward("a page of HTML", HTML),
    _reward("nothing", _json("")),
    _reward("null", _json("null")),
    _reward("a list", _json("[]")),
    _reward("100,000 nested", _json(DEEP)),
    _reward("a number of 5,000 digits", _json('{"embedding": [' + "9" * 5000 + "]}")),
    _reward("two scores", _json('{"embedding": [1.0, 2.0]}')),
    _reward("a text as score", _json('{"embedding": ["good"]}')),
    _reward("NaN as score", _json('{"embedding": [NaN]}')),
    _reward("a flag as score", _json('{"embedding": [true]}')),
    _reward("vLLM without probs", _json('{"data": [{}]}'), engine="vllm"),
    _reward("vLLM with data a number", _json('{"data": 3}'), engine="vllm"),
    _reward("a body that is cut", Answer(body=b'{"embedding": [1', cut=True)),
    _reward("status 404", _json('{"detail": "Not Found"}', 404), "404"),
    _reward("300 characters of newlines", _json("a\nb\n" * 100, 500), "500"),
    _reward("escape sequences", _json(ANSI, 500), "500"),
    _reward("escape sequences in a score", _json('{"embedding": ["\\u001b[31m\\u202e"]}')),
    _reward("bytes that are no text", _json(b"\xff\xfe\x00", 500), "500"),
    _reward("a megabyte of text", _json(b"x" * 1_000_000, 500), "500"),
    _judge("a page of HTML", HTML),
    _judge("null", _json("null")),
    _judge("100,000 nested", _json(DEEP)),
    _judge("a number of 5,000 digits", _json('{"choices": ' + "9" * 5000 + "}")),
    _judge("no choices", _json('{"choices": []}')),
    _judge("a choice that is a text", _json('{"choices": ["yes"]}')),
    _judge("a choice without content", _json('{"choices": [{"message": {"content": null}}]}')),
    _judge("content that is a list", _json('{"choices": [{"message": {"content": [1]}}]}')),
    _judge("a body that is cut", Answer(body=b'{"choices": [', cut=True)),
    _judge("status 401", _json('{"error": "who are you"}', 401), "401"),
    _judge("status 500 with newlines", _json("a\nb\n" * 100, 500), "500"),
    _judge("escape sequences", _json(ANSI, 400), "400"),
    _judge("another escape sequence in the reply", _json('{"choices": ["\\u001b[31m"]}')),
]
for engine in ("vllm", "sglang"):
    CASES += [
        _engine("a page of HTML", engine, HTML),
        _engine("nothing", engine, _json("")),
        _engine("null", engine, _json("null")),
        _engine("a number", engine, _json("3")),
        _engine("a list", engine, _json("[1]")),
        _engine("an empty object", engine, _json("{}")),
        _engine("100,000 nested", engine, _json(DEEP)),
        _engine("a number of 5,000 digits", engine, _json("9" * 5000)),
        _engine("a body that is cut", engine, Answer(body=b"{", cut=True)),
        _engine("status 404", engine, _json("not here", 404)),
        _engine("status 500 with escape sequences", engine, _json(ANSI, 500)),
        _engine("healthy and then 500", engine, {"/health": _json(""), "": _json("a\nb\n" * 400, 500)}),
        _engine("healthy and then HTML", engine, {"/health": _json(""), "": HTML}),
    ]
