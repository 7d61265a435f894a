"""The conversion tools run in this process, on tiny models."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarl.cli.command_line import run
from tiny import write_tiny_model

TOOLS = Path(__file__).parent.parent.parent / "tools" / "convert"
SMALL_FILES = ("--file-size", 0.0004)  # GB: several files even of a tiny model


def tool(name: str, *arguments: object) -> int:
    """Exit status of a tool; what it prints goes to this process's stdout and stderr."""
    spec = importlib.util.spec_from_file_location(f"convert_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]), pytest.raises(SystemExit) as exit:
        run(module.app)
    return int(exit.value.code or 0)


def refusal(capfd: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """The one line of standard error of a tool that ends with exit status 2."""
    capfd.readouterr()
    assert tool(name, *arguments) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error.strip()


def make_model(folder: Path, family: str = "qwen2", **sizes: object) -> Path:
    """A tiny model with a tokenizer file."""
    write_tiny_model(folder, family, **sizes)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, read by safetensors itself."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
