"""What the ``megarl`` commands and the tools share: options, errors of one line, exit statuses, and a progress bar."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megarl.crash import write_crash
from megarl.errors import MESSAGE_LENGTH, ConfigError, MegaRLError, RunStopped, cut, escaped, fitted, listed, one_line

FAILED = 1  # a comparison found a difference, or something happened that no error of ours describes
REFUSED = 2
STOPPED = 75  # a signal ended the run: EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # as a shell has it for SIGINT

_UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer exports its subclasses only


ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, overrides the file; may be repeated.")]


class Dtype(StrEnum):
    """Types that weights can be cast to, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def finite(value: float | None) -> float | None:
    """Return the value of an option, for its ``callback``; refuse NaN, which passes every bound."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def run(app: typer.Typer) -> None:
    """Run a command and exit: with 0 when it is done, 1 or 2 after one line on standard error, 130 when it is interrupted."""
    _silence_libraries()
    try:
        status = app(standalone_mode=False)
    except RunStopped as error:
        _end(STOPPED, fitted(f"stopped: {error}"))
    except MegaRLError as error:
        _end(REFUSED, line_of(error))
    except _UsageError as error:
        _end(REFUSED, _line_of_usage(error))
    except KeyboardInterrupt:
        _end(INTERRUPTED, "interrupted")
    except Exception as error:
        _end(FAILED, fitted(f"error: {one_line(error)}; this is not expected: the traceback is in {write_crash(error)}"))
    sys.exit(status if isinstance(status, int) else 0)


def line_of(error: MegaRLError) -> str:
    """Return the line that is printed for an error: its first mistake whole, and of others what they are about."""
    kind = "configuration error" if isinstance(error, ConfigError) else "error"
    first, *others = error.mistakes or (type(error).__name__,)
    if not others:
        return fitted(f"{kind}: {first}")
    subjects = listed([_subject(other, first) for other in others], 3)
    more = fitted(f"; and {len(others)} more: {subjects}", 100)
    return fitted(f"{kind}: {first}", MESSAGE_LENGTH - len(more)) + more


def _subject(mistake: str, first: str) -> str:
    """Return what a mistake is about: its key, behind the file's name that it shares with the first one."""
    parts = mistake.split(": ")
    subject = parts[1] if len(parts) > 2 and first.startswith(f"{parts[0]}: ") else parts[0]
    return cut(escaped(subject), 40)


def _end(status: int, line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr)
    sys.exit(status)


def _line_of_usage(error: Exception) -> str:
    """Return the line for arguments that the command does not take; the whole help where none were given."""
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else os.path.basename(sys.argv[0])
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(message)
    given = _given(getattr(getattr(error, "param", None), "opts", []))
    return fitted(f"error: {message.rstrip('.')}{given}; see {command} --help")


def _given(option: Sequence[str]) -> str:
    """Return what an option, by its names, got on the command line, in words."""
    for name, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        flag, equals, value = name.partition("=")
        if flag in option:
            return f" (given: {cut(value if equals else following, 40)})"
    return ""


def _silence_libraries() -> None:
    """Leave out what is meant for the developers of libraries, and is printed by every rank."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    # the process that cleans up after multiprocessing takes the options of this one; after a killed rank it finds what it held
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    logging.getLogger("megatron").setLevel(logging.ERROR)


@contextmanager
def progress_of_bytes(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's standard error; the block tells it the bytes just done and the bytes of all."""
    console = Console(stderr=True)
    columns = (TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)
