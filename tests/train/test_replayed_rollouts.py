"""Routing replay from the engine to the trainer: with it the trainer's log-probabilities are nearer to the sampler's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Tokenizer

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.config.schema import Config
from megarl.data.packing import no_routing
from megarl.data.template import load_tokenizer
from megarl.loop.prompts import read_prompts
from megarl.loop.rollout_manager import RolloutManager
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import NO_EXPERT
from tiny import write_tiny_model

LETTERS = ["<eos>", *map(chr, range(33, 127)), "Ġ", "Ċ"]


def write_run(folder: Path) -> Config:
    """A run in bfloat16, where the engine's routers and the trainer's choose different experts here and there."""
    write_tiny_model(folder / "model", "qwen3_moe", vocab_size=len(LETTERS))
    vocabulary = {character: index for index, character in enumerate(LETTERS)}
    Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<eos>", pad_token="<eos>", unk_token=None).save_pretrained(
        folder / "model"
    )
    rows = [{"prompt": f"{number} + {number + 1} =", "answer": str(2 * number + 1)} for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "kind": "rl",
        "steps": 1,
        "run_dir": folder / "run",
        "model": {"path": folder / "model", "dtype": "bfloat16"},
        "policy": {"parallel": {"tp": 2, "etp": 1, "ep": 2, "sequence_parallel": True}},
        "rollout": {
            "routing_replay": True,
            "prompts_per_step": 16,
            "samples_per_prompt": 2,
            "max_new_tokens": 24,
            "embedded": {"threads": 1},
        },
        "data": {"template": "{prompt}\n", "train": {"type": "jsonl", "path": folder / "rows.jsonl"}},
        "rewards": {"scorers": [{"type": "regex", "pattern": "[a-g]"}]},
    }
    return Config.model_validate(values)


def sample_and_score(config: Config, output: Path) -> None:
    """One rank: rollouts of the engine, the trainer's log-probabilities with replay and without, and an update."""
    policy = Policy(config, total_updates=1)
    tokenizer = load_tokenizer(config.model.path)
    prompts = read_prompts(config, tokenizer) if is_main_rank() else None
    rollout = RolloutManager(config, tokenizer, policy, print, prompts, with_greedy=False)
    try:
        rollout.push_weights(0)
        packed = rollout.collect(0).packed
    finally:
        rollout.close()
    own = replace(packed, routed_experts=no_routing(packed.token_ids.numel()))
    replayed, routed = policy.engine.forward_only(packed)[0], policy.engine.forward_only(own)[0]
    result = policy.update(build_supervised_batch(packed), supervised_objective)
    if is_main_rank():
        torch.save((packed, replayed, routed, result.gradient_norm), output)


@pytest.mark.timeout(120)
def test_replay_brings_trainer_and_sampler_together(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run_local_ranks(sample_and_score, (config, tmp_path / "out.pt"), 2, 100)
    packed, replayed, routed, norm = torch.load(tmp_path / "out.pt", weights_only=False)
    assert packed.routed_experts.shape[1:] == (3, 2)
    ends = packed.cu_seqlens[1:] - 1
    unknown = (packed.routed_experts == NO_EXPERT).all(dim=(1, 2)).nonzero()[:, 0]
    assert torch.equal(unknown, ends)  # all but the last token of each response, which no forward pass read
    gaps = [(scores - packed.sampler_logprobs)[packed.loss_mask].abs() for scores in (replayed, routed)]
    means, largest = [gap.mean().item() for gap in gaps], [gap.max().item() for gap in gaps]
    for name, mean, most in zip(("with replay", "without"), means, largest, strict=True):
        print(f"|trainer - sampler| {name}: mean {mean:.4f}, largest {most:.4f} nats")
    assert means[0] < means[1]
    assert largest[0] < 0.5 * largest[1]  # where another expert sees a token
    assert norm > 0
