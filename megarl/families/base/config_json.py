"""The values of a config.json, and the reader of what most families' have in common."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError
from megarl.families.base.architecture import Architecture, MixtureOfExperts

DEFAULT_SLIDING_WINDOW = 4096  # tokens, of transformers where a config leaves the key out
NORM_EPSILON, INITIALIZER_RANGE = 1e-6, 0.02  # of transformers where a config leaves the key out


@dataclass(frozen=True, slots=True)
class ConfigJson:
    """A config.json whose values have been checked one by one.

    Attributes:
        path: the model folder.
        values: by key; a key may be left out or null.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Name of the family."""
        return str(self.values["model_type"])

    def size(self, *names: str) -> int:
        """Return the whole number ≥ 1 under the first of ``names`` that is there.

        Raises:
            ConfigError: there is none.
        """
        name = next((name for name in names if name in self.values), names[0])
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} is {json.dumps(value)}, not a whole number ≥ 1")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number, the default where it is left out or null."""
        value = self.values.get(name)
        return default if value is None else float(value)

    def error(self, problem: str) -> ConfigError:
        """Make the error that says what is wrong in the file."""
        return ConfigError(f"{self.path / 'config.json'}: {problem}; copy the model again")


def read_decoder(config: ConfigJson, *, kv_heads: int | None = None, head_dim: int | None = None) -> Architecture:
    """Read what most families have in common: a dense decoder with grouped-query attention that normalises its layers' inputs.

    A family changes with ``dataclasses.replace`` what is otherwise.

    Args:
        config: the file.
        kv_heads: key-value heads; None reads num_key_value_heads, which must be there.
        head_dim: width of a query head; None reads head_dim or hidden_size / num_attention_heads, and checks them.

    Raises:
        ConfigError: a size is missing, or the heads do not fit each other.
    """
    values = config.values
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    if head_dim is None:
        _check_heads(config)
        head_dim = values.get("head_dim") or hidden // heads
    return Architecture(
        path=config.path,
        family=config.model_type,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=config.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads or config.size("num_key_value_heads"),
        head_dim=head_dim,
        vocabulary_size=config.size("vocab_size"),
        norm_epsilon=config.number("rms_norm_eps", NORM_EPSILON),
        qkv_bias=False,
        qk_norm=None,
        norms_outputs=False,
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_positions=config.size("max_position_embeddings"),
        initializer_range=config.number("initializer_range", INITIALIZER_RANGE),
        sliding_window=_switched_window(values),
        moe=None,
        mla=None,
        config_json=values,
    )


def _check_heads(config: ConfigJson) -> None:
    """Refuse heads of one width that do not fit each other or RoPE.

    Raises:
        ConfigError: with one line that says why.
    """
    heads, groups, hidden = (config.values.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads is None or hidden is None:
        return
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.error(f"hidden_size {hidden} does not divide by num_attention_heads {heads}, and there is no head_dim")
    if (width := config.values.get("head_dim") or hidden // heads) % 2:
        raise config.error(
            f"heads are {width} wide (head_dim, or hidden_size / num_attention_heads {heads}), and RoPE needs an even number"
        )
    if groups and heads % groups:
        raise config.error(f"num_attention_heads {heads} does not divide by num_key_value_heads {groups}")


def kv_heads_or_all(config: ConfigJson) -> int:
    """Return num_key_value_heads; where it is left out, each query head has a key and a value of its own."""
    return config.values.get("num_key_value_heads") or config.size("num_attention_heads")


def sliding_window(config: ConfigJson, default: int | None) -> int | None:
    """Return the tokens that a window of every layer spans; None where the file says null, the default where it says nothing."""
    window = config.values.get("sliding_window", default)
    return None if window is None else int(window)


def _switched_window(values: Mapping[str, Any]) -> int | None:
    """Return the window that a switch, or the types of the layers, turn on."""
    if values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ()):
        return int(values.get("sliding_window") or DEFAULT_SLIDING_WINDOW)
    return None


def softmax_experts(
    config: ConfigJson, *, number_keys: tuple[str, ...], ffn_size: int, normalise_top_k: bool, is_moe_layer: tuple[bool, ...]
) -> MixtureOfExperts | None:
    """Read experts that a softmax over all of them chooses from; None where no layer has them.

    Args:
        config: the file.
        number_keys: of the number of experts, the family's own first.
        ffn_size, normalise_top_k, is_moe_layer: of the result.
    """
    if not any(is_moe_layer):
        return None
    return MixtureOfExperts(
        num_experts=config.size(*number_keys),
        top_k=config.size("num_experts_per_tok"),
        ffn_size=ffn_size,
        shared_ffn_size=0,
        is_moe_layer=is_moe_layer,
        score_function="softmax",
        normalise_top_k=normalise_top_k,
        num_groups=1,
        top_k_groups=1,
        scaling_factor=1.0,
        correction_bias=False,
    )
