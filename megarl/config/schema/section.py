"""What all sections of the configuration are made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def key(default: Any, unit: str, sentence: str, **constraints: Any) -> Any:
    """A schema field with its documentation; ``...`` as default makes the key required."""
    extra = {"json_schema_extra": {"unit": unit}, "description": sentence, **constraints}
    if callable(default):
        return Field(default_factory=default, **extra)
    return Field(default=default, **extra)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys and numbers that are NaN or infinite refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
