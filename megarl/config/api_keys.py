"""Keys of servers that the run did not start: a config names the environment variable, and nothing writes or shows its value."""

import os
import re
from collections.abc import Iterator

from megarl.config.schema import Config, EngineServerConfig
from megarl.config.tasks import placed_scorers
from megarl.errors import ConfigError, shortened

KEY = re.compile(r"[!-~]+")  # what a header can carry
NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,50}")
OWN_KEY = ("api_key", "admin_api_key", "middleware")  # engine arguments that would replace, show or save a started server's key


def authorization(variable: str | None) -> dict[str, str]:
    """Return the header with the key that the environment variable holds; none for no variable.

    Raises:
        ConfigError: the variable is not set, or holds what no header can carry; the message never has the key.
    """
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not KEY.fullmatch(key):
        raise ConfigError(f"api_key_env: {_problem(variable, key)}")
    return bearer(key)


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


def check_api_keys(config: Config) -> Iterator[str]:
    """Check that every named variable is set, and a server that the run starts keeps the key that the run gives it."""
    if config.rollout.server is not None:
        yield from _check_engine(f"rollout.{config.rollout.engine}", config.rollout.server)
    for path, scorers in placed_scorers(config):
        for index, scorer in enumerate(scorers):
            for key, variable in scorer.key_variables():
                yield from _check_variable(f"{path}.{index}.{key}", variable)


def _check_engine(path: str, section: EngineServerConfig) -> Iterator[str]:
    if section.url is None and section.api_key_env is not None:
        yield f"{path}.api_key_env: is given without url, and a server that the run starts gets a key of its own; remove it"
    else:
        yield from _check_variable(f"{path}.api_key_env", section.api_key_env)
    for name in section.arguments:
        if name.replace("-", "_") in OWN_KEY:
            yield (
                f"{path}.arguments.{shortened(name, 40)}: a server that the run starts gets a random key of its own, which this "
                "would replace, and the run folder would keep it; remove it"
            )


def _check_variable(path: str, variable: str | None) -> Iterator[str]:
    key = "" if variable is None else os.environ.get(variable, "").strip()
    if variable is not None and not KEY.fullmatch(key):
        yield f"{path}: {_problem(variable, key)}"


def _problem(variable: str, key: str) -> str:
    reason = "holds spaces or other characters that no key has" if key else "is not set"
    name = variable if NAME.fullmatch(variable) else "that it names"  # anything else may be the key itself
    return f"the environment variable {name} {reason}; export it with the server's key"
