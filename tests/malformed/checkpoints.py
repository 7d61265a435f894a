"""Damaged checkpoints and run folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table import Case, Templates, copy, edited

DEEP = "[" * 100_000 + "]" * 100_000
TOOLS = Path(__file__).parent.parent.parent / "tools" / "convert"
Damage = Callable[[Path], object]


def _resume(label: str, damage: Damage, *names: str | tuple[str, ...], waiting: bool = False, command: str = "train") -> Case:
    """Resume a damaged copy of a run, or evaluate its checkpoint; ``damage`` gets the run's folder."""

    def make(folder: Path, templates: Templates) -> list[str]:
        source = templates.waiting if waiting else templates.run
        run = copy(source, folder / "run")
        config = folder / "config.yaml"
        shutil.copy(run / "config.yaml", config)
        damage(run)
        if command == "eval":
            return ["eval", str(config), "--checkpoint", str(_step(run)), *_HELD_OUT]
        return ["train", str(config), "--resume", "--run-dir", str(run), "--set", "steps=3"]

    return Case(f"checkpoint: {label}", make, names)


def _tool(label: str, tool: str, damage: Damage, *names: str | tuple[str, ...]) -> Case:
    """A conversion of a damaged checkpoint."""

    def make(folder: Path, templates: Templates) -> list[str]:
        run = copy(templates.run, folder / "run")
        shutil.copy(templates.model / "config.json", _step(run) / "policy" / "config.json")
        damage(run)
        source = str(_step(run) / "policy")
        return [source] if tool == "inspect" else [source, str(folder / "run" / "out")]

    return Case(f"checkpoint: {label}", make, names, program=str(TOOLS / f"{tool}.py"))


_HELD_OUT = [
    "--set",
    "evaluation.data={type: reasoning_gym, task: chain_sum, size: 2, options: {max_terms: 2, max_digits: 1}}",
]


def _step(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def _manifest(text: str | bytes) -> Damage:
    return lambda run: (_step(run) / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def _entry(**values: Any) -> Damage:
    return lambda run: edited(_step(run) / "manifest.json", **values)


def _state(**values: Any) -> Damage:
    def damage(run: Path) -> None:
        path = _step(run) / "manifest.json"
        state = json.loads(path.read_text())["state"] | values
        edited(path, state={name: value for name, value in state.items() if value is not None})

    return damage


def _position(**values: Any) -> Damage:
    def damage(run: Path) -> None:
        path = _step(run) / "manifest.json"
        state = json.loads(path.read_text())["state"]
        edited(path, state=state | {"data": state["data"] | values})

    return damage


def _outstanding(text: str) -> Damage:
    """Another ``pending.json``, which the manifest knows nothing of."""
    return lambda run: (_step(run) / "outstanding.json").write_text(text)


def _of(pattern: str, change: Callable[[bytes], bytes | None]) -> Damage:
    """Other bytes in the first file that matches; None deletes it."""

    def damage(run: Path) -> None:
        file = min((_step(run) / "policy").glob(pattern))
        content = change(file.read_bytes())
        file.unlink()
        if content is not None:
            file.write_bytes(content)

    return damage


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _metrics(content: bytes) -> Damage:
    return lambda run: (run / "metrics.jsonl").write_bytes(content)


CASES = [
    _resume("manifest empty", _manifest(""), "manifest.json"),
    _resume("manifest {}", _manifest("{}"), "manifest.json"),
    _resume("manifest a list", _manifest("[]"), "manifest.json"),
    _resume("manifest null", _manifest("null"), "manifest.json"),
    _resume("manifest cut", _manifest('{"format": 2, "state"'), "manifest.json"),
    _resume("manifest not UTF-8", _manifest(b'{"format": "\xff"}'), "manifest.json"),
    _resume("manifest 100,000 nested", _manifest(DEEP), "manifest.json"),
    _resume("manifest with a number of 5,000 digits", _manifest('{"format": ' + "9" * 5000 + "}"), "manifest.json"),
    _resume("manifest of another format", _entry(format=99), "format", "99"),
    _resume("manifest with a text as format", _entry(format="new" * 500), "format"),
    _resume("manifest of another model", _entry(model_digest="0" * 16), "manifest.json"),
    _resume("manifest with a list as files", _entry(files=[1]), "manifest.json"),
    _resume("manifest with a file elsewhere", _entry(files={"../../../config.yaml": 3}), "manifest.json"),
    _resume("manifest without its state", _entry(state=None), "manifest.json"),
    _resume("manifest with a text as state", _entry(state="new"), "manifest.json"),
    _resume("manifest without its step", _state(step=None), "manifest.json"),
    _resume("manifest with an unknown state", _state(newer=1), "manifest.json"),
    _resume("manifest with a text as step", _state(step="two"), "manifest.json"),
    _resume("manifest with a negative step", _state(step=-1), "manifest.json"),
    _resume("manifest with a step beyond the run", _state(step=10**9), "step"),
    _resume("manifest with a half as step", _state(step=1.5), "manifest.json"),
    _resume("manifest with NaN as weight version", _state(weight_version=float("nan")), "manifest.json"),
    _resume("manifest with a list as data", _state(data=[1]), "manifest.json"),
    _resume("manifest without its data", _state(data={}), "manifest.json"),
    _resume("manifest with a position beyond the rows", _position(position=10**15, taken=10**15), "manifest.json"),
    _resume("manifest with a text in the position", _position(position="far", taken="far"), "manifest.json"),
    _resume("manifest evaluated with a text as step", _state(step="two"), "manifest.json", command="eval"),
    _resume("manifest evaluated that is a list", _manifest("[]"), "manifest.json", command="eval"),
    _resume(
        "manifest a folder",
        lambda run: (_step(run) / "manifest.json").unlink() or (_step(run) / "manifest.json").mkdir(),
        "manifest.json",
    ),
    _resume("outstanding.json missing", lambda run: (_step(run) / "outstanding.json").unlink(), "outstanding.json", waiting=True),
    _resume("outstanding.json a list", _outstanding("[]"), "outstanding.json", waiting=True),
    _resume("outstanding.json without its keys", _outstanding("{}"), "outstanding.json", waiting=True),
    _resume("outstanding.json 100,000 nested", _outstanding(DEEP), "outstanding.json", waiting=True),
    _resume(".metadata empty", _of(".metadata", lambda content: b""), ".metadata", "step_00000001"),
    _resume(".metadata shortened", _of(".metadata", lambda content: content[:-9]), ".metadata", "step_00000001"),
    _resume(".metadata missing", _of(".metadata", lambda content: None), ".metadata", "step_00000001"),
    _resume(".metadata with a bit turned", _of(".metadata", _flipped), ".metadata", "step_00000001"),
    _resume("a .distcp shortened", _of("*.distcp", lambda content: content[:-9]), ".distcp", "step_00000001"),
    _resume("a .distcp longer", _of("*.distcp", lambda content: content + b"x"), ".distcp", "step_00000001"),
    _resume("a .distcp missing", _of("*.distcp", lambda content: None), ".distcp", "step_00000001"),
    _resume("a .distcp with a bit turned", _of("*.distcp", _flipped), ".distcp", "step_00000001"),
    _resume(
        "a .distcp with a page of zeros",
        _of("*.distcp", lambda content: content[:4096] + bytes(4096) + content[8192:]),
        ".distcp",
        "step_00000001",
    ),
    _resume("common.pt with a bit turned", _of("common.pt", _flipped), "common.pt", "step_00000001"),
    _resume("metadata.json not JSON", _of("metadata.json", lambda content: b"{" * len(content)), "metadata.json", "step_00000001"),
    _resume("a .distcp shortened, evaluated", _of("*.distcp", lambda content: content[:-9]), ".distcp", command="eval"),
    _resume("metrics.jsonl not UTF-8", _metrics(b"\xff\xfe\n{}\n"), "metrics.jsonl"),
    _resume("metrics.jsonl 100,000 nested", _metrics(DEEP.encode() + b"\n{}\n"), "metrics.jsonl"),
    _resume("metrics.jsonl with lists", _metrics(b"[1]\n[2]\n"), "metrics.jsonl"),
    _resume("metrics.jsonl with a text as step", _metrics(b'{"step": "one"}\n{"step": 1}\n'), "metrics.jsonl"),
    _tool(".metadata empty, converted", "megatron_to_hf", _of(".metadata", lambda content: b""), ".metadata"),
    _tool(
        ".metadata a pickle of something else, converted",
        "megatron_to_hf",
        _of(".metadata", lambda content: b"\x80\x04K\x01."),
        ".metadata",
    ),
    _tool("a .distcp missing, converted", "megatron_to_hf", _of("*.distcp", lambda content: None), ".distcp"),
    _tool("a .distcp shortened, converted", "megatron_to_hf", _of("*.distcp", lambda content: content[:-9]), ".distcp"),
    _tool("nothing there, looked at", "inspect", lambda run: shutil.rmtree(_step(run) / "policy"), "policy"),
]
