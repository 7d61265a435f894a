"""What the rollout tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

VOCABULARY = 97


def make_tiny_model(seed: int, folder: Path | None = None, *, tied: bool = True) -> PreTrainedModel:
    """A random two-layer Qwen2 with wide logits; its config.json is written to ``folder`` when given."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    if folder is not None:
        config.save_pretrained(folder)
    return model


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``make_tiny_model``."""
    return make_tiny_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with the config.json of the tiny model."""
    make_tiny_model(0, tmp_path)
    return tmp_path
