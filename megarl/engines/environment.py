"""Where the Python environments of rollout engines live.

Standard library only: tools/build_engine.py imports it before anything is installed.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

from megarl.errors import RolloutError

COMPLETE_MARKER = ".complete"


def requirements_file(engine: str) -> Path:
    """Return the pins of an engine's environment, in the clone's requirements folder."""
    return Path(__file__).resolve().parents[2] / "requirements" / f"{engine}-cpu.txt"


def engine_folder(engine: str, prefix: Path | None = None) -> Path:
    """Return the folder of the engine's environment.

    It is named by its pins and the Python version, so that clones with equal pins share one.

    Args:
        engine: ``"vllm"`` or ``"sglang"``.
        prefix: folder of all engine environments; ``~/.cache/megarl/engines`` when not given.

    Raises:
        RolloutError: MegaRL was installed without its requirements folder.
    """
    requirements = requirements_file(engine)
    if not requirements.is_file():
        raise RolloutError(
            f"{requirements} does not exist, so the environment of {engine} cannot be found; "
            f"set rollout.{engine}.python to a Python that has {engine}, or install MegaRL from a clone with pip install -e"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(version.encode() + requirements.read_bytes()).hexdigest()[:12]
    return (prefix or Path.home() / ".cache" / "megarl" / "engines") / f"{engine}-{digest}"


def default_python(engine: str) -> Path:
    """Return this Python where it has the engine beside MegaRL, else that of the environment which ``make engine-…`` builds.

    Raises:
        RolloutError: it is not built, or its build did not finish.
    """
    if importlib.util.find_spec(engine) is not None:
        return Path(sys.executable)
    folder = engine_folder(engine)
    if not (folder / COMPLETE_MARKER).is_file():
        raise RolloutError(
            f"no environment of {engine} in {folder}; "
            f"run make engine-{engine}, or set rollout.{engine}.python or rollout.{engine}.url"
        )
    return folder / "bin" / "python"
