"""A small model's config.json, which the tests of checks change."""

from typing import Any

MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
