"""Presets of the algorithm section: YAML files beside this one, each a complete choice on every axis of one method."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from megarl.config import yaml_text

FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def with_preset(section: Any) -> Any:
    """Return the algorithm section as YAML gives it, with its preset's choices under its own keys.

    A section without a preset, or with an unknown one, is returned as it is: the schema reports the latter.
    """
    name = section.get("preset") if isinstance(section, dict) else None
    return _merged(_preset(name), section) if name in PRESETS else section


@lru_cache
def _preset(name: str) -> dict[str, Any]:
    return yaml_text.parse((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge ``above`` over ``below``, section by section."""
    merged = below | above
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _merged(below[key], value)
    return merged
