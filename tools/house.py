#!/usr/bin/env python3
"""Measures how the package reads: hops, string tests, small files, names, optional fields, Any. Prints each beside its goal.

Read from the source (ast) but for the hops, which are the stack of a real update. Exit status 1 when a goal is not met.
"""

import ast
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megarl"
VALUES = {  # that a key of the config has
    "kind": {"rl", "sft", "preference", "reward_model"},
    "engine": {"embedded", "vllm", "sglang"},
    "advantage": {
        "batch_mean_std",
        "gae",
        "greedy_baseline",
        "group_mean",
        "group_mean_batch_std",
        "group_mean_std",
        "group_mean_task_std",
        "leave_one_out",
        "process_rewards",
        "reward_to_go",
        "reward_to_go_batch_mean",
    },
}
NEWEST_FAMILIES = ("phi3", "olmo2", "deepseek_v3")  # the first that is there is the newest
SCORER = "regex"
SMALL = 100  # lines
SECTION_BASES = {"Section", "BaseModel"}


@dataclass(frozen=True)
class Source:
    """One file of the package; ``module`` as others import it."""

    path: Path
    module: str
    tree: ast.Module
    num_lines: int

    @property
    def name(self) -> str:
        """Path within the package."""
        return self.path.relative_to(PACKAGE).as_posix()


@dataclass(frozen=True)
class Row:
    """One figure; ``limit`` is the largest that is well, None where there is no goal."""

    what: str
    value: float
    limit: float | None
    detail: str

    def line(self) -> str:
        """Return the row as printed."""
        goal = "" if self.limit is None else f"≤ {self.limit:g}"
        verdict = "" if self.limit is None else ("ok" if self.value <= self.limit else "NOT MET")
        return f"{self.what:<46} {self.value:>7.4g}  {goal:>6}  {verdict:<8} {self.detail}".rstrip()


def sources() -> list[Source]:
    """Read every file of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(path, module, ast.parse(text), text.count("\n")))
    return found


def hops() -> Row:
    """Count MegaRL's functions on the stack between the RL loop and the surrogate, both among them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from hops import frames_to_the_surrogate

    with tempfile.TemporaryDirectory() as folder:
        frames = frames_to_the_surrogate(Path(folder))
    return Row("functions from the loop to the surrogate", len(frames), 6, " > ".join(frame.split(": ")[1] for frame in frames))


def string_tests(files: list[Source]) -> Row:
    """Count comparisons of a kind, an engine or an advantage with strings outside config/."""
    places: dict[str, int] = defaultdict(int)
    for file in files:
        if not file.name.startswith("config/"):
            for node in ast.walk(file.tree):
                places[file.name] += is_string_test(node)
    counted = {name: count for name, count in places.items() if count}
    return Row("string tests on kind, engine, advantage", sum(counted.values()), 5, listed(counted))


def is_string_test(node: ast.AST) -> bool:
    """Tell whether it compares a kind, an engine or an advantage with one of its values."""
    if isinstance(node, ast.Match):
        compared, operands = [node.subject], list[ast.AST](case.pattern for case in node.cases)
    elif isinstance(node, ast.Compare):
        compared = [node.left, *node.comparators]
        operands = list[ast.AST](compared)
    else:
        return False
    constants = {one.value for operand in operands for one in ast.walk(operand) if isinstance(one, ast.Constant)}
    return any(VALUES.get(last_name(one), set()) & constants for one in compared)


def last_name(node: ast.expr) -> str:
    """Return ``c`` of ``a.b.c``, the name itself of a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def lonely_files(files: list[Source]) -> Row:
    """Return the share of the files that are small and have one importer."""
    importers: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for name in imported(file.tree):
            importers[name].add(file.module)
    lonely = [file for file in files if file.num_lines < SMALL and len(importers[file.module] - {file.module}) == 1]
    detail = ", ".join(file.name for file in lonely)
    return Row(f"files of one importer, under {SMALL} lines, %", 100 * len(lonely) / len(files), 10, detail)


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a file imports, and what it imports from them, which may be modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def meanings(files: list[Source], kinds: tuple[type, ...], what: str, limit: float | None) -> Row:
    """Count the modules that define the public name which most define."""
    defined: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for node in file.tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):  # type: ignore[attr-defined]
                defined[node.name].append(file.name)  # type: ignore[attr-defined]
    several = {name: len(places) for name, places in defined.items() if len(places) > 1}
    return Row(what, max(several.values(), default=1), limit, listed(several))


def optional_fields(files: list[Source]) -> Row:
    """Count the optional fields of the dataclass or section that has most."""
    counts = {}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and is_data(node):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                counts[f"{file.name}:{node.name}"] = sum("None" in ast.unparse(one.annotation).split(" | ") for one in fields)
    above = {name: count for name, count in counts.items() if count > 2}
    return Row("most optional fields of a dataclass or section", max(counts.values()), 2, listed(above))


def is_data(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass or a section of the config."""
    bases = {last_name(base) for base in node.bases}
    return bool(bases & SECTION_BASES) or any("dataclass" in ast.unparse(one) for one in node.decorator_list)


def files_naming(files: list[Source], names: tuple[str, ...], what: str, limit: float) -> Row:
    """Count the files that hold the first of the names that any holds, as a string or a key; a line in a list is among them."""
    for name in names:
        naming = [file.name for file in files if name in texts(file.tree) or Path(file.name).stem == name]
        if naming:
            return Row(f"{what} ({name})", len(naming), limit, ", ".join(naming))
    raise AssertionError(f"no file names {names}")


def texts(tree: ast.Module) -> set[str]:
    """Return all strings of a file that are no docstrings, and its keyword names."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return strings | {last_name(node) for node in ast.walk(tree) if isinstance(node, ast.expr)}


def any_per_thousand(files: list[Source]) -> Row:
    """Count the uses of Any in 1,000 lines."""
    uses = {file.name: sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(file.tree)) for file in files}
    lines = sum(file.num_lines for file in files)
    most = dict(sorted(uses.items(), key=lambda item: -item[1])[:8])
    return Row("Any in 1,000 lines", 1000 * sum(uses.values()) / lines, 6, listed(most))


def listed(counts: dict[str, int]) -> str:
    """Return names with their counts, the largest first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def main() -> int:
    """Print the table."""
    files = sources()
    longest = max(files, key=lambda file: file.num_lines)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    rows = [
        hops(),
        string_tests(files),
        lonely_files(files),
        meanings(files, (ast.ClassDef,), "most modules that define one public class", 1),
        meanings(files, functions, "most modules that define one public function", None),
        optional_fields(files),
        files_naming(files, NEWEST_FAMILIES, "files that name a model family", 2),
        files_naming(files, (SCORER,), "files that name a scorer", 2),
        any_per_thousand(files),
        Row("files", len(files), None, ""),
        Row("lines of the longest file", longest.num_lines, 450, longest.name),
    ]
    print("\n".join(row.line() for row in rows))
    return int(any(row.limit is not None and row.value > row.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
