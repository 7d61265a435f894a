"""Who may write into a run folder, what a refused resume leaves behind, and how a signal ends a run."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from megarl.cli import main  # noqa: F401  (imported once, before ranks are forked)
from megarl.config.load import load_config
from megarl.errors import CheckpointError, ConfigError, MegaRLError
from megarl.loop.launch import launch_training
from megarl.loop.run_folder import run_folder
from megarl.weights.checkpoint import whole_checkpoints
from runs import MEGARL, TIMEOUT, logged, megarl_here, num_logged, write_config

SFT = {"kind": "sft", "observe": {"tensorboard": False, "progress": False}, "policy": {}, "evaluation": {}}


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and the finished ``run`` of two steps of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "model").symlink_to(workspace / "model")
    write_config(folder, steps=2, **SFT)
    launch_training(load_config(folder / "config.yaml"), 1, resume=False)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folder: Path, *overrides: str) -> str:
    """Resume the run in ``folder/run`` with other settings, which must be refused in one line and change nothing."""
    run = folder / "run"
    before = snapshot(run)
    config = load_config(folder / "config.yaml", [f"run_dir={run}", "steps=3", *overrides])
    with pytest.raises(MegaRLError) as error:
        launch_training(config, 1, resume=True)
    assert snapshot(run) == before
    line = str(error.value)
    assert line.isprintable(), line
    return line


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kind=rl"], "--resume: kind is rl, and the run in"),
        (["seed=9"], "--resume: seed is 9"),
        (["model.init=random"], "--resume: model.init is random"),
    ],
)
def test_another_run_is_refused_and_nothing_is_changed(copy: Path, overrides: list[str], words: str) -> None:
    assert words in refused(copy, *overrides)


def test_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy / "model", tmp_path / "other"))
    moved = load_config(copy / "config.yaml", [f"model.path={other}", f"run_dir={copy / 'run'}", "steps=3"])
    with run_folder(moved, resume=True):
        pass  # a copy of the same files is the same model
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert f"model.path is {other}, whose files differ" in refused(copy, f"model.path={other}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "checkpoints" / "step_00000002" / "manifest.json").write_text("{}"), "has no format"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n'), "metrics.jsonl"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no finished checkpoint"),
        (lambda run: (run / "checkpoints").rename(run / "c") and (run / "checkpoints").symlink_to("c"), "symbolic link"),
    ],
)
def test_damaged_runs_are_refused_and_nothing_is_changed(copy: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(copy / "run")
    assert words in refused(copy)


def test_an_accepted_resume_goes_on_with_its_config(copy: Path) -> None:
    config = load_config(copy / "config.yaml", [f"run_dir={copy / 'run'}", "steps=3"])
    with (copy / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time')  # a line that a kill cut short
    launch_training(config, 1, resume=True)
    assert yaml.safe_load((copy / "run" / "config.yaml").read_text())["steps"] == 3
    assert [step for step, _ in logged(copy / "run")] == [1, 2, 3]
    assert not (copy / "run" / "config.yaml.pending").exists()


def test_secrets_are_not_saved_and_not_printed(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(workspace / "model")
    secrets = ("hunter2", "sk-5ecret", "t0ken/x")
    vllm = {"arguments": {"api_key": "sk-5ecret", "other": "http://h/?token=t0ken/x"}}
    path = write_config(tmp_path, rollout={"vllm": vllm, "engine": "vllm", "prompts_per_step": 4, "samples_per_prompt": 4})
    config = load_config(path)
    with run_folder(config, resume=False):
        saved = (config.run_dir / "config.yaml.pending").read_text()
    assert not any(secret in saved for secret in secrets) and "http://h/?token=***" in saved
    assert megarl_here("config", path) in (0, 2)
    assert megarl_here("config", path, "--set", "rollout.vllm.url=http://user:hunter2@localhost:1") == 2
    assert megarl_here("config", path, "--set", "rollout.vllm.url=[http://user:hunter2@localhost:1]") == 2
    assert megarl_here("config", path, "--set", "rollout.vllm.arguments.api_key.b=sk-5ecret") == 2
    (tmp_path / "saved.yaml").write_text(saved)
    assert megarl_here("config", tmp_path / "saved.yaml") == 2
    captured = capfd.readouterr()
    shown = captured.out + captured.err
    assert "its secret was removed when the run saved this config" in shown
    assert not any(secret in shown for secret in secrets)


def test_a_folder_belongs_to_one_run_and_a_killed_one_gives_it_up(trained: Path, copy: Path) -> None:
    config = load_config(copy / "config.yaml", [f"run_dir={copy / 'run'}", "steps=3"])
    child = os.fork()
    if child == 0:  # another run, which ends only by a kill
        with run_folder(config, resume=True):
            (copy / "held").touch()
            signal.pause()
    wait_until((copy / "held").exists)
    with pytest.raises(ConfigError, match=rf"in use by another run \(host {os.uname().nodename}, pid {child}\)"):
        launch_training(config, 1, resume=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with run_folder(config, resume=True):
        pass


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, until it has done its first step."""
    command = [str(MEGARL), "train", str(folder / "config.yaml"), "--run-dir", str(folder / "run"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            wait_until(lambda: num_logged(folder / "run") > 1 or process.poll() is not None)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "to_group", "nproc"), [(signal.SIGTERM, False, 2), (signal.SIGUSR1, True, 2), (signal.SIGTERM, True, 1)]
)
def test_a_signal_saves_and_ends_the_run(
    workspace: Path, tmp_path: Path, number: signal.Signals, to_group: bool, nproc: int
) -> None:
    (tmp_path / "model").symlink_to(workspace / "model")
    write_config(tmp_path, steps=100_000, checkpoint={"every": 0, "asynchronous": nproc == 1}, **SFT)
    with running(tmp_path, "--nproc", str(nproc)) as process:
        everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, errors
    lines = [line for line in errors.splitlines() if "notice" not in line]
    assert len(lines) == 2 and number.name in lines[0], errors
    (checkpoint,) = whole_checkpoints(tmp_path / "run" / "checkpoints")
    step = json.loads((checkpoint / "manifest.json").read_text())["state"]["step"]
    assert lines[1] == f"stopped: step {step} of 100000 is done and saved; go on with --resume"
    assert logged(tmp_path / "run")[-1][0] == step
    assert psutil.wait_procs(everything, timeout=10)[1] == []


def test_a_second_signal_ends_at_once(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(workspace / "model")
    write_config(tmp_path, steps=100_000, **SFT)
    with running(tmp_path) as process:
        (rank,) = (one for one in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(one.cmdline()))
        rank.suspend()  # it cannot come to the end of its step
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None and "SIGTERM: the run saves" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == -signal.SIGTERM
    assert psutil.wait_procs([rank], timeout=10)[1] == []


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_MAX_RESTARTS"])
def test_no_checkpoints_under_a_launcher_that_starts_again_is_warned_of(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    monkeypatch.setenv(variable, "3")
    config = load_config(copy / "config.yaml", [f"run_dir={copy / 'run'}", "checkpoint.every=0"])
    with pytest.raises(ConfigError, match="already holds a run"):
        launch_training(config, 1, resume=False)
    assert "checkpoint.every is 0" in caplog.text


def test_resume_without_a_checkpoint_is_refused(workspace: Path, tmp_path: Path) -> None:
    config = load_config(workspace / "config.yaml", [f"run_dir={tmp_path}"])
    with pytest.raises(CheckpointError, match="has no finished checkpoint"):
        launch_training(config, 2, resume=True)


def test_what_is_written_can_be_read_by_whom_the_umask_lets(trained: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    files = [path for path in (trained / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "config.yaml", "metrics.jsonl", "manifest.json"}
    assert [path for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask] == []
