"""What of the file system a sandbox shows: the system's libraries, Python, and what can be imported. No home, runs or keys."""

import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/gnu/store")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime", "/etc/fonts")
_INSTALLED = ("site-packages", "dist-packages")


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
        """Whether the path is among them or below one of them."""
        return any(Path(path).is_relative_to(shown) for shown in self.folders_and_files)


def visible_paths(modules: Iterable[str], readable: Iterable[Path]) -> VisiblePaths:
    """What a worker needs that imports ``modules`` and what is on ``sys.path``, and what the user lets it read."""
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
    """What can be imported from an entry of ``sys.path``; all of it only where packages are installed.

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
    """Where the top-level package or module of that name is; it may have no ``__init__.py``."""
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
