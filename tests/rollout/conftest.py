"""What the rollout tests share."""

from pathlib import Path

import pytest

from tiny_rollout import make_tiny_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with the tiny model of seed 0."""
    make_tiny_model(0, tmp_path)
    return tmp_path
