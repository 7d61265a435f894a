"""What the files of a tokenizer say, read without the tokenizers library: its tokens, its special tokens, and the end tokens."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megarl import json_text
from megarl.errors import ConfigError, listed, shortened

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASON_CHARACTERS = 80


def read_json_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ConfigError: it cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        return json_text.read_json_object(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); copy it again") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({shortened(str(error), _REASON_CHARACTERS)}); copy it again") from None


def read_tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says, with the special tokens of special_tokens_map.json, each None or a text.

    As transformers does it, the map counts more in a folder whose tokenizer_config.json has no added_tokens_decoder, and
    elsewhere only for tokens that tokenizer_config.json does not name.

    Raises:
        ConfigError: a file is malformed, or a special token is no text.
    """
    settings: dict[str, object] = {}
    file = folder / TOKENIZER_CONFIG
    if file.is_file():
        settings = read_json_object(file)
        settings |= {name: _token_text(settings[name], name, file) for name in SPECIAL_TOKENS if name in settings}
    file = folder / SPECIAL_TOKENS_MAP
    if file.is_file():
        mapped = read_json_object(file)
        for name in SPECIAL_TOKENS:
            if name in mapped and ("added_tokens_decoder" not in settings or settings.get(name) is None):
                settings[name] = _token_text(mapped[name], name, file)
    return settings


def _token_text(value: object, name: str, file: Path) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{file}: {name} is {json.dumps(value)[:_REASON_CHARACTERS]}, not a text; correct it")
    return text or None


def tokens_of(tokenizer: Mapping[str, object], file: Path) -> dict[str, int]:
    """Return the ids of all tokens of a tokenizer.json, those of its model and the added ones.

    Args:
        tokenizer: what the file holds.
        file: for messages.

    Raises:
        ConfigError: the file is malformed, or two tokens have one id.
    """
    tokens: dict[str, int] = {}
    texts: dict[int, str] = {}
    for text, token_id in _token_entries(tokenizer, file):
        if texts.setdefault(token_id, text) != text or tokens.setdefault(text, token_id) != token_id:
            first = f"{texts[token_id]!r} and {text!r} have" if texts[token_id] != text else f"{text!r} has id {tokens[text]} and"
            raise ConfigError(f"{file}: {first} id {token_id}; each token needs one id of its own: copy the file again")
    return tokens


def _token_entries(tokenizer: Mapping[str, object], file: Path) -> Iterator[tuple[str, int]]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of text and score
        entries: list[tuple[object, object]] = [
            (pair[0] if isinstance(pair, list) and pair else None, i) for i, pair in enumerate(vocabulary)
        ]
    elif isinstance(vocabulary, dict):
        entries = list(vocabulary.items())
    else:
        raise ConfigError(f"{file}: model.vocab is missing or neither an object nor a list; copy the file again")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ConfigError(f"{file}: added_tokens is no list of objects; copy the file again")
    for text, token_id in [*entries, *((token.get("content"), token.get("id")) for token in added)]:
        if not isinstance(text, str) or not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            entry = json.dumps({"token": text, "id": token_id})[:_REASON_CHARACTERS]
            raise ConfigError(f"{file}: {entry} is no token with an id; copy the file again")
        yield text, token_id


def beyond_embedding(tokens: Mapping[str, int], vocab_size: int, unused: Collection[str | None]) -> str | None:
    """Return in words that some tokens have no row in the embedding; None where all have one.

    Args:
        tokens: ids by text.
        vocab_size: rows of the embedding.
        unused: texts of tokens that no text is ever written with.
    """
    names = sorted(
        (text for text, token_id in tokens.items() if token_id >= vocab_size and text not in unused), key=tokens.__getitem__
    )
    if not names:
        return None
    shown = listed([f"{text[:20]!r} = {tokens[text]}" for text in names], limit=3)
    return (
        f"has {len(names)} tokens that the model's embedding has no row for, as vocab_size in its config.json is {vocab_size}: "
        f"{shown}; take the model's own tokenizer, or resize the embedding"
    )


def check_vocabulary(folder: Path, vocab_size: int) -> Iterator[str]:
    """Check that every token of the folder's tokenizer.json, if any, has a row in the embedding, but for one that only pads."""
    file = folder / TOKENIZER
    if not file.is_file():
        return
    try:
        words = beyond_embedding(
            tokens_of(read_json_object(file), file), vocab_size, {read_tokenizer_settings(folder).get("pad_token")}
        )
    except ConfigError as error:
        yield f"model.tokenizer: {error}"
        return
    if words is not None:
        yield f"model.tokenizer: {file} {words}"


def end_tokens_of_model(folder: Path) -> tuple[tuple[int, ...], str]:
    """Return the end tokens that a model's generation_config.json names, or else its config.json, and the file.

    Raises:
        ConfigError: a file is malformed, or names something else than ids.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        file = folder / name
        value = read_json_object(file).get("eos_token_id") if file.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0 for token_id in ids):
            shown = json.dumps(value)[:_REASON_CHARACTERS]
            raise ConfigError(f"{file}: eos_token_id is {shown}, neither a token id nor a list of some; correct it")
        if ids:
            return tuple(dict.fromkeys(ids)), name
    return (), ""
