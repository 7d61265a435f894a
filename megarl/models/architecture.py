"""What MegaRL needs to know of a model, read from its Hugging Face config."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megarl.errors import ConfigError

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and switches of a dense decoder-only model.

    Attributes:
        family: Hugging Face model_type.
        head_dim: width of one attention head.
        vocabulary_size: rows of the Hugging Face embedding, without Megatron's padding.
        hf_config: the whole Hugging Face config, for RoPE and export.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_positions: int
    initializer_range: float
    hf_config: PretrainedConfig


def read_architecture(path: Path) -> Architecture:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        ConfigError: it cannot be read, or the family is not supported.
    """
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path}: config.json cannot be read ({str(error).splitlines()[0]})") from error
    if hf.model_type not in SUPPORTED_FAMILIES:
        raise ConfigError(
            f"model.path {path}: family {hf.model_type!r} is not supported; supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    num_heads = hf.num_attention_heads
    return Architecture(
        family=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        vocabulary_size=hf.vocab_size,
        norm_epsilon=hf.rms_norm_eps,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type == "qwen3",
        tied_embeddings=bool(hf.tie_word_embeddings),
        max_positions=hf.max_position_embeddings,
        initializer_range=hf.initializer_range,
        hf_config=hf,
    )


def padded_vocabulary_size(architecture: Architecture, pad_multiple: int, tp: int) -> int:
    """Rows of the Megatron embedding: the vocabulary rounded up to a multiple of ``pad_multiple · tp``."""
    multiple = pad_multiple * tp
    return -(-architecture.vocabulary_size // multiple) * multiple
