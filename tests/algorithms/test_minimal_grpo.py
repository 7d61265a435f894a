"""The one-file example computes what the library does."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.config.schema import AlgorithmConfig
from megarl.data.packing import no_routing
from megarl.types import PackedBatch, TokenOutputs
from methods import objective_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_grpo.py"
NUM_PROMPTS, NUM_SAMPLES, LONGEST = 5, 4, 6


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_grpo", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed(padded: Tensor, mask: Tensor) -> Tensor:
    """[responses, tokens] to the rows of a packed batch, behind one prompt token each."""
    rows = [torch.cat([values.new_zeros(1), values[kept]]) for values, kept in zip(padded, mask, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_the_library_s(example: ModuleType, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_responses = NUM_PROMPTS * NUM_SAMPLES
    lengths = torch.randint(1, LONGEST + 1, (num_responses,), generator=generator)
    mask = torch.arange(LONGEST) < lengths[:, None]
    logprobs, old, reference = (
        0.4 * torch.randn(num_responses, LONGEST, generator=generator, dtype=torch.float64) - 2 for _ in range(3)
    )
    rewards = torch.randn(num_responses, generator=generator, dtype=torch.float64)
    rewards[:NUM_SAMPLES] = 0.5  # a group that teaches nothing

    logprobs.requires_grad_()
    advantages = example.group_advantages(rewards.view(NUM_PROMPTS, NUM_SAMPLES)).flatten()
    loss = example.grpo_loss(logprobs, old, reference, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)

    clip = {"low": example.CLIP, "high": example.CLIP}
    algorithm = Algorithm(
        AlgorithmConfig.model_validate({"preset": "grpo", "clip": clip, "kl": {"coefficient": example.KL_COEFFICIENT}}), LONGEST
    )
    batch = PackedBatch(
        token_ids=torch.zeros(int(lengths.sum()) + num_responses, dtype=torch.int64),
        cu_seqlens=torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0)),
        loss_mask=packed(mask, mask),
        sampler_logprobs=packed(old, mask),
        weight_versions=torch.zeros(int(lengths.sum()) + num_responses, dtype=torch.int64),
        step_rewards=torch.full((int(lengths.sum()) + num_responses,), torch.nan),
        routed_experts=no_routing(int(lengths.sum()) + num_responses),
        task_ids=torch.zeros(num_responses, dtype=torch.int64),
        group_ids=torch.arange(NUM_PROMPTS).repeat_interleave(NUM_SAMPLES),
        rewards=rewards,
        truncated=torch.zeros(num_responses, dtype=torch.bool),
        greedy_rewards=torch.zeros(num_responses),
        greedy_lengths=torch.zeros(num_responses, dtype=torch.int64),
    )
    outputs = TokenOutputs(old=packed(old, mask), entropies=packed(0 * old, mask), reference=packed(reference, mask), values=None)
    (train_batch,) = algorithm.prepare(batch, outputs, step=0).batches
    objective = objective_of(algorithm, train_batch, packed(logprobs, mask), outputs.entropies, range(num_responses))
    (expected,) = torch.autograd.grad(objective.loss, logprobs)

    # the library's token weights are float32
    torch.testing.assert_close(loss, objective.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    assert not gradient[~mask].any()


def test_the_mask_ends_with_the_first_end(example: ModuleType) -> None:
    torch.manual_seed(0)
    questions = torch.randint(0, 10, (40, example.NUM_DIGITS))
    prompts, responses, mask = example.sample(example.make_model(), questions, num_samples=2)
    assert prompts.shape == (80, example.NUM_DIGITS + 1)
    for response, kept in zip(responses.tolist(), mask.tolist(), strict=True):
        length = response.index(example.END) + 1 if example.END in response else len(response)
        assert kept == [t < length for t in range(len(response))]
    assert mask.sum(dim=1).unique().numel() > 2


def test_only_the_sorted_question_scores_one(example: ModuleType) -> None:
    questions = torch.tensor([[3, 1, 2, 1]])
    end = example.END
    responses = torch.tensor([[1, 1, 2, 3, end], [1, 1, 2, 3, 3], [3, 1, 2, 1, end], [end, end, end, end, end]])
    assert example.score(questions, responses).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.2])
    assert float(example.score(questions, torch.tensor([[1, 1, end]]))) == pytest.approx(0.4 + 0.2)
