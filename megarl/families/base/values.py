"""Refuses a config.json with a value of the wrong type or size, once, for all keys that MegaRL, transformers or an engine reads."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError, shortened
from megarl.families.base.rope_scaling import ORIGINAL

LARGEST_SIZE = 1 << 24  # of one dimension of a tensor, a vocabulary or a number of experts
MOST_LAYERS = 10_000
LONGEST = 1 << 40  # positions

# These compute attention otherwise, or scale what a layer computes; transformers' classes of these families do not read them.
UNKNOWN_ATTENTION = (
    "alibi",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "block_sparse_attention",
    "embedding_multiplier",
    "final_logit_softcapping",
    "index_topk",
    "logits_scaling",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "sparse_attention_config",
)


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    def is_right(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return is_right, f"a whole number from {low} to {high}"


def _number(low: float, *, above: bool) -> tuple[Callable[[Any], bool], str]:
    def is_right(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and (value > low if above else value >= low)

    return is_right, f"a number {'>' if above else '≥'} {low:g}"


def _kind(words: str, kind: type) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, kind), words


def _list_of(words: str, kind: type) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value), f"a list of {words}"


SIZE, TEXT, SWITCH, OBJECT = _whole(1, LARGEST_SIZE), _kind("a text", str), _kind("true or false", bool), _kind("an object", dict)
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "decoder_sparse_step",
            "moe_layer_freq",
        ),
        SIZE,
    ),
    **dict.fromkeys(("max_position_embeddings", ORIGINAL), _whole(1, LONGEST)),
    "sliding_window": _whole(0, LONGEST),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_shared_experts",
            "n_group",
            "topk_group",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "first_k_dense_replace",
            "max_window_layers",
            "num_nextn_predict_layers",
        ),
        _whole(0, LARGEST_SIZE),  # 0 where a family has none; what it has is checked where it is read
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "norm_topk_prob",
            "rope_interleave",
        ),
        SWITCH,
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "routed_scaling_factor"), _number(0, above=True)),
    **dict.fromkeys(("initializer_range", "attention_dropout"), _number(0, above=False)),
    **dict.fromkeys(("hidden_act", "topk_method", "scoring_func", "torch_dtype", "dtype"), TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), OBJECT),
    **dict.fromkeys(("architectures", "layer_types"), _list_of("texts", str)),
    "mlp_only_layers": _list_of("whole numbers", int),
}
ROPE_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(
        ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _number(0, above=True)
    ),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), _number(0, above=False)),
    ORIGINAL: _whole(1, LONGEST),
}


def check_values(raw: Mapping[str, object], file: Path) -> None:
    """Refuse wrong values; a key that is left out or null is for its reader to judge.

    Raises:
        ConfigError: with one line that names the file, the key and the value.
    """
    for line in _problems(raw):
        raise ConfigError(f"{file}: {line}; copy the model again")


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrong(raw, VALUES, "")
    for name in ("rope_scaling", "rope_parameters"):
        yield from _wrong(raw.get(name) or {}, ROPE_VALUES, f"{name}.")
    yield from _mismatches(raw)
    for name in UNKNOWN_ATTENTION:
        if raw.get(name) not in (None, False, {}, []):
            yield f"{name} is {_text(raw[name])}, which changes what layers compute and is not supported; give a model without"
    for values in (raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}):
        if (part := values.get("partial_rotary_factor")) not in (None, 1):
            yield f"partial_rotary_factor is {_text(part)}, and only heads that rotate whole are supported"


def _wrong(values: Mapping[str, object], table: Mapping[str, tuple[Callable[[object], bool], str]], prefix: str) -> Iterator[str]:
    for name, (is_right, words) in table.items():
        value = values.get(name)
        if value is not None and not is_right(value):
            yield f"{prefix}{name} is {_text(value)}, not {words}"


def _mismatches(raw: Mapping[str, Any]) -> Iterator[str]:
    layers, types = raw.get("num_hidden_layers"), raw.get("layer_types")
    if types is not None and layers is not None and len(types) != layers:
        yield f"layer_types has {len(types)} entries and num_hidden_layers is {layers}"
    if others := [name for name in types or () if name not in ("full_attention", "sliding_attention")]:
        yield f"layer_types has {_text(others[0])}, and only full_attention and sliding_attention are supported"


def _text(value: object) -> str:
    return shortened(json.dumps(value), 60)
