"""Every malformed input ends in one line that names it, with status 1 or 2, in time, and nothing is lost.

All cases run in forks of one warm process, two at a time (warm_process.py), before the first is looked at.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import configs
import models
import rows
import servers
from runs import make_model
from table import SECONDS, Answer, Case, Templates, config_in, sft_config_in
from warm_process import Ended, Job

CASES = [*configs.CASES, *rows.CASES, *models.CASES, *checkpoints.CASES, *servers.CASES]
LONGEST_LINE = 300  # characters

pytestmark = pytest.mark.timeout(900)  # the first test waits for all of them to have run


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case ended, and what it left."""

    ended: Ended
    stdout: str
    stderr: str
    changed: list[str]


class Server(http.server.ThreadingHTTPServer):
    """Says to each request under ``/<case's number>`` what the case's row says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, dict[str, Answer]] = {}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, number, path = f"{self.path}/".split("/", 2)
        answers = self.server.answers[number]
        answer = answers.get(f"/{path.strip('/')}") or answers[""]
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body) + 1000 * answer.cut))
        self.end_headers()
        self.wfile.write(answer.body)
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class WarmProcess:
    """``warm_process.py``, running."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, jobs: list[Job]) -> list[Ended]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]


@contextmanager
def warm_process() -> Iterator[WarmProcess]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, Path(__file__).with_name("warm_process.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield WarmProcess(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)


def make_templates(folder: Path, warm: WarmProcess, url: str) -> Templates:
    templates = Templates(model=folder / "model", run=folder / "sft" / "run", waiting=folder / "rl" / "run", url=url)
    make_model(templates.model)
    partial = {"partial": {"step_token_budget": 3}, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6}
    jobs = []
    for name, maker, changes in (("sft", sft_config_in, {}), ("rl", config_in, {"rollout": partial, "evaluation": {}})):
        (folder / name).mkdir()
        arguments = ["train", maker(folder / name, templates, **changes)]
        jobs.append(job(arguments, folder / name))
    for one, ended in zip(jobs, warm.run(jobs), strict=True):
        assert ended.status == 0, (Path(one.folder) / "stderr").read_text()
    return templates


def job(arguments: list[str], folder: Path, case: Case | None = None) -> Job:
    program, environment = ("megarl", {}) if case is None else (case.program, case.environment)
    return Job(arguments=arguments, program=program, folder=str(folder), seconds=SECONDS, environment=environment)


def content_of(folder: Path) -> dict[str, str]:
    """What every file and folder below is, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif name not in ("stdout", "stderr"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changes_of(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is gone or different, and what is new outside the run's folder."""
    lost = [f"{name} is gone or different" for name, content in before.items() if after.get(name) != content]
    return lost + [f"{name} is new" for name in after.keys() - before.keys() if not f"{name}/".startswith("run/")]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What became of each case that pytest will look at, by label."""
    here = (item for item in request.session.items if item.path == request.path)
    wanted = {item.callspec.params["case"].label for item in here if "case" in getattr(item, "fixturenames", ())}
    cases = [case for case in CASES if case.label in wanted]
    root = tmp_path_factory.mktemp("m")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with warm_process() as warm:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        templates = make_templates(root, warm, url)
        jobs, before = [], []
        untouched = content_of(templates.model)
        for number, case in enumerate(cases):
            folder = root / str(number)
            folder.mkdir()
            server.answers[str(number)] = case.answers
            own = Templates(model=templates.model, run=templates.run, waiting=templates.waiting, url=f"{url}/{number}")
            jobs.append(job(case.make(folder, own), folder, case))
            before.append(content_of(folder))
        ended = warm.run(jobs)
    server.shutdown()
    assert content_of(templates.model) == untouched
    return {
        case.label: Outcome(
            ended=one,
            stdout=(root / str(number) / "stdout").read_text(errors="surrogateescape"),
            stderr=(root / str(number) / "stderr").read_text(errors="surrogateescape"),
            changed=changes_of(before[number], content_of(root / str(number))),
        )
        for number, (case, one) in enumerate(zip(cases, ended, strict=True))
    }


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label.replace("::", ":")) for case in CASES])
def test_one_line(case: Case, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[case.label]
    assert outcome.ended.status is not None, f"no end within {SECONDS:g} s"
    assert outcome.ended.status in (1, 2), outcome.stderr[-2000:] + outcome.stdout[-500:]
    assert "Traceback" not in outcome.stderr + outcome.stdout, outcome.stderr[-3000:]
    *lines, rest = outcome.stderr.split("\n")
    assert len(lines) == 1 and not rest, outcome.stderr[-3000:]
    (line,) = lines
    assert line.isprintable(), repr(line)
    assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line}"
    for words in case.names:
        anyone = (words,) if isinstance(words, str) else words
        assert any(word.lower() in line.lower() for word in anyone), f"{anyone} not in: {line}"
    assert not outcome.changed
    assert not outcome.ended.leftover


def test_labels_are_unique() -> None:
    labels = [case.label for case in CASES]
    assert len(set(labels)) == len(labels) >= 230
