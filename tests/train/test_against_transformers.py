"""Log-probabilities and GRPO gradients against transformers, one unpacked sequence at a time, with a loop-written objective."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megarl.cli.parity import ParityRun, parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import PackedBatch, TokenOutputs
from tiny import PROMPTS, VOCABULARY_SIZE, tiny_config, write_tiny_model


def sequences(packed: PackedBatch) -> list[tuple[int, Tensor, int]]:
    """Start, token ids and prompt length of each sequence."""
    result = []
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        result.append((start, packed.token_ids[start:stop], int((~packed.loss_mask[start:stop]).sum())))
    return result


def transformers_logprobs(model: PreTrainedModel, tokens: Tensor, temperature: float) -> Tensor:
    """[length - 1, vocabulary] log-probabilities of every next token."""
    return (model(tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)


def compute_logprobs(config: Config, packed: PackedBatch, output: Path) -> None:
    values = Policy(config, total_updates=1).engine.forward_only(packed)
    if is_main_rank():
        torch.save(values, output)


ROPE = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000.0,
        }
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    },
}
CASES = [("llama", "llama3"), ("qwen2", "yarn"), ("qwen3", "linear")]
LAYOUTS = ["", "tp=2,pp=2,cp=2,sequence_parallel=true", "cp=4,context_parallel_method=all_to_all"]


@pytest.mark.parametrize(("family", "rope"), CASES)
def test_logprobs_and_entropy_with_stretched_positions_and_temperature(tmp_path: Path, family: str, rope: str) -> None:
    model = write_tiny_model(tmp_path, family, **ROPE[rope])
    config = tiny_config(tmp_path, rollout={"temperature": 0.7, "samples_per_prompt": 3, "max_new_tokens": 17})
    packed = synthetic_batch(PROMPTS, config)
    expected = torch.zeros(2, packed.token_ids.numel(), dtype=torch.float64)
    with torch.no_grad():
        for start, tokens, prompt in sequences(packed):
            logprobs = transformers_logprobs(model, tokens, 0.7).double()
            for position in range(prompt, len(tokens)):
                row = logprobs[position - 1]
                expected[0, start + position] = row[tokens[position]]
                expected[1, start + position] = -(row.exp() * row).sum()
    for layout in LAYOUTS:
        changed, num_ranks = with_layout(config, parse_layout(layout))
        run_local_ranks(compute_logprobs, (changed, packed, tmp_path / "out.pt"), num_ranks, 60)
        actual = torch.stack(torch.load(tmp_path / "out.pt")).double()
        assert (actual - expected).abs().max() <= 1e-5, layout


def loop_written_grpo(model: PreTrainedModel, packed: PackedBatch, scores: TokenOutputs, config: Config) -> Tensor:
    """GRPO (arXiv 2402.03300, equations 3 and 4, plus an entropy bonus), in float64 and Python loops."""
    algorithm = config.algorithm
    assert scores.reference is not None
    loss = torch.zeros((), dtype=torch.float64)
    items = sequences(packed)
    for number, (start, tokens, prompt) in enumerate(items):
        members = [i for i in range(len(items)) if packed.group_ids[i] == packed.group_ids[number]]
        rewards = [float(packed.rewards[i]) for i in members]
        mean = sum(rewards) / len(rewards)
        std = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
        advantage = (float(packed.rewards[number]) - mean) / (std + 1e-6)
        logprobs = transformers_logprobs(model, tokens, config.rollout.temperature)
        terms = []
        for position in range(prompt, len(tokens)):
            row = logprobs[position - 1]
            logp, old = row[tokens[position]], float(scores.old[start + position])
            ratio = (logp - old).exp()
            low, high = 1 - algorithm.clip.low, 1 + algorithm.clip.high
            clipped = min(max(float(ratio), low), high)
            surrogate = ratio * advantage if float(ratio) * advantage <= clipped * advantage else torch.tensor(clipped * advantage)
            log_r = float(scores.reference[start + position]) - logp
            kl = log_r.exp() - 1 - log_r
            entropy = -(row.exp() * row).sum()
            terms.append(-surrogate + algorithm.kl.coefficient * kl - algorithm.entropy_coefficient * entropy)
        if terms:
            loss = loss + torch.stack([term.double() for term in terms]).mean() / len(items)
    return loss


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_grpo_gradient_equals_a_loop_over_transformers(tmp_path: Path, family: str) -> None:
    model = write_tiny_model(tmp_path, family).double()
    run = ParityRun(tiny_config(tmp_path), PROMPTS, tmp_path)
    packed, scores = torch.load(tmp_path / "batch.pt", weights_only=False)
    loss = loop_written_grpo(model, packed, scores, run.config)
    loss.backward()
    assert abs(run.reference.loss - loss.item()) <= 1e-5 * abs(loss.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gap = (run.reference.gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert gap <= 1e-5, (name, gap)
    assert run.reference.gradients["model.embed_tokens.weight"].shape[0] == VOCABULARY_SIZE
