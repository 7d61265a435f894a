"""``megarl``, one rank of which meets with an accident: ``python lost_rank.py RANK PHASE ACCIDENT arguments...``."""

import os
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

import megarl.loop.run
from megarl.cli import main


def _raise(error: BaseException) -> None:
    raise error


ACCIDENTS: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(3),
    "memory": lambda: bytearray(1 << 60),
    "bug": lambda: _raise(ValueError("a\nb\x1b[31m" + "c" * 500)),
}


def announcer_with_accident(rank: int, phase: str, accident: str) -> Callable[[str], None]:
    """What takes the place of ``megarl.loop.run.announce_phase``."""
    announce = megarl.loop.run.announce_phase

    def announce_and_fail(name: str) -> None:
        announce(name)
        if name == phase and dist.get_rank() == rank:
            ACCIDENTS[accident]()

    return announce_and_fail


if __name__ == "__main__":
    megarl.loop.run.announce_phase = announcer_with_accident(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.argv = ["megarl", *sys.argv[4:]]
    main()
