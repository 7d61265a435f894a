"""Sandboxed workers of a command that is started in another folder than the project's."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio
from megarl.builtin.scorers import ExactScorer
from megarl.config.schema import SandboxConfig
from megarl.rewards.process_pool import WorkerPool
from megarl.workers.sandbox import find_sandbox

async def score():
    pool = WorkerPool({"exact": ExactScorer()}, 1, SandboxConfig())
    try:
        return await pool.score("exact", "4", {"answer": "4"}, 60.0)
    finally:
        await pool.close()

print(find_sandbox().program is not None, asyncio.run(score()))
"""


@pytest.mark.timeout(120)
def test_workers_find_megarl_in_their_sandbox(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout.split() == ["True", "1.0"], result.stderr
