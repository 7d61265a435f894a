"""Tiny random models of the real families, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megarl.config.schema import Config

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"pad_token_id": None, "eos_token_id": 2, "rms_norm_eps": 1e-3}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "num_mtp_layers": 0,
            "rms_norm_eps": 1e-4,  # the norms of the latents keep 1e-6 (see models/latent_attention.py)
        },
    ),
}
YARN = {  # with the factors that only latent attention has
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}
VOCABULARY_SIZE = 131  # prime: not divisible by any tensor parallel size


def write_tiny_model(folder: Path, family: str, **overrides: Any) -> PreTrainedModel:
    """Save a random float32 model with no weight at a special value, and return it."""
    config_class, model_class, special = CLASSES[family]
    sizes = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**(sizes | special | overrides))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return model


def tiny_config(folder: Path, **overrides: Any) -> Config:
    """An RL config of the tiny model with every term of the objective switched on."""
    values: dict[str, Any] = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(folder)},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {"samples_per_prompt": 3, "max_new_tokens": 17, "prompts_per_step": 4},
        "policy": {"max_tokens_per_micro_batch": 64, "logprob_chunk_tokens": 7},
        "algorithm": {"kl": {"place": "loss", "coefficient": 0.1}, "entropy_coefficient": 0.01},
    }
    return Config.model_validate(values | overrides)


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13]]


@torch.no_grad()
def chosen_experts(model: PreTrainedModel, token_ids: tuple[int, ...]) -> Tensor:
    """Integer [tokens, layers with experts, top_k], ascending, by one forward pass without a cache."""
    chosen: list[Tensor] = []
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(lambda module, arguments, output: chosen.append(output[2])) for router in routers]
    model(torch.tensor([token_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1).sort(dim=-1).values
