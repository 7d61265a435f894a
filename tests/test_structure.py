"""Who may import whom (docs/architecture.md), read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megarl"
ALLOWED = {
    "builtin": {"section", "user_functions", "errors"},
    "config": {"builtin", "section", "user_functions", "errors", "json_text"},
    "algorithms": {"types", "config", "user_functions", "errors"},
    "parallel": {"types", "config", "errors", "crash", "death_signal", "sockets"},
    "models": {"parallel", "config", "errors", "json_text"},
    "weights": {"models", "parallel", "config", "errors", "death_signal", "json_text"},
    "reshard": {"weights", "models", "parallel", "config", "errors", "sockets"},
    "memory": {"weights", "models", "parallel", "config", "errors"},
    "data": {"workers", "types", "config", "builtin", "errors"},
    "workers": {"config", "errors"},
    "environments": {"workers", "types", "config", "builtin", "errors"},
    "rewards": {"workers", "types", "config", "builtin", "section", "errors", "json_text", "server_answers"},
    "engines": {"types", "config", "errors", "sockets", "json_text", "server_answers"},
    "rollout": {"engines", "environments", "types", "config", "errors"},
    "train": {"weights", "models", "parallel", "algorithms", "data", "types", "config", "errors"},
    "observe": {"types", "config", "errors"},
}
MEGATRON = {"parallel", "models", "weights", "reshard", "train"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows(package: str) -> None:
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files
    for path in files:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("megarl.")}
        assert used <= ALLOWED[package] | {package}, path


def test_only_five_packages_import_megatron() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in MEGATRON:
            assert not [name for name in imports(path) if name.split(".")[0] == "megatron"], path


def test_engines_are_imported_only_in_their_own_environment() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if not {"plugin", "sglang_cpu"} & set(path.parts):
            assert not [name for name in imports(path) if name.split(".")[0] in ("vllm", "sglang")], path


@pytest.mark.parametrize("package", ["builtin", "config"])
def test_light_packages_import_no_torch(package: str) -> None:
    for path in sorted((PACKAGE / package).rglob("*.py")):
        assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "transformers")], path


def test_files_are_small() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 600, path
