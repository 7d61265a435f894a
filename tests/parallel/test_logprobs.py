"""The chunked vocab-parallel function against a float64 log-softmax and autograd, and its gradients numerically."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.launch import run_local_ranks
from megarl.parallel.logprobs import vocab_parallel_logprobs

ROWS, HIDDEN, VOCABULARY = 23, 16, 37


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return normal(ROWS, HIDDEN), normal(VOCABULARY, HIDDEN), targets, normal(ROWS), normal(ROWS)


def reference(temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets, grad_logprobs, grad_entropy = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    chosen = logprobs[torch.arange(ROWS), targets]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    ((chosen * grad_logprobs).sum() + (entropy * grad_entropy).sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return chosen.detach(), entropy.detach(), hidden.grad, weight.grad


def check_on_rank(tp: int, chunk_tokens: int, temperature: float, padded_rows: int) -> None:
    hidden, weight, targets, grad_logprobs, grad_entropy = inputs()
    padding = torch.full((padded_rows * tp - VOCABULARY, HIDDEN), 9.0)  # must not count, whatever it holds
    padded = torch.cat([weight, padding])
    mine = padded.chunk(tp)[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        mine,
        targets,
        vocabulary_size=VOCABULARY,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        group=dist.group.WORLD,
    )
    ((logprobs * grad_logprobs).sum() + (entropy * grad_entropy).sum()).backward()
    assert hidden.grad is not None and mine.grad is not None
    dist.all_reduce(hidden.grad)
    expected = reference(temperature)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=0, atol=3e-5)
    start = dist.get_rank() * padded_rows
    own = expected[3][start : start + padded_rows]
    torch.testing.assert_close(mine.grad[: len(own)].double(), own, rtol=0, atol=3e-5)
    assert not mine.grad[len(own) :].any(), "padding rows must get no gradient"


@pytest.mark.parametrize(("tp", "padded_rows"), [(1, 37), (1, 40), (2, 19), (4, 10), (4, 13), (4, 20)])
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(1, 1.0), (5, 0.6), (1000, 1.7)])
def test_equals_float64_log_softmax(tp: int, padded_rows: int, chunk_tokens: int, temperature: float) -> None:
    run_local_ranks(check_on_rank, (tp, chunk_tokens, temperature, padded_rows), tp, 60)


def test_gradients_numerically() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 4, 2])

    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(hidden, weight, targets, vocabulary_size=5, temperature=0.8, chunk_tokens=2)

    # the function's results are float32, so differences are coarse
    torch.autograd.gradcheck(function, (hidden, weight), eps=1e-3, atol=2e-3, rtol=1e-2)


def test_no_rows() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    logprobs, _ = vocab_parallel_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), vocabulary_size=VOCABULARY)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
