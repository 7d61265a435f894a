"""What the cross-checks need to know of a Hugging Face model, read from its config.json without torch or transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.model_values import check_values
from megarl.config.rope_scaling import rope_parameters, stated_original, with_scaling
from megarl.errors import ConfigError, quoted
from megarl.json_text import read_json_object

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3")


# Names of the number of routed experts, the family's own first; transformers 5 writes num_local_experts for all.
NUM_EXPERTS_KEYS = {
    "mixtral": ("num_local_experts",),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "deepseek_v3": ("n_routed_experts", "num_local_experts"),
}
LATENT_NORM_EPSILON = 1e-6  # DeepSeek's modeling code leaves it at the default of its RMSNorm, whatever rms_norm_eps says
DEFAULT_SLIDING_WINDOW = 4096  # tokens, of transformers where a config leaves the key out


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """Facts of a config.json about experts.

    Attributes:
        num_experts: routed experts of each MoE layer.
        top_k: experts that one token visits.
        ffn_size: width of one routed expert.
        shared_ffn_size: width of all shared experts together; 0 without any.
        num_layers: layers of the model.
        moe_layers: those that have experts, counted from 0.
        is_normalised: the chosen experts' scores are divided by their sum.
        is_sigmoid: scores are sigmoids of the router's logits, not their softmax.
        num_groups, top_k_groups: groups of experts, and how many of them one token visits; 1 and 1 without groups.
        topk_method, scoring_func, moe_layer_freq: DeepSeek's keys, which transformers ignores; None when left out.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    shared_ffn_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    is_normalised: bool
    is_sigmoid: bool
    num_groups: int
    top_k_groups: int
    topk_method: str | None
    scoring_func: str | None
    moe_layer_freq: int | None


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
        original_max_position_embeddings: positions that it was pretrained on, where config.json states them for a scaling.
        rope_parameters: rotary positions and their scaling; ``rope_type`` is ``default`` when there is none.
        hidden_act: activation of the MLP.
        biases: the bias switches that are on, of ``attention_bias`` and ``mlp_bias``.
        sliding_window: tokens that the layers with a window see; None when every layer sees the whole sequence.
        experts: None in dense models.
        has_latent_attention: queries, keys and values are projected through latents (MLA).
        rotates_halves: RoPE rotates the two halves of a head against each other, not neighbouring pairs.
        has_tied_embeddings: the output layer is the embedding.
        norm_epsilon: of the RMS norms.
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
    original_max_position_embeddings: int | None
    rope_parameters: Mapping[str, Any]
    hidden_act: str
    biases: tuple[str, ...]
    sliding_window: int | None
    experts: ExpertFacts | None
    has_latent_attention: bool
    rotates_halves: bool
    has_tied_embeddings: bool
    norm_epsilon: float
    quantization: str | None

    @property
    def rope_type(self) -> str:
        """Kind of rotary position scaling."""
        return str(self.rope_parameters["rope_type"])


def read_config_json(path: Path) -> dict[str, Any]:
    """Read ``path/config.json``; raises ConfigError when it is missing, malformed or of an unsupported family."""
    file = path / "config.json"
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give the folder of a Hugging Face model (relative to the current directory)")
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json; give the folder of a Hugging Face model")
    try:
        raw = read_json_object(file)
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy the model again") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); copy the model again") from None
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        shown = quoted(model_type)
        raise ConfigError(f"{file}: model_type {shown} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}")
    check_values(raw, file)
    _positive(raw, "max_position_embeddings", file)
    return raw


def read_model_facts(path: Path, rope_scaling: Mapping[str, Any] | None = None) -> ModelFacts:
    """Facts of ``path/config.json``; raises like ``read_config_json``.

    Args:
        path: the model folder.
        rope_scaling: in place of its own; checked already.
    """
    raw, file = read_config_json(path), path / "config.json"
    if rope_scaling is not None:
        raw = with_scaling(raw, rope_scaling)
    model_type = raw["model_type"]
    heads = _positive(raw, "num_attention_heads", file)
    has_latent_attention = model_type == "deepseek_v3"
    # Llama configs of before grouped-query attention leave the key out; latent attention has a key and a value for every head.
    is_left_out = model_type == "llama" and raw.get("num_key_value_heads") is None
    key_value_heads = heads if is_left_out or has_latent_attention else None
    return ModelFacts(
        path=path,
        model_type=model_type,
        num_layers=_positive(raw, "num_hidden_layers", file),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or _positive(raw, "num_key_value_heads", file),
        hidden_size=_positive(raw, "hidden_size", file),
        intermediate_size=_positive(raw, "intermediate_size", file),
        vocab_size=_positive(raw, "vocab_size", file),
        max_position_embeddings=raw["max_position_embeddings"],
        original_max_position_embeddings=stated_original(raw),
        rope_parameters=rope_parameters(raw),
        hidden_act=str(raw.get("hidden_act", "silu")),
        biases=tuple(name for name in ("attention_bias", "mlp_bias") if raw.get(name)),
        sliding_window=_sliding_window(raw),
        experts=_experts(raw, file),
        has_latent_attention=has_latent_attention,
        rotates_halves=not has_latent_attention or raw.get("rope_interleave") is False,
        has_tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        quantization=_quantization(raw),
    )


def _positive(raw: Mapping[str, Any], name: str, file: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{file}: {name} is {json.dumps(value)}, not a whole number ≥ 1; copy the model again")
    return value


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """Mistral and Mixtral switch the window on by its size, Qwen by a switch, newer configs by the types of their layers."""
    if raw["model_type"] in ("mistral", "mixtral"):
        default = DEFAULT_SLIDING_WINDOW if raw["model_type"] == "mistral" else None
        window = raw.get("sliding_window", default)
        return None if window is None else int(window)
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
        return int(raw.get("sliding_window") or DEFAULT_SLIDING_WINDOW)
    return None


def _experts(raw: Mapping[str, Any], file: Path) -> ExpertFacts | None:
    model_type, num_layers = raw["model_type"], raw["num_hidden_layers"]
    names = NUM_EXPERTS_KEYS.get(model_type)
    if names is None:
        return None
    ffn_size = _positive(raw, "intermediate_size" if model_type == "mixtral" else "moe_intermediate_size", file)
    shared, moe_layers, is_normalised, groups = 0, tuple(range(num_layers)), True, (1, 1)
    if model_type == "qwen3_moe":
        step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
        moe_layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
        is_normalised = bool(raw.get("norm_topk_prob", False))
    if model_type == "deepseek_v3":
        shared = raw.get("n_shared_experts", 1) or 0
        moe_layers = tuple(range(raw.get("first_k_dense_replace", 3), num_layers))
        is_normalised = bool(raw.get("norm_topk_prob", True))
        groups = raw.get("n_group", 8) or 1, raw.get("topk_group", 4) or 1
    if not moe_layers:
        return None
    return ExpertFacts(
        num_experts=_positive(raw, next((name for name in names if name in raw), names[0]), file),
        top_k=_positive(raw, "num_experts_per_tok", file),
        ffn_size=ffn_size,
        shared_ffn_size=shared * ffn_size,
        num_layers=num_layers,
        moe_layers=moe_layers,
        is_normalised=is_normalised,
        is_sigmoid=model_type == "deepseek_v3",
        num_groups=groups[0],
        top_k_groups=groups[1],
        topk_method=raw.get("topk_method"),
        scoring_func=raw.get("scoring_func"),
        moe_layer_freq=raw.get("moe_layer_freq"),
    )


def _quantization(raw: Mapping[str, Any]) -> str | None:
    quantization = raw.get("quantization_config")
    return str(quantization.get("quant_method", "unknown method")) if quantization else None
