"""Who may import whom, how files and docstrings are written, and that the documentation names files that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megarl"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = {"CHANGELOG.md"}  # names files as they were
ALLOWED = {
    "families": {"errors", "json_text"},
    "builtin": {"section", "user_functions", "errors"},
    "config": {"families", "builtin", "section", "user_functions", "errors", "json_text"},
    "algorithms": {"types", "config", "user_functions", "errors", "metrics"},
    "parallel": {"types", "config", "errors", "crash", "death_signal", "sockets"},
    "models": {"families", "parallel", "config", "errors", "json_text"},
    "weights": {"models", "families", "parallel", "config", "errors", "death_signal", "json_text"},
    "reshard": {"weights", "models", "families", "parallel", "config", "errors", "sockets"},
    "memory": {"weights", "models", "families", "parallel", "config", "errors"},
    "data": {"workers", "families", "types", "config", "builtin", "errors"},
    "workers": {"config", "errors"},
    "environments": {"workers", "types", "config", "builtin", "errors"},
    "rewards": {"workers", "types", "config", "builtin", "section", "errors", "json_text", "server_answers"},
    "engines": {"families", "types", "config", "errors", "sockets", "json_text", "server_answers"},
    "rollout": {"engines", "environments", "types", "config", "errors"},
    "train": {"weights", "models", "families", "parallel", "algorithms", "data", "types", "config", "errors"},
    "observe": {"types", "config", "errors"},
}
MEGATRON = {"parallel", "models", "weights", "reshard", "train"}
PLAIN_DOCSTRINGS = {
    "parallel",
    "data",
    "workers",
    "reshard",
    "engines",
    "cli",
    "algorithms",
    "loop",
    "train",
    "rollout",
    "observe",
    "families",
    "memory",
    "models",
    "weights",
    "config",
    "builtin",
}
NO_VERBS = {"Of", "What", "The", "A", "An", "For", "How", "Where", "Which", "Whether", "Why", "In", "On", "At", "As", "All", "Each"}


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


@pytest.mark.parametrize("package", ["builtin", "config", "families"])
def test_light_packages_import_no_torch(package: str) -> None:
    for path in sorted((PACKAGE / package).rglob("*.py")):
        assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "transformers")], path


def test_files_are_small() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 450, path


def documented(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield node, text


@pytest.mark.parametrize("package", sorted(PLAIN_DOCSTRINGS))
def test_docstrings_say_what_a_thing_does(package: str) -> None:
    """A function's begins with a verb; a class and a property may be a thing. None is only a word or three."""
    faults = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for node, text in documented(ast.parse(path.read_text())):
            words = text.split()
            is_thing = isinstance(node, ast.ClassDef) or any("property" in ast.unparse(one) for one in node.decorator_list)
            if len(words) < 4 or (not is_thing and words[0].strip("`,.:;") in NO_VERBS):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    assert not faults, "\n".join(faults)


def test_architecture_has_the_table_of_imports() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\| ([^|]*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    table = {package: set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", imports))) for package, imports in rows}
    assert {package: table[package] for package in ALLOWED} == ALLOWED
    packages = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert set(table) == packages


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_the_documentation_names_exist(document: Path) -> None:
    """A name may be whole, begin within megarl, or be the end of the path of a file there."""
    if document.name in HISTORY:
        return
    upstream = ("megatron/", "vllm/", "sglang/")
    known = [path.relative_to(ROOT).as_posix() for root in ("megarl", "tests", "tools") for path in (ROOT / root).rglob("*.py")]
    text = document.read_text()
    for name in re.findall(r"`([\w./-]+\.py)\b[^`]*`", text):
        if name.startswith(upstream):
            continue
        assert (ROOT / name).exists() or any(f"/{path}".endswith(f"/{name}") for path in known), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), link


def defined_names(path: Path) -> set[str]:
    """Names that a module's source binds, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                names.add(name)
            case ast.alias(name, asname):
                names.add(asname or name)
    return names


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tools"])
def test_scripts_import_what_exists(folder: str) -> None:
    """Nothing runs them all: benchmarks take minutes."""
    for script in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megarl":
                module = ROOT / node.module.replace(".", "/")
                source = module.with_suffix(".py") if module.with_suffix(".py").exists() else module / "__init__.py"
                defined = defined_names(source) | {path.stem for path in module.glob("*")}
                assert {alias.name for alias in node.names} <= defined, f"{script}: {node.module}"
