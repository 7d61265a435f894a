"""What the engine tests share: a tiny model and its log-probabilities by transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from megarl.config.schema import Config

VOCABULARY = 512


def make_tiny_model(seed: int, folder: Path | None = None, *, tied: bool = True) -> PreTrainedModel:
    """A random Qwen2 of about 0.5 M parameters with wide logits, written to ``folder`` when given."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # the usual initial scale gives almost uniform logits, which hide a wrong weight
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def make_engine_config(folder: Path, **vllm: object) -> Config:
    """The configuration of a run on ``folder`` with vLLM."""
    return Config.model_validate(
        {
            "kind": "rl",
            "steps": 1,
            "model": {"path": folder},
            "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
            "rollout": {
                "engine": "vllm",
                "max_prompt_tokens": 128,
                "max_new_tokens": 32,
                "vllm": {"start_timeout": 240, "update_timeout": 60, **vllm},
            },
        }
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``make_tiny_model``."""
    return make_tiny_model


@pytest.fixture(scope="session")
def engine_config() -> Callable[..., Config]:
    """``make_engine_config``."""
    return make_engine_config
