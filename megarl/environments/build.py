"""The environment that a configuration names. Worker processes import this, so it stays light."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.environments.calculator import Calculator
from megarl.environments.protocol import Environment
from megarl.environments.tower_of_hanoi import TowerOfHanoi
from megarl.errors import ConfigError, one_line

BUILT_IN: Mapping[str, Callable[..., Environment]] = {"calculator": Calculator, "tower_of_hanoi": TowerOfHanoi}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """An environment as a worker process is told of it; the fields are those of EnvironmentConfig."""

    type: str
    function: str | None
    options: Mapping[str, Any]


def build_environment(spec: EnvironmentSpec) -> Callable[[], Environment]:
    """Makes the environment of one episode at each call.

    Raises:
        ConfigError: the class cannot be imported, or refuses the options.
    """
    factory = BUILT_IN[spec.type] if spec.function is None else _import_class(spec.function)

    def build() -> Environment:
        return factory(**spec.options)

    try:
        build()
    except Exception as error:  # the user's class may raise anything
        name = spec.function or spec.type
        raise ConfigError(f"rollout.environment: {name} refuses options {dict(spec.options)}: {one_line(error)}") from error
    return build


def _import_class(function: str) -> Callable[..., Environment]:
    module_name, _, name = function.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(
            f"rollout.environment.function: cannot import {function}: {one_line(error)}; its folder must be on PYTHONPATH"
        ) from error
    if not all(callable(getattr(factory, method, None)) for method in ("reset", "step")):
        raise ConfigError(f"rollout.environment.function: {function} has no reset and step; see docs/environments.md")
    return factory
