"""GAE against its definition as a double sum, λ = 0 and 1, decoupled and length-adaptive λ, long and uneven sequences."""

import pytest
import torch

import references
from megarl.algorithms import gae
from megarl.algorithms.gae import discounted_suffix_sums, generalised_advantages, length_adaptive_trace_decay
from ragged import assert_tokens, ragged


def random_like(values: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(values.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.99, 1.0), (1.0, 1.0)])
def test_against_the_definition(discount: float, decay: float, dtype: torch.dtype) -> None:
    batch = ragged(0, dtype)
    rewards, values = random_like(batch.outputs.old, 1), random_like(batch.outputs.old, 2)
    actual = generalised_advantages(
        rewards, values, batch.packed.cu_seqlens, batch.packed.loss_mask, discount=discount, trace_decay=decay
    )
    pairs = [([float(rewards[p]) for p in one], [float(values[p]) for p in one]) for one in batch.trained]
    expected = [references.gae(r, v, discount, decay) for r, v in pairs]
    assert_tokens(actual, expected, batch, 1e-9 if dtype == torch.float64 else 1e-5)
    for (r, v), row in zip(pairs, expected, strict=True):
        for t in range(len(r)):
            if decay == 0.0:
                assert row[t] == pytest.approx(r[t] + (discount * v[t + 1] if t + 1 < len(v) else 0.0) - v[t])
            if decay == 1.0:
                assert row[t] == pytest.approx(sum(discount ** (u - t) * r[u] for u in range(t, len(r))) - v[t])


def test_environment_tokens_are_skipped_not_zeroed() -> None:
    """A response with an environment's tokens inside has the advantages of the same response without them."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    plain = generalised_advantages(
        rewards, values, torch.tensor([0, 5]), torch.ones(5, dtype=torch.bool), discount=0.9, trace_decay=0.7
    )
    places = torch.tensor([1, 2, 5, 6, 7])
    mask = torch.zeros(8, dtype=torch.bool).index_fill(0, places, True)
    spread_rewards, spread_values = (
        torch.full((8,), 99.0, dtype=torch.float64).index_copy(0, places, x) for x in (rewards, values)
    )
    spread = generalised_advantages(spread_rewards, spread_values, torch.tensor([0, 8]), mask, discount=0.9, trace_decay=0.7)
    torch.testing.assert_close(spread[places], plain)


def test_length_adaptive_and_decoupled_decay() -> None:
    lengths = torch.tensor([0, 1, 20, 40, 1000])
    assert length_adaptive_trace_decay(lengths, 0.05).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, 0.98])
    batch = ragged(4)
    rewards, values = random_like(batch.outputs.old, 5), random_like(batch.outputs.old, 6)
    decays = length_adaptive_trace_decay(torch.tensor([len(one) for one in batch.trained]), 0.5)
    for decay in (decays, 1.0):  # VAPO: the policy's, then the critic's
        actual = generalised_advantages(
            rewards, values, batch.packed.cu_seqlens, batch.packed.loss_mask, discount=1.0, trace_decay=decay
        )
        expected = [
            references.gae([float(rewards[p]) for p in one], [float(values[p]) for p in one], 1.0, float(own))
            for one, own in zip(batch.trained, decays.tolist() if decay is decays else [1.0] * len(batch.trained), strict=True)
        ]
        assert_tokens(actual, expected, batch, 1e-6)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 17, 64, 65, 100, 128, 1000, 2049, 8192])
def test_chunks(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    terms = torch.randn(3, length, generator=generator, dtype=torch.float64)
    factor = torch.tensor([0.0, 0.93, 1.0], dtype=torch.float64)
    actual = discounted_suffix_sums(terms, factor)
    for row in range(3):
        following = 0.0
        for t in range(length - 1, -1, -1):
            following = float(terms[row, t]) + float(factor[row]) * following
            assert float(actual[row, t]) == pytest.approx(following, rel=1e-9, abs=1e-9)


def test_blocks_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ragged(7)
    rewards, values = random_like(batch.outputs.old, 8), random_like(batch.outputs.old, 9)
    decay = torch.linspace(0, 1, len(batch.trained), dtype=torch.float64)
    results = []
    for tokens in (1, 12, 1 << 20):
        monkeypatch.setattr(gae, "BLOCK_TOKENS", tokens)
        mask, boundaries = batch.packed.loss_mask, batch.packed.cu_seqlens
        results.append(generalised_advantages(rewards, values, boundaries, mask, discount=0.9, trace_decay=decay))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_nothing_to_train() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    actual = generalised_advantages(torch.ones(4), torch.ones(4), torch.tensor([0, 2, 4]), nothing, discount=1.0, trace_decay=1.0)
    assert actual.tolist() == [0.0] * 4
