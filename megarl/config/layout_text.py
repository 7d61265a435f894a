"""Layouts as a command line has them: ``tp=2,pp=2``."""

from collections.abc import Mapping

from pydantic import ValidationError

from megarl.config.schema import ParallelConfig
from megarl.errors import ConfigError, cut, listed, quoted

MOST_RANKS = 100_000  # of a world, and so of each of its sizes


def layout_items(text: str, where: str) -> dict[str, str]:
    """Return the values of a layout by their keys.

    Args:
        text: the layout.
        where: what begins an error, such as ``layout 'tp=2'``.

    Raises:
        ConfigError: it is empty, an item is not key=value, or a key is given twice.
    """
    items: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = (part.strip() for part in item.partition("="))
        if not (name and separator and value):
            raise ConfigError(f"{where}: {quoted(item)} is not key=value; write for example tp=2,pp=2")
        if name in items:
            raise ConfigError(f"{where}: {cut(name, 60)} is given twice, as {items[name]} and {cut(value, 40)}; keep one of them")
        items[name] = value
    if not items:
        raise ConfigError(f"{where}: has no sizes in it; write for example tp=2,pp=2, or tp=1 for one rank")
    return items


def parallel_of(items: Mapping[str, object], where: str) -> ParallelConfig:
    """Return the layout with these values; raises ConfigError where one is no layout key or not what that key takes."""
    try:
        return ParallelConfig.model_validate(items)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = cut(str(problem["loc"][0]), 60) if problem["loc"] else "a size"
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key {name!r}; give {listed([*ParallelConfig.model_fields], 6)}") from None
        raise ConfigError(f"{where}: {name}: is {quoted(problem['input'])}, {problem['msg']}; write for example tp=2") from None


def dp_of(value: object, where: str) -> int:
    """Return the data parallel size; raises ConfigError where it is none."""
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MOST_RANKS):
        raise ConfigError(f"{where}: dp: is {quoted(text)}; give a whole number from 1 to {MOST_RANKS}")
    return int(text)


def quoted_layout(text: str) -> str:
    """Return a layout as errors begin with it."""
    return f"layout {quoted(text)}"
