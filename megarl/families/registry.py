"""The model families that MegaRL knows, and the one reader of a Hugging Face folder's config.json."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError, quoted
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson
from megarl.families.base.family import Family
from megarl.families.base.rope_scaling import with_scaling
from megarl.families.base.values import check_values
from megarl.json_text import read_json_object

# transformers' model_type, which is the name of the family's file
MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "phi3",
    "olmo2",
    "deepseek_v3",
)


def family_of(model_type: str) -> Family:
    """Return the family of one of ``MODEL_TYPES``."""
    family: Family = import_module(f"megarl.families.{model_type}").FAMILY
    return family


def read_architecture(path: Path, rope_scaling: Mapping[str, object] | None = None) -> Architecture:
    """Read ``path/config.json`` as its family does.

    Args:
        path: the model folder.
        rope_scaling: in place of its own; checked already.

    Raises:
        ConfigError: it is missing or malformed, a value is wrong, or the family is not supported.
    """
    config = read_config_json(path)
    if rope_scaling is not None:
        config = ConfigJson(path, scaled_values(config.values, rope_scaling))
    return family_of(config.model_type).read(config)


def read_config_json(path: Path) -> ConfigJson:
    """Read the values of ``path/config.json``, and check each of them; raises like ``read_architecture``."""
    file = path / "config.json"
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give the folder of a Hugging Face model (relative to the current directory)")
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json; give the folder of a Hugging Face model")
    try:
        values = read_json_object(file)
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy the model again") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); copy the model again") from None
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        shown = quoted(model_type)
        raise ConfigError(f"{file}: model_type {shown} is not supported; supported are {', '.join(MODEL_TYPES)}")
    check_values(values, file)
    config = ConfigJson(path, values)
    config.size("max_position_embeddings")
    return config


def scaled_values(values: Mapping[str, Any], rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json with another RoPE scaling in place of its own, checked already."""
    return family_of(values["model_type"]).completed(with_scaling(values, rope_scaling))
