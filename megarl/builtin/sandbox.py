"""What a worker process may do that runs code on responses."""

from pathlib import Path

from megarl.section import Section, key


class SandboxConfig(Section):
    """What worker processes of scorers or environments may do beside computing (docs/sandbox.md); nothing by default."""

    network: bool = key(False, "-", "Let them use the network.")
    environment: list[str] = key(list, "names", "Environment variables that they get; no others.")
    readable: list[Path] = key(
        list,
        "files or folders",
        "What they may read beside Python, its packages and the modules on PYTHONPATH.",
    )
    writable: list[Path] = key(
        list, "files or folders", "What they may also write; a path below /dev is a device. /tmp is always theirs, empty and small."
    )
    memory_gib: float = key(
        4.0, "GiB", "Address space of each of their processes, and memory of all processes of a worker.", ge=0.25, le=1048576
    )
    processes: int = key(8, "processes", "Most processes that one worker may start at a time.", ge=0, le=4096)
