"""Where workers run: in a bubblewrap sandbox where the system has one that works, else as bare processes (docs/sandbox.md).

A sandbox shows the system's libraries, Python, and what can be imported. It shows no home, runs or keys.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megarl.config.schema import SandboxConfig
from megarl.workers.answers import clean

_PROBE_TIMEOUT = 60.0  # seconds
_MAX_REASON = 60  # characters
_NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/pki", "/run/systemd/resolve")
_NOBODY = "65534"
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/gnu/store")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/fonts")
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """How the processes of a machine can be kept apart from it.

    Attributes:
        program: the path of bubblewrap; None where workers are bare processes.
        has_proc: whether it may mount /proc, which containers often forbid.
        reason: why there is no bubblewrap; empty where there is.
    """

    program: str | None
    has_proc: bool
    reason: str

    @property
    def num_wrappers(self) -> int:
        """How many processes of its own are between the one that is started and the worker's."""
        return 0 if self.program is None else 2  # the init of the namespace and, below it, the worker itself

    def describe(self) -> str:
        """Describe the sandbox in one line for the log."""
        if self.program is not None:
            return f"scorers, environments and chat templates run in sandboxes of {self.program}"
        return (
            f"scorers, environments and chat templates run WITHOUT a sandbox, only with limits: {self.reason}; tasks of "
            f"reasoning_gym that execute answers are refused; install bubblewrap 0.8 or newer (docs/sandbox.md)"
        )

    def command(self, arguments: Sequence[str], config: SandboxConfig, modules: Iterable[str]) -> list[str]:
        """Return the command line of a worker.

        Args:
            arguments: of the Python interpreter.
            config: what the worker may do.
            modules: names of modules of the user that it imports, beside those on ``sys.path``.
        """
        python = [sys.executable, *arguments]
        if self.program is None:
            return python
        return [self.program, *self._namespaces(config), *self._files(config, modules), "--", *python]

    def _namespaces(self, config: SandboxConfig) -> list[str]:
        apart = ["--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        network = [] if config.network else ["--unshare-net"]
        return [*apart, *network, "--die-with-parent", "--new-session", "--uid", _NOBODY, "--gid", _NOBODY]

    def _files(self, config: SandboxConfig, modules: Iterable[str]) -> list[str]:
        readable = [*config.readable, *(map(Path, _NETWORK_FILES) if config.network else ())]
        paths = visible_paths(modules, readable)
        size = str(memory_bytes(config) // 16)
        files = ["--proc", "/proc"] if self.has_proc else []
        files += ["--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--size", size, "--tmpfs", "/tmp"]
        for link, target in paths.links:
            files += ["--symlink", target, link]
        for path in paths.folders_and_files:
            files += ["--ro-bind", path, path]
        for writable in config.writable:
            path = os.path.abspath(writable)
            files += ["--dev-bind" if path.startswith("/dev/") else "--bind", path, path]
        folder = os.getcwd() if paths.shows(os.getcwd()) else "/tmp"
        return [*files, "--remount-ro", "/", "--chdir", folder]


def memory_bytes(config: SandboxConfig) -> int:
    """Return the most memory of a worker."""
    return int(config.memory_gib * 2**30)


def worker_environment(config: SandboxConfig) -> dict[str, str]:
    """Return the environment variables of a worker: what a program needs to start, and those that the configuration names."""
    names = ["LD_LIBRARY_PATH", *config.environment]  # without it, an interpreter of a module system finds no libpython
    passed = {name: os.environ[name] for name in names if name in os.environ}
    # one thread each: workers are many and share their cores with the ranks
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "USER": "nobody", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"} | passed


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """Find the best sandbox that this machine has, tried out once."""
    program = shutil.which("bwrap")
    if program is None:
        return Sandbox(program=None, has_proc=False, reason="there is no bubblewrap (bwrap) on PATH")
    reason = ""
    for has_proc in (True, False):
        sandbox = Sandbox(program=program, has_proc=has_proc, reason="")
        reason = _fault(sandbox)
        if not reason:
            return sandbox
    return Sandbox(program=None, has_proc=False, reason=f"bwrap does not work here ({reason})")


def _fault(sandbox: Sandbox) -> str:
    """Return why a worker cannot run in it; empty if it can."""
    config = SandboxConfig()
    command = sandbox.command(["-c", "import megarl.workers.worker"], config, [])
    try:
        result = subprocess.run(
            command,
            env=worker_environment(config) | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _shortened(str(error))
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"]
    return _shortened(lines[-1])


def _shortened(text: str) -> str:
    line = clean(text)
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 1] + "…"


@dataclass(frozen=True, slots=True)
class VisiblePaths:
    """What a sandbox shows.

    Attributes:
        links: ``(link, target)`` of the system's own symbolic links, such as /lib to usr/lib.
        folders_and_files: absolute, each without those below it.
    """

    links: tuple[tuple[str, str], ...]
    folders_and_files: tuple[str, ...]

    def shows(self, path: str) -> bool:
        """Return whether the path is among them or below one of them."""
        return any(Path(path).is_relative_to(shown) for shown in self.folders_and_files)


def visible_paths(modules: Iterable[str], readable: Iterable[Path]) -> VisiblePaths:
    """Return what a worker needs that imports ``modules`` and what is on ``sys.path``, and what the user lets it read."""
    links = tuple((path, os.readlink(path)) for path in _SYSTEM if os.path.islink(path))
    wanted = [*(path for path in _SYSTEM if not os.path.islink(path)), *_SYSTEM_FILES]
    wanted += [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.executable, os.path.realpath(sys.executable)]
    wanted += [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    for entry in sys.path:
        wanted += _importable(Path(entry or os.curdir).absolute())
    for module in ("megarl", *modules):  # an editable install has its packages beside sys.path
        wanted += _locations(module)
    wanted += map(str, readable)
    # a path below a link is shown at the place that it stands for, too
    absolute = {os.path.abspath(path) for path in wanted} | {os.path.realpath(path) for path in wanted}
    below_links = {path for path in absolute if any(Path(path).is_relative_to(link) for link, _ in links)}
    shown = _outermost(path for path in absolute - below_links if os.path.exists(path))
    return VisiblePaths(links=links, folders_and_files=tuple(shown))


def _importable(entry: Path) -> list[str]:
    """Return what can be imported from an entry of ``sys.path``; all of it only where packages are installed.

    A user's folder holds more than code: data, runs, keys.
    """
    if any(part in _INSTALLED for part in entry.parts) or not entry.is_dir():
        return [str(entry)]
    try:
        children = list(entry.iterdir())
    except OSError:
        return []
    return [str(child) for child in children if child.suffix in (".py", ".so") or (child / "__init__.py").is_file()]


def _locations(module: str) -> list[str]:
    """Return where the top-level package or module of that name is; it may have no ``__init__.py``."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return []  # importing it tells why
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return list(spec.submodule_search_locations)
    return [spec.origin] if spec.origin else []


def _outermost(paths: Iterable[str]) -> list[str]:
    shown: list[str] = []
    for path in sorted(paths, key=lambda path: Path(path).parts):
        if not any(Path(path).is_relative_to(folder) for folder in shown):
            shown.append(path)
    return shown
