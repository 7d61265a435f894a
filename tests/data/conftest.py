import importlib.util
from pathlib import Path

import pytest

from megarl.config.schema import Config
from megarl.data.template import load_tokenizer

MAKE_MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "make_model.py"


@pytest.fixture(scope="session")
def make_model():
    spec = importlib.util.spec_from_file_location("make_model", MAKE_MODEL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_model


@pytest.fixture(scope="session")
def tokenizer(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16)
    return load_tokenizer(folder)


@pytest.fixture
def config():
    def build(train, **sections):
        data = {"train": train, "template": "Q: {prompt} A: ", **sections.pop("data", {})}
        return Config.model_validate({"kind": "rl", "steps": 1, "model": {"path": "model"}, "data": data, **sections})

    return build
