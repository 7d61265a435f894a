"""Whether an engine takes the arguments of the configuration: its own command-line parser is asked before models are built."""

import difflib
import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.config.schema import Config
from megarl.engines.server_launch import PLUGIN_FOLDER, flags, inherited_environment, server_python
from megarl.errors import ConfigError, RolloutError, cut, shortened, with_fix

logger = logging.getLogger(__name__)

SCRIPT = PLUGIN_FOLDER / "megarl_arguments.py"
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
HAS_NEGATIVES = {"vllm": True, "sglang": False}  # whether false is written --no-...
# by the engine's own word: what MegaRL sets itself and relies on, and the key to set instead
SET_BY_KEYS = {
    "vllm": {"model": "model.path", "host": None, "port": "port", "tensor_parallel_size": "tensor_parallel_size"},
    "sglang": {"model_path": "model.path", "host": None, "port": "port", "tp_size": "tensor_parallel_size"},
}


def check_engine_arguments(config: Config) -> None:
    """Refuse ``rollout.<engine>.arguments`` that the engine does not know, or does not take as they are given.

    The engine is asked by a script in its own environment, which takes the seconds of its import. What it has accepted is
    remembered for its Python and version, so only new arguments are asked about. A refusal is never remembered: an engine that was
    changed in place is asked again. A parser that cannot be asked is one warning, and the server's start decides.

    Raises:
        ConfigError: with a line for each argument.
        RolloutError: there is no such Python, or it does not have the engine.
    """
    engine, settings = config.rollout.server_engine, config.rollout.server
    if engine is None or settings is None or not config.samples_responses:
        return
    if settings.url is not None or not settings.arguments:
        return
    python = server_python(engine, settings)
    version = _version(engine, python, settings.start_timeout)
    arguments = {name: list(flags({name: value}, negated=HAS_NEGATIVES[engine])) for name, value in settings.arguments.items()}
    accepted = _accepted_file(engine, python, version, arguments)
    if accepted is not None and os.path.exists(accepted):  # false, too, in a folder that may not be read
        return
    try:
        answer = json.loads(_run([python, str(SCRIPT), engine, "arguments"], json.dumps(arguments), settings.start_timeout))
        mistakes = list(_mistakes(engine, version, arguments, answer))
    except (RolloutError, ValueError, LookupError, TypeError) as error:
        whom, reason = f"{ENGINES[engine]} {shortened(version, 30)}", shortened(str(error), 160)
        logger.warning("warning: rollout.%s.arguments: %s could not be asked about them: %s", engine, whom, reason)
        return
    if mistakes:
        raise ConfigError(*mistakes)
    if accepted is not None:
        _remember(accepted)


def _mistakes(engine: str, version: str, arguments: dict[str, list[str]], answer: dict[str, Any]) -> Iterator[str]:
    """Yield one line for each argument that the engine's answer, or MegaRL, speaks against."""
    for name in arguments:
        path, shown = f"rollout.{engine}.arguments.{shortened(name, 60)}", f"{ENGINES[engine]} {shortened(version, 30)}"
        destination = answer["destinations"].get(name)
        if destination is None:
            nearest = difflib.get_close_matches(name.replace("-", "_"), answer["names"], n=1, cutoff=0.0)
            yield f"{path}: {shown} has no such argument; the nearest is {nearest[0]}"
        elif destination in SET_BY_KEYS[engine]:
            key = SET_BY_KEYS[engine][destination]
            whole = key if key is None or "." in key else f"rollout.{engine}.{key}"
            yield f"{path}: MegaRL sets it itself; " + ("remove it" if whole is None else f"remove it and set {whole}")
        elif name in answer["problems"]:
            reason = shortened(str(answer["problems"][name]), 400).removeprefix("argument ")
            yield with_fix(f"{path}: {shown} refuses it: {reason}", "give a value that it takes, or remove it")


def _version(engine: str, python: str, timeout: float) -> str:
    """Return the version of the engine that ``python`` has.

    Raises:
        RolloutError: it has none.
    """
    try:
        return _run([python, str(SCRIPT), engine, "version"], "", timeout).strip()
    except RolloutError as error:
        raise RolloutError(
            f"{cut(python, 100)} has no {ENGINES[engine]} ({shortened(str(error), 60)}); "
            f"give rollout.{engine}.python an environment that has it, or run make engine-{engine}"
        ) from None


def _run(command: list[str], text: str, timeout: float) -> str:
    """Return the standard output of a command that reads ``text``.

    Raises:
        RolloutError: it failed or took too long; the message is the last that it said.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=inherited_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RolloutError(f"no answer within {timeout:g} s") from None
    except OSError as error:
        raise RolloutError(f"it cannot be run ({error.strerror})") from None
    if done.returncode:
        raise RolloutError((done.stderr.strip().splitlines() or [f"it exited with code {done.returncode}"])[-1])
    return done.stdout


def _accepted_file(engine: str, python: str, version: str, arguments: dict[str, list[str]]) -> Path | None:
    """Return the empty file whose existence says that the engine took the arguments; None where there is no home folder."""
    told = json.dumps([engine, python, version, arguments, SCRIPT.read_text()], sort_keys=True)
    try:
        folder = Path.home() / ".cache" / "megarl" / "accepted_arguments"
    except RuntimeError:
        return None
    return folder / f"{engine}-{hashlib.sha256(told.encode()).hexdigest()[:24]}"


def _remember(accepted: Path) -> None:
    """Make the file; where none can be written, the engine is asked again the next time."""
    try:
        accepted.parent.mkdir(parents=True, exist_ok=True)
        accepted.touch()
    except OSError as error:
        logger.info("%s cannot be written: %s", accepted, error)
