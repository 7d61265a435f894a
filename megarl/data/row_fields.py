"""What the fields of a row hold: found by dotted names, checked, and refused with the row, the value and the fix."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.data.row_files import refuse_surrogate
from megarl.errors import DataError, listed, quoted

ChatMessage = Mapping[str, Any]

_USUAL_NAMES = {
    "prompt": ("question", "problem", "messages", "instruction", "query"),
    "answer": ("ground_truth", "solution", "answers.text.0", "messages"),
}


def value_at(fields: Mapping[str, object], name: str, option: str, location: str) -> Any:
    """Return the value of a field: the one of exactly that name, else the one that its dots lead to (``extra.answers.0``).

    Args:
        fields: the row.
        name: of the field.
        option: the key that gives the name, for the error.
        location: of the row, for the error.

    Raises:
        DataError: there is none.
    """
    if name in fields:
        return fields[name]
    value: object = fields
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"{location}: no field {quoted(name)} ({_has(fields)}); add it or set {option}{_example(fields, name)}")
    return value


def given_text(value: object, where: str) -> str:
    """Return an answer as a text; DataError where it is none and no finite number."""
    if isinstance(value, bool):
        raise DataError(f'{where} is a bool ({str(value).lower()}); write the text that a response should give, such as "yes"')
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise DataError(f"{where} is {value}, not a number that a response could give; correct it or leave the row out")
        return str(value)
    if value is None:
        raise DataError(f"{where} is a NoneType (null); write the answer or leave the row out")
    if not isinstance(value, str):
        hint = f"; name one of its entries, e.g. {where.rpartition(' ')[2][1:-1]}.0" if isinstance(value, list) else ""
        raise DataError(f"{where} is a {type(value).__name__}{_shown(value)}; it must be a string or a number{hint}")
    return checked_text(value, where)


def checked_text(text: str, where: str) -> str:
    """Return the text, which must have no NUL and no half of a character; DataError otherwise."""
    if "\0" in text:
        raise DataError(f"{where} has the character NUL at {text.index(chr(0))}; remove it or leave the row out")
    if not text.isascii():
        refuse_surrogate(text, where)
    return text


def checked_prompt(prompt: object, where: str) -> str | list[ChatMessage]:
    """Return a text, or messages with the roles and contents that a chat template needs; DataError for anything else."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where} is an empty string; write a prompt or leave the row out")
        return checked_text(prompt, where)
    if prompt is None:
        raise DataError(f"{where} is a NoneType (null); write a prompt or leave the row out")
    if not isinstance(prompt, list):
        raise DataError(f"{where} is a {type(prompt).__name__}{_shown(prompt)}; it must be a string or a list of chat messages")
    if not prompt:
        raise DataError(f"{where} is an empty list; write a prompt or leave the row out")
    return [_checked_message(message, f"{where}: message {index}") for index, message in enumerate(prompt)]


def response_and_context(value: object, where: str) -> tuple[str, list[ChatMessage] | None]:
    """Return a response, and the messages before it where it is the last one of a chat; None for a text alone."""
    if not isinstance(value, list) or not any(isinstance(message, Mapping) for message in value):
        if not isinstance(value, str):
            raise DataError(f"{where} is a {type(value).__name__}; it must be a string or a chat that ends with it")
        return checked_text(value, where), None
    messages = checked_prompt(value, where)
    assert isinstance(messages, list)
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise DataError(
            f"{where} ends with a message of role {quoted(last['role'])}; the response must be the last one, of role assistant and "
            "with a text"
        )
    return last["content"], messages[:-1]


def _checked_message(message: object, where: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}; it must be an object with the strings 'role' and 'content'")
    # Parquet gives every message all keys that any has
    message = {name: value for name, value in message.items() if value is not None or name in ("role", "content")}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        known = "'from' and 'value' are called 'role' and 'content' here" if "from" in message else "such as user or assistant"
        raise DataError(f"{where} must have the strings 'role' and 'content', and its role is {quoted(role)}; {known}")
    if content is None and message.get("tool_calls"):
        return message  # a call of a tool says nothing
    if isinstance(content, list):
        content = message["content"] = _text_of_parts(content, where)
    if not isinstance(content, str):
        raise DataError(f"{where} must have the strings 'role' and 'content', and its content is {quoted(content)}; write a text")
    checked_text(content, where)
    return message


def _text_of_parts(parts: Sequence[Any], where: str) -> str:
    for part in parts:
        part_type = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if part_type != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where} has a part of type {quoted(part_type)}; MegaRL trains on text alone: leave such rows out")
    return "".join(part["text"] for part in parts)


def _has(fields: Mapping[str, object]) -> str:
    return f"it has: {listed([quoted(str(name), 30).strip(chr(39)) for name in fields], 8)}" if fields else "it has none"


def _example(fields: Mapping[str, Any], name: str) -> str:
    """Return a field that may be meant: of a similar name, or of that kind of data."""
    if name == "prompt" and isinstance(fields.get("chosen"), str) and "Assistant:" in fields["chosen"]:
        return ", dividing chosen and rejected behind the last 'Assistant:' into prompt and responses"
    paths = [path for path in _paths(fields, "") if path != name]
    by_kind = [path for word in _USUAL_NAMES.get(name, ()) for path in paths if path == word or path.endswith(f".{word}")]
    near = difflib.get_close_matches(name, paths, n=1, cutoff=0.6)
    found = (by_kind or near)[:1]
    return f", e.g. to {found[0]}" if found else ""


def _paths(fields: Mapping[str, object], before: str) -> list[str]:
    paths = []
    for name, value in list(fields.items())[:50]:
        paths.append(f"{before}{name}")
        if isinstance(value, Mapping) and before.count(".") < 3:
            paths += _paths(value, f"{before}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], str):
            paths.append(f"{before}{name}.0")
    return paths


def _shown(value: object) -> str:
    return f" ({quoted(value, 40)})" if isinstance(value, int | float | str | list) else ""
