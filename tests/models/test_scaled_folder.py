"""The folder that a run uses in place of a model's own."""

import json
import shutil
from pathlib import Path

import pytest

from megarl.config.schema import Config
from megarl.models.scaled_folder import NOT_COMPUTED, with_scaled_model

PUBLISHED = Path(__file__).parents[1] / "config" / "models" / "Qwen2.5-7B-Instruct-1M" / "config.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize("scaling", [None, YARN], ids=["as it is", "scaled"])
def test_an_attention_that_is_not_computed_is_left_out_with_a_notice(
    tmp_path: Path, scaling: dict[str, object] | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(PUBLISHED, model)
    (model / "model.safetensors").write_text("weights")
    values = {
        "kind": "sft",
        "steps": 1,
        "model": {"path": model, "rope_scaling": scaling},
        "data": {"train": {"type": "jsonl", "path": "rows.jsonl"}},
    }
    config = Config.model_validate(values)
    used = with_scaled_model(config, tmp_path / "run", writes=True)
    assert NOT_COMPUTED in caplog.text
    own, written = (json.loads((folder / "config.json").read_text()) for folder in (model, used.model.path))
    assert NOT_COMPUTED in own and NOT_COMPUTED not in written
    if scaling is None:
        assert written == {name: value for name, value in own.items() if name != NOT_COMPUTED}
    assert (used.model.path / "model.safetensors").read_text() == "weights"
    assert with_scaled_model(config, tmp_path / "run", writes=False) == used  # as the other ranks find it
    assert with_scaled_model(used, tmp_path / "run", writes=True) == used


def test_any_other_model_is_used_as_it_is(tmp_path: Path) -> None:
    values = {"kind": "sft", "steps": 1, "model": {"path": tmp_path}, "data": {"train": {"type": "jsonl", "path": "rows.jsonl"}}}
    config = Config.model_validate(values)
    assert with_scaled_model(config, tmp_path / "run", writes=True) is config  # whose folder has no config.json to tell
