"""What the tests of all rollout engines share: a tiny model, sampling settings, and log-probabilities by transformers."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from megarl.engines.protocol import Generation, RolloutEngine, SamplingParams

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
        eos_token_id=list(range(VOCABULARY // 2)),  # an engine must not end responses with tokens that no request names
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


def exported_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """As the trainer exports them: tied weights once."""
    tied = model.config.tie_word_embeddings
    return ((name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight"))


def weight_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``exported_weights``."""
    return {name: tuple(tensor.shape) for name, tensor in exported_weights(model)}


def sampling(**changes: Any) -> SamplingParams:
    """Three samples at temperature 1 from the largest seed that the collector gives, with ``changes``."""
    settings = {
        "num_samples": 3,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": (),
        "repetition_stop": None,
        "seed": 2**62 - 1,
    }
    return SamplingParams(**(settings | changes))


def repeats_first_at(tokens: Sequence[int], smallest: int, largest: int, count: int) -> int | None:
    """Length of the shortest beginning that ends with ``count`` times one pattern of ``smallest`` to ``largest`` tokens."""
    for length in range(1, len(tokens) + 1):
        for size in range(smallest, largest + 1):
            end = list(tokens[max(0, length - size * count) : length])
            if len(end) == size * count and end == end[:size] * count:
                return length
    return None


async def generate_all(engine: RolloutEngine, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> list[list[Generation]]:
    """One request for each prompt, all at the same time."""
    return await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...], temperature: float
) -> torch.Tensor:
    """Log-probability of each response token by one transformers forward without a cache, float64."""
    ids = torch.tensor([prompt + response])
    logprobs = (model(ids, use_cache=False).logits[0].double() / (temperature or 1)).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def worst_gap(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], groups: Sequence[Sequence[Generation]], temperature: float
) -> float:
    """Largest difference between an engine's log-probabilities and the reference."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for generation in group:
            expected = reference_logprobs(model, prompt, generation.token_ids, temperature)
            worst = max(worst, (expected - torch.tensor(generation.logprobs).double()).abs().max().item())
    return worst
