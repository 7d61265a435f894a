"""A rank that is killed, hangs or fails ends the run in one line that names it, its phase and how it was lost."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import megarl.loop.run
from lost_rank import announcer_with_accident
from runs import TIMEOUT, megarl_here, processes_naming, write_config

SFT = {"kind": "sft", "observe": {"tensorboard": False, "progress": False}, "evaluation": {}, "sft": {"examples_per_step": 2}}
RL = {"observe": SFT["observe"], "evaluation": {}}
RANK = rf"error: rank 1 of 2 \({re.escape(socket.gethostname())}, process \d+\) "


def children() -> list[psutil.Process]:
    """All processes below this one, but for multiprocessing's own, which stays with it."""
    return [one for one in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(one.cmdline())]


@pytest.mark.parametrize(
    ("accident", "phase", "settings", "words"),
    [
        (
            "SIGKILL",
            "update of step 2",
            SFT,
            "was killed by SIGKILL in update of step 2, as the system does when memory ",
        ),
        ("SIGKILL", "save of step 1", SFT, "was killed by SIGKILL in save of step 1, "),
        ("SIGSEGV", "generate of step 1", RL, "was killed by SIGSEGV in generate of step 1; "),
        ("exit", "update of step 1", SFT, "ended with exit code 0 in update of step 1, without an error; "),
    ],
)
def test_a_killed_rank(
    workspace: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    accident: str,
    phase: str,
    settings: dict[str, object],
    words: str,
) -> None:
    line = line_of_run(workspace, tmp_path, capfd, monkeypatch, accident, phase, settings)
    assert re.match(RANK + re.escape(words), line), line
    assert line.endswith("go on from the last checkpoint with --resume")


@pytest.mark.parametrize(
    ("accident", "phase", "words"),
    [
        ("bug", "save of step 1", "failed in save of step 1: ValueError: a b"),
        ("sys.exit", "update of step 1", "failed in update of step 1: sys.exit(3) was called at lost_rank.py:"),
        ("memory", "update of step 2", "failed in update of step 2: MemoryError: at lost_rank.py:"),
    ],
)
def test_a_failed_rank_leaves_its_traceback(
    workspace: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    accident: str,
    phase: str,
    words: str,
) -> None:
    line = line_of_run(workspace, tmp_path, capfd, monkeypatch, accident, phase, SFT)
    assert re.match(RANK + re.escape(words), line), line
    assert line.endswith("crash_rank1.log")
    traceback = (tmp_path / "run" / "crash_rank1.log").read_text()
    assert "Traceback" in traceback and "announce_and_fail" in traceback


def line_of_run(
    workspace: Path,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    accident: str,
    phase: str,
    settings: dict[str, object],
) -> str:
    """Standard error of a run of two ranks whose rank 1 meets with the accident; nothing is left of it but its folder."""
    (folder / "model").symlink_to(workspace / "model")
    path = write_config(folder, **settings)
    before = children()
    with monkeypatch.context() as patch:
        patch.setattr(megarl.loop.run, "announce_phase", announcer_with_accident(1, phase, accident))
        capfd.readouterr()
        assert megarl_here("train", path, "--nproc", 2) == 2
    assert psutil.wait_procs([process for process in children() if process not in before], timeout=10)[1] == []
    return only_line(capfd.readouterr().err)


def only_line(errors: str) -> str:
    assert errors.count("\n") == 1 and errors.endswith("\n"), errors
    line = errors[:-1]
    assert line.isprintable() and len(line) <= 300, line
    return line


def test_a_stopped_rank_is_named_and_ended(workspace: Path, tmp_path: Path) -> None:
    """The command in its own process, which has to end too: a stopped rank neither answers nor sees any signal but SIGKILL."""
    (tmp_path / "model").symlink_to(workspace / "model")
    path = write_config(tmp_path, distributed_timeout=12.0, **SFT)
    driver = Path(__file__).with_name("lost_rank.py")
    command = [sys.executable, driver, "1", "update of step 2", "SIGSTOP", "train", path, "--nproc", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    ended_at = time.time()
    assert done.returncode == 2, done.stderr
    words = "is stopped (SIGSTOP) in update of step 2: the others waited longer than distributed_timeout 12 s for it; "
    assert re.match(RANK + re.escape(words), only_line(done.stderr)), done.stderr
    assert not processes_naming(tmp_path)
    # step 1 was saved just before; the rest is for what the others say of it, and for a busy machine
    assert ended_at - (tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").stat().st_mtime < 38.0
