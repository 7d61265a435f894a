"""Reward models that the real vLLM and SGLang serve. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen2Tokenizer

from megarl.config.schema import RewardsConfig
from megarl.rewards.combine import RewardScorer
from megarl.types import FinishReason, Prompt, Rollout
from served_models import START_TIMEOUT, served_model, until_ready

VOCABULARY = 131

ARGUMENTS = {"vllm": {"runner": "pooling"}, "sglang": {"is_embedding": True, "skip_tokenizer_init": True}}


def write_reward_model(folder: Path) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    # vLLM's endpoint wants a tokenizer, and has no use for it
    vocabulary = {chr(ord("a") + index): index for index in range(VOCABULARY)}
    Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="a", pad_token="a", unk_token=None).save_pretrained(folder)
    return model


def random_rollouts() -> list[Rollout]:
    """Token ids that no text is needed for, some with a common prefix, one of one token."""
    generator = random.Random(0)
    prompt = Prompt(prompt_id="train/0", token_ids=(), text="", reference={}, task="train")
    rollouts = []
    for index, (num_prompt, num_response) in enumerate([(1, 0), (3, 5), (70, 1), (70, 40), (2, 9)]):
        ids = tuple(generator.randrange(VOCABULARY) for _ in range(num_prompt + num_response))
        if num_prompt == 70:
            ids = (*range(40, 110), *ids[70:])
        rollouts.append(
            Rollout(
                prompt=replace(prompt, token_ids=ids[:num_prompt]),
                sample_index=index,
                token_ids=ids[num_prompt:],
                from_policy=(True,) * num_response,
                logprobs=(0.0,) * num_response,
                weight_versions=(0,) * num_response,
                finish_reason=FinishReason.STOP,
                text="",
            )
        )
    return rollouts


async def scores_of(name: str, folder: Path, rollouts: list[Rollout]) -> list[float]:
    """Start the server, wait until it scores, score all rollouts at the same time."""
    async with served_model(name, folder, **ARGUMENTS[name]) as (url, process):
        scorer = {"type": "reward_server", "url": url, "engine": name}
        reward_scorer = RewardScorer(RewardsConfig.model_validate({"scorers": [scorer], "timeout": 30}), {}, str)
        try:
            await until_ready(reward_scorer, process)
            scored = await asyncio.gather(*(reward_scorer.score(rollout) for rollout in rollouts))
        finally:
            await reward_scorer.close()
    return [one.reward for one in scored if one is not None]


@pytest.mark.timeout(2 * START_TIMEOUT)
@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_scores_are_transformers(tmp_path: Path, name: str) -> None:
    model = write_reward_model(tmp_path / "model")
    rollouts = random_rollouts()
    scores = asyncio.run(scores_of(name, tmp_path, rollouts))
    with torch.no_grad():
        expected = [model(torch.tensor([one.prompt.token_ids + one.token_ids])).logits.item() for one in rollouts]
    gaps = [abs(score - wanted) for score, wanted in zip(scores, expected, strict=True)]
    print(f"{name}: scores {min(expected):.2f} to {max(expected):.2f}, worst gap {max(gaps):.1e}")
    assert max(expected) - min(expected) > 0.5
    assert max(gaps) <= 1e-4
