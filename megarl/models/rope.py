"""Rotary frequencies and their scaling, taken from transformers so that trainer and engines use the same numbers."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.errors import ConfigError, one_line
from megarl.families.base.architecture import Architecture
from megarl.families.base.rope_scaling import NAMES


def rotary_frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Inverse frequencies and attention factor of the config's RoPE type (default, linear, llama3, yarn).

    Returns:
        float32 [rotary_dim / 2] inverse frequencies, and the factor that multiplies cos and sin.

    Raises:
        ConfigError: the type depends on sequence length or is unknown, or transformers refuses the config.json.
    """
    config = _transformers_config(architecture.path)
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, architecture.rotary_dim, 2, dtype=torch.float32) / architecture.rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    if rope_type not in NAMES:
        raise ConfigError(f"RoPE type {rope_type!r} is not supported; supported: {', '.join(NAMES)}")
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))


def _transformers_config(path: Path) -> PretrainedConfig:
    """Return transformers' own config, whose RoPE functions know its defaults."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers checks values in its own way
        raise ConfigError(f"model.path {path}: config.json cannot be read ({one_line(error)})") from error


def softmax_scale(architecture: Architecture, attention_factor: float) -> float:
    """Factor of the attention logits.

    Args:
        attention_factor: of cos and sin. Grouped-query attention rotates whole heads, queries and keys alike, so it enters the
            logits squared. Latent attention rotates a part of each head, so there it stays with cos and sin, and YaRN's
            temperature on all of the head (``mscale_all_dim``) is a factor of its own (transformers' modeling_deepseek_v3.py).
    """
    scale: float = architecture.head_dim**-0.5
    if architecture.mla is None:
        return scale * attention_factor**2
    parameters = architecture.rope_parameters
    mscale_all_dim = parameters.get("mscale_all_dim") or 0.0
    if architecture.rope_type == "default" or parameters["factor"] <= 1:
        return scale
    return scale * (0.1 * mscale_all_dim * math.log(parameters["factor"]) + 1.0) ** 2
