"""A conversion that is killed, or whose disk fills up, leaves nothing that looks whole and is continued by the same command."""

import os
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import SimpleQueue, get_context
from pathlib import Path
from unittest import mock

import pytest

from megarl.weights.files import partial_folder, stored_tensors
from tools import SMALL_FILES, assert_same, make_model, refusal, tensors_of, tool

CONVERSIONS = [
    ("hf_to_megatron", "model", "__0_2.distcp"),
    ("megatron_to_hf", "megatron", "model-00002-of-00002.safetensors"),
    ("to_engine_shards", "megatron", "model-rank-1-part-0.safetensors"),
]
OPTIONS: dict[str, tuple[object, ...]] = {name: SMALL_FILES for name, *_ in CONVERSIONS}
OPTIONS["to_engine_shards"] += ("--engine", "vllm", "--tp", 2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``megatron``."""
    folder = tmp_path_factory.mktemp("good")
    make_model(folder / "model", "llama")
    assert tool("hf_to_megatron", folder / "model", folder / "megatron") == 0
    return folder


def convert_and_die(name: str, source: Path, output: Path, last: str) -> None:
    """Killed while the file ``last`` is on the disk and has not got its name."""
    replace = os.replace

    def die(start: Path, end: Path) -> None:
        if end.name == last:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(start, end)

    with mock.patch.object(partial_folder.os, "replace", die):
        tool(name, source, output, *OPTIONS[name])


@pytest.mark.parametrize(("name", "source", "last"), CONVERSIONS)
def test_killed_and_continued(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, source: str, last: str
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    process = get_context("fork").Process(target=convert_and_die, args=(name, good / source, output, last))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    assert "is an unfinished conversion" in refusal(capfd, "inspect", partial)
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*[0-9].distcp")}
    finished |= {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    finished.pop("__0_0.distcp", None)  # a few objects, written each time
    assert len(finished) == 1 and last not in finished

    error = refusal(capfd, name, good / source, output, *OPTIONS[name], "--dtype", "bfloat16")
    assert error == f"error: {partial} holds an unfinished conversion with another dtype; remove it, or repeat that conversion"
    assert tool(name, good / source, output, *OPTIONS[name]) == 0
    assert not partial.exists()
    for file, modified in finished.items():
        assert (output / file).stat().st_mtime_ns == modified
    assert tool("verify", good / "model", output) == 0


def test_another_input_does_not_continue(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", "llama")
    args = ("hf_to_megatron", model, tmp_path / "out", "__0_2.distcp")
    process = get_context("fork").Process(target=convert_and_die, args=args)
    process.start()
    process.join(timeout=60)
    (model / "model.safetensors").touch()
    assert "with another state of the input's files;" in refusal(capfd, "hf_to_megatron", model, tmp_path / "out", *SMALL_FILES)
    assert "with another input;" in refusal(capfd, "hf_to_megatron", good / "model", tmp_path / "out", *SMALL_FILES)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system mounted with the options ``request.param``; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(("name", "source", "last"), CONVERSIONS)
@pytest.mark.parametrize("disk", ["size=500k"], indirect=True)
def test_disk_that_fills_up(
    good: Path, disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, source: str, last: str
) -> None:
    error = refusal(capfd, name, good / source, disk / "out", *OPTIONS[name])
    assert error.startswith(f"error: cannot write {disk / 'out'}: it needs 0.00 GB and {disk} has 0.00 GB free; free some space")
    # and when something else takes the space that was there at the start
    usage = partial_folder.shutil.disk_usage(disk)
    with monkeypatch.context() as patch:
        patch.setattr(partial_folder.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        error = refusal(capfd, name, good / source, disk / "out", *OPTIONS[name])
    assert error.startswith(f"error: cannot write {disk / 'out'}: ") and "No space left on device" in error
    assert error.endswith(f"what is finished stays in {disk / 'out.partial'}, the same command continues it")
    assert not (disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    assert tool(name, good / source, disk / "out", *OPTIONS[name]) == 0
    assert tool("verify", good / "model", disk / "out") == 0


@pytest.mark.parametrize("disk", ["ro"], indirect=True)
def test_read_only_output(good: Path, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, source, _ in CONVERSIONS:
        error = refusal(capfd, name, good / source, disk / "out", *OPTIONS[name])
        assert error.startswith(f"error: cannot write {disk / 'out'}: ") and "Read-only file system" in error


def test_two_at_once(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with partial_folder.PartialFolder(tmp_path / "out", {}) as first:
        error = refusal(capfd, "hf_to_megatron", good / "model", tmp_path / "out")
        assert error == f"error: another process writes {first.path}; wait for it or choose another output"


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def run_and_measure(results: "SimpleQueue[int]", name: str, arguments: tuple[object, ...]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = resident_bytes("VmRSS")
    assert tool(name, *arguments) == 0
    results.put(resident_bytes("VmHWM") - before)


def peak_bytes(name: str, *arguments: object) -> int:
    """Highest resident memory of a tool above that of this process, of which it is a fork."""
    context = get_context("fork")
    results: SimpleQueue[int] = context.SimpleQueue()
    process = context.Process(target=run_and_measure, args=(results, name, arguments))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    return results.get()


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "WINDOW_BYTES", 2**20)  # as the models are small
    peaks: dict[str, list[int]] = {name: [] for name in ("hf_to_megatron", "megatron_to_hf", "to_engine_shards", "verify")}
    num_bytes = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        sizes = {"num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 2048}
        make_model(folder / "model", "llama", **sizes)
        num_bytes.append((folder / "model" / "model.safetensors").stat().st_size)
        peaks["hf_to_megatron"].append(peak_bytes("hf_to_megatron", folder / "model", folder / "megatron"))
        peaks["megatron_to_hf"].append(peak_bytes("megatron_to_hf", folder / "megatron", folder / "again"))
        to_shards = (folder / "megatron", folder / "shards", "--engine", "vllm", "--tp", 2)
        peaks["to_engine_shards"].append(peak_bytes("to_engine_shards", *to_shards))
        peaks["verify"].append(peak_bytes("verify", folder / "again", folder / "shards"))
        assert_same(tensors_of(folder / "again"), tensors_of(folder / "model"))
    assert num_bytes[1] > 3.5 * num_bytes[0]
    for name, (small, large) in peaks.items():
        assert large - small < 0.2 * (num_bytes[1] - num_bytes[0]), (name, small, large, num_bytes)
