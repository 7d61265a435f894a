"""Scripts of examples/ and tools/ run in this process, as their command lines."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from megarl.cli.command_line import run

ROOT = Path(__file__).parents[2]


def load_script(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, *arguments: object) -> int:
    """Exit status; what it prints goes to this process's stdout and stderr."""
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)]), pytest.raises(SystemExit) as exit:
        run(module.app)
    return int(exit.value.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], module: ModuleType, *arguments: object) -> str:
    """The one line of standard error of a script that ends with exit status 2."""
    capsys.readouterr()
    assert run_script(module, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
