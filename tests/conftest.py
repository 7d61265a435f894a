import sys
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

# its monitor thread must not hold a lock when ranks are forked
disable_progress_bar()
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with the tiny model of seed 0."""
    from tiny_rollout import make_tiny_model

    make_tiny_model(0, tmp_path)
    return tmp_path
