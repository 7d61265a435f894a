"""Functions and classes of the user's own, named ``module:function`` in the config."""

import importlib
import re
from collections.abc import Callable
from typing import Any

from megarl.errors import ConfigError, one_line

FUNCTION_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def import_function(name: str, where: str) -> Callable[..., Any]:
    """Import ``module:function``.

    Args:
        name: as the config gives it.
        where: what begins the error, such as the key.

    Raises:
        ConfigError: it cannot be imported or called.
    """
    module, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), function_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(f"{where}: cannot import {name}: {one_line(error)}; its folder must be on PYTHONPATH") from error
    if not callable(function):
        raise ConfigError(f"{where}: {name} is a {type(function).__name__}, not a function")
    return function
