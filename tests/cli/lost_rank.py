"""``megarl``, one rank of which meets with an accident: ``python lost_rank.py RANK PHASE ACCIDENT arguments...``."""

import os
import signal
import sys
import time

import torch.distributed as dist

import megarl.loop.run


def _loop() -> None:
    while True:
        time.sleep(0.1)


def _raise(error: BaseException) -> None:
    raise error


ACCIDENTS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": _loop,
    "exit": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit(3),
    "memory": lambda: bytearray(1 << 60),
    "bug": lambda: _raise(ValueError("a\nb\x1b[31m" + "c" * 500)),
}


def main() -> None:
    rank, phase, accident = int(sys.argv[1]), sys.argv[2], ACCIDENTS[sys.argv[3]]
    announce = megarl.loop.run.announce_phase

    def announce_and_fail(name: str) -> None:
        announce(name)
        if name == phase and dist.get_rank() == rank:
            accident()

    megarl.loop.run.announce_phase = announce_and_fail
    sys.argv = ["megarl", *sys.argv[4:]]
    from megarl.cli import main as command

    command()


if __name__ == "__main__":
    main()
