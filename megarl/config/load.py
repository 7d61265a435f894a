"""Reading and writing configuration files; every mistake has the key, the value, the reason and the fix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megarl.config import yaml_text
from megarl.config.fields import KeyLocation, give_of, location_of, meaning_of, nearest_key, source_name, type_in_words, unit_of
from megarl.config.schema import Config
from megarl.errors import MESSAGE_LENGTH, ConfigError, cut, escaped, listed, without_secrets

DEEPEST = 32  # parts of an override's key


def load_config(path: Path, overrides: Sequence[str] = (), options: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Read a YAML file into a Config.

    Relative paths in the file stay relative to the current directory, not to the file.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` texts, applied in order; the value is YAML, a number in the key is a list index.
        options: top-level keys and their values, which go before all.

    Raises:
        ConfigError: with each mistake.
    """
    data = _read_mapping(path)
    for override in overrides:
        _apply_override(data, override)
    data |= options
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        overridden = [*(override.partition("=")[0].strip() for override in overrides), *options]
        lines = [describe(detail, str(path), overridden) for detail in error.errors(include_url=False)]
        raise ConfigError(*lines) from None


def dump_config(config: Config) -> str:
    """Return the whole resolved config as YAML; loading it gives an equal Config."""
    return yaml_text.dump(config.model_dump(mode="json"))


def save_config(config: Config, path: Path) -> None:
    """Write ``dump_config`` to a file; raises ConfigError when it cannot be written."""
    try:
        path.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the config cannot be written ({error.strerror}); choose another --run-dir") from error


def _read_mapping(path: Path) -> dict[str, object]:
    """Parse the file into plain YAML values."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(yaml_text.LARGEST_TEXT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); give a YAML config file") from None
    try:
        data = yaml_text.parse(text)
    except yaml.YAMLError as error:
        line, reason = yaml_text.problem_of(error)
        raise ConfigError(f"{path}:{line or 1}: not valid YAML: {reason}; correct the file") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: holds {_show(data)}, not 'key: value' lines; start from a file in configs/")
    return data


def _apply_override(data: dict[str, object], override: str) -> None:
    """Set one ``section.key=value`` in ``data``, making the mappings on the way that are missing."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {_brief(override)}: is not section.key=value, for example --set optimizer.learning_rate=1e-6")
    override = _brief(override)
    if dotted.count(".") >= DEEPEST:
        raise ConfigError(f"--set {override}: the key has more than {DEEPEST} parts; give a key of megarl config's output")
    try:
        value = yaml_text.parse(text)
    except yaml.YAMLError as error:
        reason = yaml_text.problem_of(error)[1]
        raise ConfigError(f"--set {override}: the value is not valid YAML ({reason}); put a text in double quotes") from None
    *parents, name = dotted.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        index = _index(node, part, ".".join(parents[:depth]), override)
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
    node[_index(node, name, ".".join(parents), override)] = value


def _index(node: object, part: str, where: str, override: str) -> str | int:
    """Return ``part`` as the key or index of ``node``, the value at ``where``."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"--set {override}: {where} is {_show(node)}, which has no keys; set {where} itself")
    if part not in map(str, range(len(node))):
        raise ConfigError(
            f"--set {override}: {where} is a list with {len(node)} items and {_brief(part)} is not one's index; indices start at 0"
        )
    return int(part)


def describe(detail: ErrorDetails, file: str, overridden: Sequence[str] = ()) -> str:
    """Describe one pydantic error as one line that begins with the file, or with ``--set`` where an overridden key is wrong."""
    location, kind, given = detail["loc"], detail["type"], detail["input"]
    key = location_of(location)
    by_override = any(f"{key.path}.".startswith(f"{dotted}.") for dotted in overridden)
    where = f"{'--set' if by_override else file}: {key.path}"
    if kind == "extra_forbidden":
        if any(dotted.startswith(f"{key.path}.") for dotted in overridden):
            where = f"--set: {key.path}"
        section = location_of(location[:-1])
        users = section.types_with(str(location[-1]))
        if users:
            shown = ":" if isinstance(given, dict) else f": {_show(given)}"
            return f"{where}{shown} has no use for type {section.chosen_type}; remove it or use type {' or '.join(users)}"
        siblings = [name for one in section.sections for name in one.model_fields]
        return f"{where}: unknown key; the nearest valid key is {nearest_key(key.path, siblings)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        choices = " or ".join(str(source_name(section)) for section in key.sections)
        given_type = given.get("type") if isinstance(given, dict) else None
        return f"{where}.type: {'is required' if given_type is None else f'is {_show(given_type)}'}; give {choices}"
    if kind == "missing":
        chosen = location_of(location[:-1]).chosen_type
        return _with_fix(f"{where}: is required{f' for type {chosen}' if chosen else ''}", key)
    reason = "" if kind in ("literal_error", "model_type") else f", {_lower_first(detail['msg'])}"
    return _with_fix(f"{where}: is {_show(given)}{reason}", key)


def _with_fix(problem: str, key: KeyLocation) -> str:
    """Return the problem and what the value must be, without its meaning where that would make the line too long."""
    whole = f"{problem}; give {_fix(key, with_meaning=True)}"
    return whole if len(whole) <= MESSAGE_LENGTH - 30 else f"{problem}; give {_fix(key, with_meaning=False)}"


def _fix(key: KeyLocation, *, with_meaning: bool) -> str:
    """Return what the value at a place must be."""
    if key.field is None:
        return "a value"
    if give_of(key.field):
        return give_of(key.field)
    if len(key.sections) == 1:
        return f"a section with keys among {listed(list(key.sections[0].model_fields), 6)}"
    unit, meaning = unit_of(key.field), meaning_of(key.field)
    return f"{type_in_words(key.field)}{f' ({unit})' if unit else ''}{f': {meaning}' if with_meaning else ''}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _show(value: object) -> str:
    """Return a value as it stands in an error message, cut when it is long, without the password of an address."""
    return cut(without_secrets("null" if value is None else repr(value)), 80)


def _brief(text: str) -> str:
    return cut(without_secrets(escaped(text)), 80)
