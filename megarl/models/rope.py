"""Rotary frequencies and their scaling, taken from transformers so that trainer and engines use the same numbers."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.errors import ConfigError
from megarl.models.architecture import Architecture

# These depend on the length of the sequence at hand, so two packings of one batch would not agree.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Inverse frequencies and attention factor of the config's RoPE type (default, linear, llama3, yarn).

    Returns:
        float32 [head_dim / 2] inverse frequencies, and the factor that multiplies cos and sin.

    Raises:
        ConfigError: the type depends on sequence length or is unknown.
    """
    parameters = architecture.hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    if rope_type in LENGTH_DEPENDENT or rope_type not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(f"RoPE type {rope_type!r} is not supported; supported: default, linear, llama3, yarn")
    return ROPE_INIT_FUNCTIONS[rope_type](architecture.hf_config, torch.device("cpu"))
