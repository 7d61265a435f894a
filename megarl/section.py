"""What all sections of the configuration are made of, and what goes for the values of all keys. Imports nothing of MegaRL."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

LARGEST_WHOLE = 2**31 - 1  # what a C int holds, in which many a number ends
LARGEST_SEED = 2**62 - 1  # others are made of it by adding, which must stay within 63 bits
LARGEST_NUMBER = 1e38  # float32 has numbers up to 3.4e38
LONGEST_WAIT = 1e7  # seconds, four months; clocks of other libraries count nanoseconds in 63 bits
LONGEST_PATH = 4000  # bytes; Linux takes up to 4,095
LONGEST_NAME = 255  # bytes of a folder's or file's own name


def key(default: Any, unit: str, sentence: str, *, give: str = "", **constraints: Any) -> Any:
    """Make a schema field with its documentation.

    Args:
        default: ``...`` makes the key required.
        unit: ``-`` for none.
        sentence: what it means.
        give: what to give, said where a required key is missing; its type and meaning when empty.
        **constraints: of pydantic's Field.
    """
    extra = {"json_schema_extra": {"unit": unit, "give": give}, "description": sentence, **constraints}
    if callable(default):
        return Field(default_factory=default, **extra)
    return Field(default=default, **extra)


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys and values that no machine can use are refused."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, section: object) -> object:
        """Refuse flags as numbers, numbers beyond all sense, paths that no file can have, and addresses of no server."""
        problems: list[InitErrorDetails] = []
        for name, value in section.items() if isinstance(section, dict) else ():
            field = cls.model_fields.get(name)
            if field is None:
                continue
            for item in value if isinstance(value, list) else [value]:
                try:
                    _check(name, field, item)
                except PydanticCustomError as error:
                    problems.append(InitErrorDetails(type=error, loc=(name,), input=item))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return section


@dataclass(frozen=True, slots=True)
class ByType:
    """Annotates a union of sections of which ``type`` chooses one: keys of the others may be there as long as they say nothing.

    A key says nothing whose value is null or an empty list; so files that list every key of every type can be read.
    """

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        keys = {member.model_fields["type"].default: member.model_fields.keys() for member in get_args(source)}
        every = frozenset().union(*keys.values())

        def without_empty(value: object) -> object:
            chosen = value.get("type") if isinstance(value, dict) else None
            if not isinstance(value, dict) or not isinstance(chosen, str) or chosen not in keys:
                return value
            foreign = every - keys[chosen]
            return {name: item for name, item in value.items() if name not in foreign or item not in (None, [])}

        return core_schema.no_info_before_validator_function(without_empty, handler(source))


def sections_of(union: object) -> dict[str, type[Section]]:
    """Return the sections of a union that is annotated ``ByType``, by their ``type``."""
    return {member.model_fields["type"].default: member for member in get_args(get_args(union)[0])}


def _check(name: str, field: FieldInfo, value: object) -> None:
    unit = field.json_schema_extra["unit"] if isinstance(field.json_schema_extra, dict) else "-"
    types = _plain_types(field.annotation)
    if {int, float} & types and bool not in types:
        _check_number(value, _bound(types, name, str(unit)))
    if Path in types and isinstance(value, str | Path):
        _check_path(str(value))
    if unit == "URL" and isinstance(value, str):
        _check_address(value)


def _plain_types(annotation: object) -> set[object]:
    """Return the types that a value, or an item of a list, may have."""
    if get_origin(annotation) in (Union, UnionType, list):
        return set().union(*map(_plain_types, get_args(annotation)))
    return {annotation}


def _bound(types: set[object], name: str, unit: str) -> float:
    """Return the largest sensible size of a number."""
    if unit == "seconds":
        return LONGEST_WAIT
    if int in types:
        return LARGEST_SEED if name == "seed" else LARGEST_WHOLE
    return LARGEST_NUMBER


def _check_number(value: object, bound: float) -> None:
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "input should be a number, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return  # no number, which its type refuses
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) > bound:
        raise PydanticCustomError("number_too_large", "its size can be {bound} at most", {"bound": f"{bound:.15g}"})


def _check_path(text: str) -> None:
    encoded = text.encode("utf-8", "surrogateescape")
    if not text:
        raise PydanticCustomError("no_path", "a path cannot be empty")
    if not text.isprintable():
        raise PydanticCustomError("no_path", "a path cannot have line ends or other control characters in it")
    if len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(b"/")):
        raise PydanticCustomError("no_path", "a path cannot be so long")


def _check_address(text: str) -> None:
    """Refuse an address with a password in it: logs and the run's config.yaml would show it."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise PydanticCustomError("no_address", "its host or port cannot be read") from None
    if parts.username is not None:
        raise PydanticCustomError("no_address", "an address has no user or password in it, which logs would show")
    if parts.scheme not in ("http", "https") or not host:
        raise PydanticCustomError("no_address", "an address begins with http:// or https:// and a host")
    if not text.isprintable() or " " in text or parts.query or parts.fragment:
        raise PydanticCustomError("no_address", "an address has no spaces, control characters, ? or # in it")
