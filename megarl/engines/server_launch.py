"""What the command lines and environments of all servers have in common."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megarl.config.schema import EngineServerConfig
from megarl.engines.environment import default_python
from megarl.errors import RolloutError

KEY_VARIABLE = "MEGARL_API_KEY"  # the word of plugin/megarl_guard.py for the key that requests must carry
LOCAL_HOSTS = "127.0.0.1,localhost,::1"
PROXY_EXCEPTIONS = ("no_proxy", "NO_PROXY")
PLUGIN_FOLDER = Path(__file__).with_name("plugin")
LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "OMP_", "MKL_", "PYTHON", "VIRTUAL_ENV")


def server_python(engine: str, settings: EngineServerConfig) -> str:
    """Return the Python of the engine's environment.

    Raises:
        RolloutError: it does not exist.
    """
    python = settings.python or default_python(engine)
    if not python.is_file():
        raise RolloutError(
            f"rollout.{engine}.python {python} does not exist; leave it out to use the one that make engine-{engine} builds"
        )
    return str(python)


def flags(arguments: dict[str, object], *, negated: bool) -> Iterator[str]:
    """Return engine arguments as command-line flags; False is left out, or written ``--no-…`` when ``negated``."""
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            yield flag
        elif value is False:
            if negated:
                yield flag.replace("--", "--no-", 1)
        else:
            yield from (flag, json.dumps(value) if isinstance(value, dict | list) else str(value))


def inherited_environment() -> dict[str, str]:
    """Return the trainer's environment without what its launcher and its Python put there; what is local goes by no proxy.

    SGLang asks itself over HTTP at its start.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    exceptions = {name: ",".join(filter(None, (inherited.get(name), LOCAL_HOSTS))) for name in PROXY_EXCEPTIONS}
    return inherited | exceptions


def cores_of_ranks(num_ranks: int) -> str:
    """Deal this process's CPU cores out to ranks as engines write it, ``0,1|2,3``; ranks share cores where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_ranks)
    starts = [rank * share % len(cores) for rank in range(num_ranks)]
    return "|".join(",".join(map(str, cores[start : start + share])) for start in starts)
