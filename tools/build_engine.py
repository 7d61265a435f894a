"""Build the Python environment of a rollout engine once, outside the clone: ``python tools/build_engine.py vllm``, or ``sglang``.

Prints the environment's Python. A second call with the same pins returns at once; a call during another's build waits for it.
"""

import argparse
import fcntl
import shutil
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs before MegaRL is installed

from megarl.engines.environment import COMPLETE_MARKER, engine_folder, requirements_file
from megarl.errors import MegaRLError


def main() -> int:
    """Build what the command line names; 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["sglang", "vllm"])
    parser.add_argument("--prefix", type=Path, help="folder of all engine environments (default: ~/.cache/megarl/engines)")
    arguments = parser.parse_args()
    try:
        folder = engine_folder(arguments.engine, arguments.prefix)
        build_once(folder, arguments.engine)
    except MegaRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: building {folder} failed: {' '.join(map(str, error.cmd))} exited with {error.returncode}", file=sys.stderr)
        return 1
    print(folder / "bin" / "python")
    return 0


def build_once(folder: Path, engine: str) -> None:
    """Build ``folder`` unless a finished build is there.

    Scripts of a virtual environment hold its absolute path, so it is built in place: the lock keeps other builders out, and
    the marker, written last, tells a finished build from one that was interrupted, which is deleted and made anew.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / COMPLETE_MARKER).is_file():
            return
        if folder.exists():
            shutil.rmtree(folder)
        print(f"building {folder} (several minutes, about 3 GB)", file=sys.stderr)
        venv.create(folder, with_pip=True)
        install(folder / "bin" / "python", requirements_file(engine))
        subprocess.run([folder / "bin" / "python", "-c", f"import {engine}"], check=True, stdout=sys.stderr, cwd=folder)
        (folder / COMPLETE_MARKER).touch()


def install(python: Path, requirements: Path) -> None:
    """Install the pins: torch with its dependencies (which differ by platform), the rest exactly as listed."""
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, torch, "--constraint", requirements], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", "--requirement", requirements], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
