"""Reward models that the real vLLM and SGLang serve. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen2Tokenizer

from megarl.config.schema import EngineServerConfig, RewardsConfig
from megarl.errors import RewardError
from megarl.rewards.combine import RewardScorer
from megarl.rollout.server_launch import HOST, flags, inherited_environment, server_python
from megarl.rollout.server_process import ServerProcess, free_port
from megarl.rollout.sglang import CPU_FOLDER
from megarl.types import FinishReason, Prompt, Rollout

START_TIMEOUT = 150
VOCABULARY = 131

COMMANDS = {
    "vllm": (
        ["-m", "vllm.entrypoints.openai.api_server"],
        {"runner": "pooling", "max_model_len": 160, "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 64 << 20},
        {"VLLM_NO_USAGE_STATS": "1"},
    ),
    "sglang": (
        ["-m", "sglang.launch_server"],
        {
            "is_embedding": True,
            "skip_tokenizer_init": True,
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_overlap_schedule": True,
            "disable_cuda_graph": True,
            "max_total_tokens": 4096,
            "grammar_backend": "none",
        },
        {"PYTHONPATH": str(CPU_FOLDER)},
    ),
}


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
    module, arguments, environment = COMMANDS[name]
    port = free_port(HOST, 0, "")
    common = {"host": HOST, "port": port, "dtype": "float32"}
    model = {"vllm": "model", "sglang": "model_path"}[name]
    command = [server_python(name, EngineServerConfig()), *module]
    command += flags({model: str(folder / "model"), **common, **arguments}, negated=False)
    needed = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", **environment}
    process = ServerProcess(name, command, inherited_environment() | needed, folder / "engine.log")
    scorer = {"type": "reward_server", "url": f"http://{HOST}:{port}", "engine": name}
    reward_scorer = RewardScorer(RewardsConfig.model_validate({"scorers": [scorer], "timeout": 30}), {}, str)
    await process.start()
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                assert process.exited is not None and not process.exited.done(), process.last_words()
                try:
                    await reward_scorer.check_servers()
                    break
                except RewardError:
                    await asyncio.sleep(0.25)
        scored = await asyncio.gather(*(reward_scorer.score(rollout) for rollout in rollouts))
    finally:
        await reward_scorer.close()
        await process.close()
    return [one.reward for one in scored if one is not None]


@pytest.mark.timeout(2 * START_TIMEOUT)
@pytest.mark.parametrize("name", list(COMMANDS))
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
