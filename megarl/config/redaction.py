"""What must not be printed or saved: passwords and keys, wherever a config or an error line has them."""

import re
from collections.abc import Iterator

from megarl.config.schema import Config
from megarl.errors import REMOVED, without_secrets

SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:api[_-]?key|secret|password|passwd|passphrase|authorization|token|credentials?|private[_-]?key)$", re.IGNORECASE
)


def redacted(config: Config) -> Config:
    """Put ``***`` in the place of passwords in URLs, and of texts under keys of free mappings that are called like secrets."""
    return Config.model_validate(_redacted(config.model_dump(mode="json")))


def check_not_redacted(config: Config) -> Iterator[str]:
    """Refuse a config that was read from a run's config.yaml, where its secrets were removed."""
    for path, value in _texts(config.model_dump(mode="json"), ""):
        if value == REMOVED or f"//{REMOVED}@" in value or f"={REMOVED}" in value:
            reason = "its secret was removed when the run saved this config"
            yield f"{path}: is {REMOVED}, as {reason}; give the whole value, e.g. --set {path}=..."


def _redacted(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: REMOVED if isinstance(item, str) and SECRET_KEY.search(str(key)) else _redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}.{index}")
    elif isinstance(value, str):
        yield path, value
