"""Every user error is one line with the value, the reason and the fix, and exit status 2; never a traceback."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from runs import logged, make_model, megarl_here, write_config

SCORERS = """
def raises(response, reference):
    raise ValueError("no score today")
"""

Capture = pytest.CaptureFixture[str]


def refusal(capfd: Capture, *arguments: object) -> str:
    """Standard error of a command that ends with exit status 2."""
    capfd.readouterr()
    assert megarl_here(*arguments) == 2
    error = capfd.readouterr().err
    assert error.endswith("\n")
    return error[:-1]


def changed(folder: Path, workspace: Path, **changes: Any) -> Path:
    """A config in ``folder`` for the workspace's model."""
    return write_config(folder, **({"model": {"path": str(workspace / "model")}} | changes))


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "line"),
    [
        (
            ["optimizer.learning_rat=1"],
            2,
            "--set: optimizer.learning_rat: unknown key; the nearest valid key is optimizer.learning_rate",
        ),
        (
            ["policy.parallel.tp=3"],
            3,
            "policy.parallel.tp: tp 3 does not divide the model's num_attention_heads 4; "
            "tp must divide num_attention_heads 4, num_key_value_heads 2, intermediate_size 96; "
            "and 1 more: policy.parallel.tp",
        ),
        (
            ["policy.parallel.tp=4"],
            4,
            "policy.parallel.tp: tp 4 does not divide the model's num_key_value_heads 2; "
            "tp must divide num_attention_heads 4, num_key_value_heads 2, intermediate_size 96",
        ),
        (
            [],
            3,
            "policy.parallel: world size 3 = tp 2 × pp 1 × cp 1 × dp ?: 3 is not divisible by 2; "
            "use 2 or 4 ranks, or smaller tp, pp or cp",
        ),
        (
            ["rewards.scorers=[{type: python, function: no_such_module}]"],
            2,
            "rewards.scorers.0.function: 'no_such_module' is not module:function for type python; "
            "give for example my_package.rewards:score",
        ),
    ],
)
def test_config(workspace: Path, tmp_path: Path, capfd: Capture, overrides: list[str], num_ranks: int, line: str) -> None:
    path = changed(tmp_path, workspace)
    error = refusal(capfd, "train", path, "--nproc", num_ranks, *sets(*overrides))
    assert error == f"configuration error: {line}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [
        ([], 80, "{path} has no rows; write one JSON object a line"),
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a"'], 80, "{path}:2: not JSON (Expecting ',' delimiter at column 15); "),
        (
            ['{"prompt": "a", "answer": "b"}', '{"prompt": "a", "answr": "b"}'],
            80,
            "{path}:2: no field 'answer' (it has: prompt, answr); add it or set answer_field",
        ),
        (
            ['{"prompt": "abcdefgh", "answer": "b"}'],
            8,
            "{path}:1: prompt train/0 has 9 tokens, above rollout.max_prompt_tokens = 8; raise the limit or leave the row out",
        ),
    ],
)
def test_data(workspace: Path, tmp_path: Path, capfd: Capture, rows: list[str], limit: int, expected: str) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f"{row}\n" for row in rows))
    path = changed(tmp_path, workspace, data={"template": "{prompt}\n", "train": {"type": "jsonl", "path": str(data)}})
    error = refusal(capfd, "train", path, "--nproc", 2, *sets("evaluation.data=null", f"rollout.max_prompt_tokens={limit}"))
    assert error.startswith("error: " + expected.format(path=data))
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt", "missing tensor"])
def test_weights(workspace: Path, tmp_path: Path, capfd: Capture, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    file = model / "model.safetensors"
    match damage:
        case "missing":
            file.unlink()
            expected = (
                f"configuration error: model.path: {model} has no *.safetensors file; "
                "give a folder with weights or set model.init to random"
            )
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
            expected = f"error: {file} is truncated or corrupt ("
        case "corrupt":
            file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
            expected = f"error: {file} is truncated or corrupt ("
        case _:
            tensors = load_file(file)
            del tensors["model.norm.weight"]
            save_file(tensors, file)
            expected = f"error: {model}: weights do not fit config.json; missing: model.norm.weight"
    error = refusal(capfd, "train", write_config(tmp_path), "--nproc", 2)
    assert error.startswith(expected)
    assert len(error.splitlines()) == 1


def test_run_folder(finished: Path, tmp_path: Path, capfd: Capture) -> None:
    path = finished.parent / "config.yaml"
    assert refusal(capfd, "train", path, "--nproc", 2) == (
        f"configuration error: run_dir {finished} already holds a run; add --resume to go on with it or choose another --run-dir"
    )
    assert refusal(capfd, "train", path, "--nproc", 2, "--run-dir", tmp_path, "--resume") == (
        f"error: --resume: {tmp_path / 'checkpoints'} has no finished checkpoint; start without --resume in another --run-dir"
    )


def test_resume_with_another_model(finished: Path, tmp_path: Path, capfd: Capture) -> None:
    make_model(tmp_path / "model", layers=2)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "metrics.jsonl").read_text()
    error = refusal(capfd, "train", write_config(tmp_path, steps=6), "--nproc", 2, "--resume")
    assert error.startswith("configuration error: --resume: model.path is ") and ", whose files differ from" in error
    assert len(error.splitlines()) == 1
    assert (run / "metrics.jsonl").read_text() == before


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_rendezvous_port_in_use(
    workspace: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}.items():
        monkeypatch.setenv(name, value)
    error = refusal(capfd, "train", changed(tmp_path, workspace, policy={}))
    assert error.startswith(f"configuration error: rank 0 cannot use 127.0.0.1:{taken_port} for the rendezvous: ")
    assert error.endswith(" and MASTER_PORT to a free port of it")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_engine_port_in_use(workspace: Path, tmp_path: Path, capfd: Capture, taken_port: int, engine: str) -> None:
    path = changed(tmp_path, workspace)
    error = refusal(capfd, "train", path, "--nproc", 2, *sets(f"rollout.engine={engine}", f"rollout.{engine}.port={taken_port}"))
    assert error == (
        f"error: port {taken_port} of 127.0.0.1 cannot be used (Address already in use); "
        f"set rollout.{engine}.port to a free port, or to 0 for any"
    )


@pytest.mark.parametrize(
    ("function", "start", "reason"),
    [
        ("broken_scorer:raises", "error: scorer", "no score today"),
        ("no_such_module:score", "configuration error: scorer 'python': cannot import no_such_module:score: ", "No module named"),
    ],
)
def test_scorer(
    workspace: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, function: str, start: str, reason: str
) -> None:
    (tmp_path / "broken_scorer.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(tmp_path, workspace, evaluation={}, rewards={"scorers": [{"type": "python", "function": function}]})
    error = refusal(capfd, "train", path, "--nproc", 2)
    assert error.startswith(start) and reason in error
    assert len(error.splitlines()) == 1


def test_reward_server_that_is_not_there(workspace: Path, tmp_path: Path, capfd: Capture) -> None:
    scorer = {"type": "reward_server", "url": "http://127.0.0.1:9", "engine": "sglang"}
    path = changed(tmp_path, workspace, evaluation={}, rewards={"scorers": [scorer]})
    error = refusal(capfd, "train", path, "--nproc", 2)
    assert error.startswith("error: scorer 'reward_server': http://127.0.0.1:9/classify scores nothing (ClientConnectorError")
    assert len(error.splitlines()) == 1


def test_training_that_diverges(workspace: Path, tmp_path: Path, capfd: Capture) -> None:
    optimizer = {"learning_rate": 1e30, "clip_gradient": 0.0, "max_skipped_steps": 2}
    path = changed(tmp_path, workspace, kind="sft", steps=9, evaluation={}, optimizer=optimizer, checkpoint={"every": 0})
    error = refusal(capfd, "train", path, "--nproc", 2)
    assert error == (
        "error: gradient norm nan in 3 consecutive steps, more than optimizer.max_skipped_steps 2; "
        "lower the learning rate or look at the last rollouts"
    )
    assert [(step, metrics["skipped_updates"]) for step, metrics in logged(tmp_path / "run")] == [(1, 0.0), (2, 1.0), (3, 1.0)]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of ``request.param`` KiB; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def mounted_as(source: Path, folder: Path) -> Iterator[None]:
    """Have the source at ``folder`` too: a link would be refused."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "--bind", source, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("small_disk", [1024], indirect=True)
def test_disk_too_small_for_a_checkpoint(workspace: Path, tmp_path: Path, small_disk: Path, capfd: Capture) -> None:
    path = changed(tmp_path, workspace, steps=1, kind="sft", evaluation={}, optimizer={})
    error = refusal(capfd, "train", path, "--nproc", 2, "--run-dir", small_disk / "run")
    checkpoint = small_disk / "run" / "checkpoints" / "step_00000001"
    assert error.startswith(f"error: cannot write {checkpoint}: it needs up to 0.00 GB and its disk has 0.00 ")
    assert error.endswith("GB free; free some space or lower checkpoint.keep")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("small_disk", [300], indirect=True)
def test_disk_full_while_exporting(workspace: Path, tmp_path: Path, small_disk: Path, capfd: Capture) -> None:
    run = small_disk / "run"
    (tmp_path / "checkpoints").mkdir()
    path = changed(tmp_path, workspace, steps=1, kind="sft", evaluation={}, optimizer={})
    with mounted_as(tmp_path / "checkpoints", run / "checkpoints"):
        error = refusal(capfd, "train", path, "--nproc", 2, "--run-dir", run)
    assert error.startswith(f"error: cannot write the Hugging Face folder {run / 'hf'}: ")
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert not list(run.glob("hf*"))
    # the checkpoint is whole: nothing of the training is lost
    assert json.loads((tmp_path / "checkpoints" / "step_00000001" / "manifest.json").read_text())["state"]["step"] == 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("small_disk", [2300], indirect=True)
def test_disk_full_while_writing_a_checkpoint(
    workspace: Path, tmp_path: Path, small_disk: Path, capfd: Capture, asynchronous: bool
) -> None:
    """There is room for the tensors, as checked before, but not for what is written around them."""
    run = tmp_path / "run"
    path = changed(tmp_path, workspace, steps=1, kind="sft", evaluation={}, optimizer={}, checkpoint={"asynchronous": asynchronous})
    with mounted_as(small_disk, run / "checkpoints"):
        error = refusal(capfd, "train", path, "--nproc", 2)
    what = f"a checkpoint into {run / 'checkpoints'}" if asynchronous else run / "checkpoints" / "step_00000001"
    match = re.match(rf"error: cannot write {re.escape(str(what))} \((\d+\.\d) MB free there\): .", error)
    assert match and float(match[1]) < 1, error
    assert error.endswith("; earlier checkpoints are untouched")
    assert len(error.splitlines()) == 1
