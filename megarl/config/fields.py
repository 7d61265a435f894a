"""What the schema says about itself: dotted paths, types in words, and the nearest valid key."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megarl.config.names import Name
from megarl.config.schema import Config, Section

PLAIN_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", NoneType: "null"}
BOUND_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def section_types(annotation: object) -> list[type[Section]]:
    """Return the sections that a value of this type can be or, for a list, hold; empty for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in section_types(argument)]


def source_name(section: type[Section]) -> str | None:
    """Return the ``type:`` that selects this section among the alternatives of a union; None for other sections."""
    field = section.model_fields.get("type")
    choices = get_args(field.annotation) if field is not None else ()
    return choices[0] if len(choices) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLocation:
    """Where a location of pydantic's errors is in the schema.

    Attributes:
        path: dotted path as a user writes it.
        field: the schema's field that holds the value; None where the schema has no such key.
        sections: the sections that the value at this place can be; empty for a plain value.
        others: where ``type`` has chosen a section, the other ones that it could have chosen.
    """

    path: str
    field: FieldInfo | None
    sections: tuple[type[Section], ...]
    others: tuple[type[Section], ...] = ()

    @property
    def chosen_type(self) -> str | None:
        """The ``type`` of the section that was chosen; None where there is no choice."""
        return source_name(self.sections[0]) if self.others else None

    def types_with(self, name: str) -> list[str]:
        """Return the types that were not chosen and have such a key."""
        return [str(source_name(section)) for section in self.others if name in section.model_fields]


def location_of(location: Sequence[int | str]) -> KeyLocation:
    """Find a location of pydantic's errors in the schema.

    pydantic puts the ``type`` of a union's member into the location (``data, train, jsonl, path``); a user does not.
    """
    parts: list[str] = []
    field: FieldInfo | None = None
    sections: list[type[Section]] = [Config]
    others: list[type[Section]] = []
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
        elif len(sections) > 1:
            others = [section for section in sections if source_name(section) != part]
            sections = [section for section in sections if source_name(section) == part]
        else:
            others = []
            parts.append(part)
            # Keys of a free mapping (rollout.vllm.arguments) belong to the mapping's field.
            if sections:
                field = sections[0].model_fields.get(part)
                sections = section_types(field.annotation) if field is not None else []
    return KeyLocation(path=".".join(parts), field=field, sections=tuple(sections), others=tuple(others))


def walk(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield every section of the schema with its dotted path, in the schema's order; ``[]`` marks the items of a list."""
    yield prefix, section
    for name, field in section.model_fields.items():
        for child in section_types(field.annotation):
            items = "[]" if get_origin(field.annotation) is list else ""
            yield from walk(child, f"{prefix}.{name}{items}".lstrip("."))


def nearest_key(path: str, siblings: Sequence[str]) -> str:
    """Return the valid key nearest to an unknown one, with its full dotted path.

    Looked for by spelling and initials (``lr``), in this order: beside it, in the sections below, anywhere in the schema; else the
    least unlike of its siblings.

    Args:
        path: dotted path of the unknown key.
        siblings: the keys that are valid in its section, at least one.
    """
    parent, _, name = path.rpartition(".")
    here = {key: f"{parent}.{key}".lstrip(".") for key in siblings}
    below: dict[str, str] = {}
    anywhere: dict[str, str] = {}
    for prefix, section in sorted(walk(), key=lambda item: item[0].count(".")):  # of several the least nested
        for key in section.model_fields:
            anywhere.setdefault(key, f"{prefix}.{key}".lstrip("."))
            if parent and prefix.startswith(f"{parent}."):
                below.setdefault(key, f"{prefix}.{key}")
    for candidates, similarity in ((here, 0.6), (below, 0.75), (anywhere, 0.75), (here, 0.0)):
        matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=similarity)
        matches += [key for key in candidates if "".join(word[:1] for word in key.split("_")) == name]
        if matches:
            return candidates[matches[0]]
    raise AssertionError(f"no siblings of {path}")


def type_in_words(field: FieldInfo) -> str:
    """Return the type of a key as a person says it, bounds included, e.g. ``whole number ≥ 1 or null``."""
    bounds = [
        f"{sign} {value:g}"
        for item in field.metadata
        for name, sign in BOUND_SIGNS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    names = [item for item in field.metadata if isinstance(item, Name)]
    words = names[0].in_words() if names else _annotation_in_words(field.annotation)
    if not bounds:
        return words
    base, separator, null = words.partition(" or null")
    return f"{base} {' and '.join(bounds)}{separator}{null}"


def _annotation_in_words(annotation: Any) -> str:
    """Say in words what ``type_in_words`` describes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        names = [item for item in arguments[1:] if isinstance(item, Name)]
        return names[0].in_words() if names else _annotation_in_words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        sections = section_types(annotation)
        if len(sections) > 1:
            words = "section with type: " + " or ".join(f"`{source_name(section)}`" for section in sections)
            return words + (" or null" if NoneType in arguments else "")
        return " or ".join(_annotation_in_words(argument) for argument in arguments)
    if origin is list:
        return f"list, each item {_annotation_in_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if section_types(annotation):
        return "section"
    return PLAIN_NAMES[annotation]


def unit_of(field: FieldInfo) -> str:
    """Return the unit of a key; empty where it has none."""
    extra = field.json_schema_extra
    unit = str(extra["unit"]) if isinstance(extra, dict) else "-"
    return "" if unit == "-" else unit


def give_of(field: FieldInfo) -> str:
    """Return what to give for a required key that is missing; empty where its type and meaning say so."""
    extra = field.json_schema_extra
    return str(extra["give"]) if isinstance(extra, dict) else ""


def meaning_of(field: FieldInfo) -> str:
    """Return the sentence that documents a key."""
    return field.description or ""


def comment_of(field: FieldInfo) -> str:
    """Return unit and sentence on one line."""
    unit = unit_of(field)
    return f"({unit}) {meaning_of(field)}" if unit else meaning_of(field)
