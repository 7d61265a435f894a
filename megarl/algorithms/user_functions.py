"""Functions of the user's own, named ``module:function`` in the config."""

import importlib
from collections.abc import Callable
from typing import Any

from megarl.errors import ConfigError


def import_function(name: str, key: str) -> Callable[..., Any]:
    """The function ``module:function``.

    Args:
        name: as the config gives it.
        key: where, for the error.

    Raises:
        ConfigError: it cannot be imported or called.
    """
    module, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), function_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{key}: cannot import {name}: {reason}; its folder must be on PYTHONPATH") from error
    if not callable(function):
        raise ConfigError(f"{key}: {name} is a {type(function).__name__}, not a function")
    return function
