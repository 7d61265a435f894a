"""The folder of a model with another RoPE scaling: its config.json with the scaling in it, and links to all other files.

Trainer, embedded engine, vLLM, SGLang and the exported folder all read the RoPE of the run from this one config.json.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarl.config.model_facts import read_config_json
from megarl.config.rope_scaling import normalised, with_scaling
from megarl.config.schema import Config
from megarl.errors import ConfigError

CONFIG = "config.json"


def with_scaled_model(config: Config, folder: Path, *, writes: bool) -> Config:
    """The config with its model.rope_scaling in the model's folder, which is then ``folder``/models/…; itself where none is given.

    One run can have several: each scaling has a folder of its own.

    Args:
        config: checked.
        folder: of the run, or a temporary one.
        writes: this process makes the model's folder; any other must not read it before that process has returned from here.

    Raises:
        ConfigError: the model's folder cannot be read, or this one cannot be written.
    """
    scaling = config.model.rope_scaling
    if scaling is None:
        return config
    scaled = scaled_folder(folder, scaling)
    if writes:
        _write(config.model.path, scaling, scaled)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": scaled, "rope_scaling": None})})


def scaled_folder(folder: Path, scaling: Mapping[str, Any]) -> Path:
    """Where ``with_scaled_model`` puts the model: a name of the scaling's type and digest, the same for 4 and 4.0."""
    text = json.dumps(normalised(scaling), sort_keys=True)
    return folder / "models" / f"{scaling['rope_type']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _write(source: Path, scaling: Mapping[str, Any], output: Path) -> None:
    """Make the folder, which appears under its name only when it is whole; one that is as it should be is left alone."""
    text = json.dumps(with_scaling(read_config_json(source), scaling), indent=2) + "\n"
    try:
        links = {file.name: file.absolute() for file in source.iterdir() if file.name != CONFIG}
        if _holds(output, text, links):
            return
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, file in links.items():
            (partial / name).symlink_to(file)
        (partial / CONFIG).write_text(text, encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"model.rope_scaling: {output} cannot be made ({error}); choose another --run-dir") from error


def _holds(folder: Path, config_json: str, links: Mapping[str, Path]) -> bool:
    if not folder.is_dir() or {file.name for file in folder.iterdir()} != {CONFIG, *links}:
        return False
    if any(not (folder / name).is_symlink() or (folder / name).readlink() != file for name, file in links.items()):
        return False
    return (folder / CONFIG).read_text(encoding="utf-8") == config_json
