"""One finished run for all tests of the command."""

from pathlib import Path

import pytest

from runs import make_model, megarl, write_config


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``config.yaml``."""
    folder = tmp_path_factory.mktemp("workspace")
    make_model(folder / "model")
    write_config(folder)
    return folder


@pytest.fixture(scope="session")
def finished(workspace: Path) -> Path:
    """The folder of a run of the config, from its start to its end."""
    result = megarl("train", workspace / "config.yaml", "--nproc", 2)
    assert result.returncode == 0, result.stderr
    assert "held-out accuracy" in result.stdout
    return workspace / "run"
