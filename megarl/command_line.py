"""What the ``megarl`` command and the tools share: errors of one line, and a progress bar."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megarl.errors import ConfigError, MegaRLError, RunStopped, without_secrets

STOPPED = 75  # exit status of a run that a signal ended: EX_TEMPFAIL of sysexits.h


class Dtype(StrEnum):
    """Types that weights can be cast to, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def run(app: typer.Typer) -> None:
    """Run a command; user errors are one line each, exit status 2."""
    # meant for the developers of these libraries, and printed by every rank
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        app()
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(STOPPED)
    except MegaRLError as error:
        kind = "configuration error" if isinstance(error, ConfigError) else "error"
        for line in str(error).splitlines():
            print(f"{kind}: {without_secrets(line)}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def progress_of_bytes(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error; the block tells it the bytes just done and the bytes of all."""
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)
