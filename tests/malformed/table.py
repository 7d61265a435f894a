"""What a malformed input is: how it is made, the command that meets it, and what its line must name."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from runs import write_config

SECONDS = 25.0  # that a case may take


@dataclass(frozen=True, slots=True)
class Templates:
    """What is made once for all cases, and copied or read by them.

    Attributes:
        model: folder of a tiny random model with a tokenizer.
        run: a finished SFT run of it, with a checkpoint.
        waiting: a finished run with partial rollouts, whose checkpoint has an ``pending.json``.
        url: a server that answers what a case's ``answer`` says.
    """

    model: Path
    run: Path
    waiting: Path
    url: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server of a case says to every request, or to those to one path."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    cut: bool = False  # promises more bytes than it sends


@dataclass(frozen=True, slots=True)
class Case:
    """One row.

    Attributes:
        label: kind and input, unique.
        make: makes the input in an empty folder and gives the command's arguments.
        names: texts that the line must have in it, in any case of letters; an item of several has one of them.
        program: ``megarl`` or a tool of tools/convert.
        answers: of the server, by path; ``""`` is for every other.
        environment: variables of the command.
    """

    label: str
    make: Callable[[Path, Templates], list[str]]
    names: Sequence[str | tuple[str, ...]]
    program: str = "megarl"
    answers: dict[str, Answer] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.label)[:60]


def config_in(folder: Path, templates: Templates, **changes: Any) -> str:
    """Write a config of one step on the template's model, and give its path."""
    values = {
        "model": {"path": str(templates.model)},
        "policy": {},
        "steps": 1,
        "optimizer": {"learning_rate": 2e-2},
        "observe": {"tensorboard": False},
        "checkpoint": {"export": False},
    }
    return str(write_config(folder, **(values | changes)))


def sft_config_in(folder: Path, templates: Templates, **changes: Any) -> str:
    """The same for supervised fine-tuning without evaluation."""
    return config_in(folder, templates, **({"kind": "sft", "evaluation": {}} | changes))


def edited(path: Path, **values: Any) -> None:
    """Change keys of a JSON object in a file; None takes one out."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def copy(source: Path, target: Path) -> Path:
    """Copy a folder, links as links."""
    shutil.copytree(source, target, symlinks=True)
    return target


def yaml_of(**values: Any) -> str:
    """A small valid config's text with changes; None takes a key out."""
    whole = {
        "kind": "sft",
        "steps": 1,
        "model": {"path": "model"},
        "data": {"train": {"type": "jsonl", "path": "rows.jsonl"}},
        "run_dir": "run",
    }
    return yaml.safe_dump({name: value for name, value in (whole | values).items() if value is not None})
