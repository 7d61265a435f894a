"""What the cross-checks need to know of a Hugging Face model, read from its config.json without torch or transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts of a config.json.

    Attributes:
        path: the model folder.
        model_type: the family, one of ``SUPPORTED_MODEL_TYPES``.
        num_layers: transformer layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        vocab_size: rows of the embedding, before padding.
        max_position_embeddings: longest sequence in tokens.
        rope_type: kind of rotary position scaling, ``default`` when there is none.
        hidden_act: activation of the MLP.
        biases: the bias switches that are on, of ``attention_bias`` and ``mlp_bias``.
        sliding_window: True when any layer attends to a window only.
        quantization: method of quantized weights; None for plain weights.
    """

    path: Path
    model_type: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_type: str
    hidden_act: str
    biases: tuple[str, ...]
    sliding_window: bool
    quantization: str | None


def read_model_facts(path: Path) -> ModelFacts:
    """Read ``path/config.json``; raises ConfigError when it is missing, malformed or of an unsupported family."""
    file = path / "config.json"
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give the folder of a Hugging Face model (relative to the current directory)")
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json; give the folder of a Hugging Face model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy the model again") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds no JSON object; copy the model again")
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(f"{file}: model_type {model_type!r} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}")
    heads = _positive(raw, "num_attention_heads", file)
    # Llama configs of before grouped-query attention leave the key out.
    key_value_heads = heads if model_type == "llama" and raw.get("num_key_value_heads") is None else None
    return ModelFacts(
        path=path,
        model_type=model_type,
        num_layers=_positive(raw, "num_hidden_layers", file),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or _positive(raw, "num_key_value_heads", file),
        hidden_size=_positive(raw, "hidden_size", file),
        intermediate_size=_positive(raw, "intermediate_size", file),
        vocab_size=_positive(raw, "vocab_size", file),
        max_position_embeddings=_positive(raw, "max_position_embeddings", file),
        rope_type=_rope_type(raw),
        hidden_act=str(raw.get("hidden_act", "silu")),
        biases=tuple(name for name in ("attention_bias", "mlp_bias") if raw.get(name)),
        sliding_window=bool(raw.get("use_sliding_window")) or "sliding_attention" in (raw.get("layer_types") or ()),
        quantization=_quantization(raw),
    )


def _positive(raw: Mapping[str, Any], name: str, file: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{file}: {name} is {json.dumps(value)}, not a whole number ≥ 1; copy the model again")
    return value


def _rope_type(raw: Mapping[str, Any]) -> str:
    """transformers 5 writes ``rope_parameters``, transformers 4 ``rope_scaling`` with ``rope_type`` or, older still, ``type``."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _quantization(raw: Mapping[str, Any]) -> str | None:
    quantization = raw.get("quantization_config")
    return str(quantization.get("quant_method", "unknown method")) if quantization else None
