"""The folder of a model as the run uses it: its config.json with the run's RoPE scaling, and links to all other files.

Trainer, embedded engine, vLLM, SGLang and the exported folder all read the model from this one config.json. It lacks what MegaRL's
trainer does not compute and engines refuse (``NOT_COMPUTED``).
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megarl.config.schema import Config
from megarl.errors import ConfigError
from megarl.families.base.rope_scaling import normalised
from megarl.families.registry import read_config_json, scaled_values

CONFIG = "config.json"
# Qwen2.5-1M's config.json names an attention for more positions than it was trained on. transformers and the trainer compute full
# attention, which is the same up to the length of training; vLLM and SGLang without its kernels die at start.
NOT_COMPUTED = "dual_chunk_attention_config"

logger = logging.getLogger(__name__)


def with_scaled_model(config: Config, folder: Path, *, writes: bool) -> Config:
    """Return the config with its model.rope_scaling in the model's folder, which is then ``folder``/models/…; itself where the
    model is used as it is.

    One run can have several: each scaling has a folder of its own.

    Args:
        config: checked.
        folder: of the run, or a temporary one.
        writes: this process makes the model's folder; any other must not read it before that process has returned from here.

    Raises:
        ConfigError: the model's folder cannot be read, or this one cannot be written.
    """
    scaling, has_other_attention = config.model.rope_scaling, _has_other_attention(config.model.path)
    if scaling is None and not has_other_attention:
        return config
    scaled = scaled_folder(folder, scaling)
    if writes:
        if has_other_attention:
            logger.warning(
                "%s: %s is not used: trainer and engine compute full attention", config.model.path / CONFIG, NOT_COMPUTED
            )
        _write(config.model.path, scaling, scaled)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": scaled, "rope_scaling": None})})


def _has_other_attention(model: Path) -> bool:
    return (model / CONFIG).is_file() and bool(read_config_json(model).values.get(NOT_COMPUTED))


def scaled_folder(folder: Path, scaling: Mapping[str, object] | None) -> Path:
    """Return where ``with_scaled_model`` puts the model: a name of the scaling's type and digest, the same for 4 and 4.0."""
    if scaling is None:
        return folder / "models" / "full_attention"
    text = json.dumps(normalised(scaling), sort_keys=True)
    return folder / "models" / f"{scaling['rope_type']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _write(source: Path, scaling: Mapping[str, object] | None, output: Path) -> None:
    """Make the folder, which appears under its name only when it is whole; one that is as it should be is left alone."""
    used = {name: value for name, value in read_config_json(source).values.items() if name != NOT_COMPUTED}
    text = json.dumps(used if scaling is None else scaled_values(used, scaling), indent=2) + "\n"
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
