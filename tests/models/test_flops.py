"""The count of operations against those that torch counts in transformers' forward pass."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megarl.families.registry import read_architecture
from megarl.models.flops import sequence_flops
from megarl.models.transformer_config import transformer_config
from tiny import VOCABULARY_SIZE, tiny_config, write_tiny_model


def counted(model: torch.nn.Module, length: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_equals_what_torch_counts(tmp_path: Path, family: str) -> None:
    model = write_tiny_model(tmp_path, family)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    whole = tiny_config(tmp_path)
    config = transformer_config(read_architecture(tmp_path), whole.model, whole.policy, 1.0, False)
    flops = sequence_flops(config)
    for length in (16, 48):
        outside = 2 * length * config.hidden_size * VOCABULARY_SIZE  # the output layer, which works on trained tokens only
        not_causal = flops.per_pair * length**2  # eager attention computes all scores
        assert counted(model, length) - outside == flops.of(length) + not_causal
