"""Files of a run, read back by json and by TensorBoard's own reader."""

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarl.errors import CheckpointError, FileError
from megarl.observe.sinks import MetricsWriter, RolloutWriter, TicketsWriter
from observe.rollouts import group


def read(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 0.5, "kl": math.nan, "ratio": -math.inf}, {"update": 2.0})
        (line,) = read(tmp_path)  # there before close
        writer.write(2, {"loss": 1})
    assert line.pop("time") > 1e9
    assert line == {"step": 1, "metrics": {"loss": 0.5, "kl": None, "ratio": None}, "seconds": {"update": 2.0}}
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, tensorboard=False).close()
    with pytest.raises(FileError, match="File exists"):
        MetricsWriter(tmp_path, tensorboard=False)


def test_killed_process_loses_no_finished_line(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from megarl.observe.sinks import MetricsWriter; "
        f"writer = MetricsWriter(Path({str(tmp_path)!r}), tensorboard=False); "
        "writer.write(1, {'loss': 1.0}); writer.write(2, {'loss': 2.0}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == -9
    assert [line["metrics"]["loss"] for line in read(tmp_path)] == [1.0, 2.0]


def test_resume_forgets_later_steps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "metr')
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=3) as writer:
        for step in (4, 5):
            writer.write(step, {"loss": 10.0 * step, "kl": math.nan}, {"update": 0.5})
    assert [(line["step"], line["metrics"]["loss"]) for line in read(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert [event.value for event in events.Scalars("seconds/update")] == [0.5, 0.5]
    assert "kl" not in events.Tags()["scalars"]


def test_resume_refuses_a_file_that_is_not_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: is not a line of this log"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=2)


def test_rollouts_are_spread_over_groups(tmp_path: Path) -> None:
    groups = [group("a", [0.5, math.nan], failures=[(), ("exact: timeout",)]), group("b", [1.0]), group("c", [0.0, 0.25])]
    RolloutWriter(tmp_path, 4).write(12, groups)
    text = (tmp_path / "rollouts" / "step_000012.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["prompt_id"], line["sample_index"]) for line in lines] == [("a", 0), ("b", 0), ("c", 0), ("a", 1)]
    assert "antwoord é a.0" in text
    assert lines[0] == {
        "prompt_id": "a",
        "sample_index": 0,
        "prompt": "prompt a",
        "response": "antwoord é a.0",
        "reward": 0.5,
        "parts": {"exact": 0.5},
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "response_tokens": 2,
        "weight_versions": [7],
        "failures": [],
    }
    assert (lines[3]["reward"], lines[3]["failures"]) == (None, ["exact: timeout"])


def test_more_rollouts_than_there_are_and_none(tmp_path: Path) -> None:
    RolloutWriter(tmp_path, 100).write(0, [group("a", [1.0, 2.0])], kind="evaluation")
    assert len((tmp_path / "rollouts" / "evaluation_000000.jsonl").read_text().splitlines()) == 2
    RolloutWriter(tmp_path, 0).write(1, [group("a", [1.0])])
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["evaluation_000000.jsonl"]


def write_metrics(folder: Path) -> None:
    MetricsWriter(folder, tensorboard=False).write(1, {"reward": 1.0})


def write_tensorboard(folder: Path) -> None:
    with MetricsWriter(folder, tensorboard=True) as metrics:
        metrics.write(1, {})


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_metrics, "metrics.jsonl"),
        (lambda folder: TicketsWriter(folder).write(1, [], []), "groups.jsonl"),
        (lambda folder: RolloutWriter(folder, per_step=1).write(1, [group("a", [1.0])]), "rollouts/step_000001.jsonl"),
        (write_tensorboard, ""),
    ],
)
def test_what_the_system_does_not_write_is_named(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    """Files may have no byte here, which is how a full disk looks to a writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(FileError) as error:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / name}" in str(error.value) and "cannot be written (" in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b'{"step": "1"}', b"{}", b"null", b"9" * 5000])
def test_resume_names_the_line_that_is_not_its_own(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"{path}:2: is not a line of this log"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    assert path.read_bytes() == before
