"""Rollout metrics against numbers worked by hand, and pass@k against drawing every subset."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from megarl.observe.rollout_metrics import accuracy_metrics, pass_at_k, pass_rates, repetition, rollout_metrics
from megarl.types import Episode, FinishReason, Turn
from observe.rollouts import group


def test_numbers_worked_by_hand() -> None:
    long = list(range(10, 22))  # 12 tokens, nothing repeated
    loop = [4] * 12  # 9 4-grams, one distinct
    groups = [
        group(
            "a",
            [1.0, 0.0],
            responses=[[1, 2], long],
            reasons=[FinishReason.STOP, FinishReason.LENGTH],
            failures=[(), ("exact: timeout", "math: error")],
        ),
        group("b", [1.0, 1.0], responses=[[1, 2, 3, 4, 5, 6], loop], failures=[("exact: timeout",), ()]),
    ]
    metrics = rollout_metrics(groups)
    # rewards 1 0 1 1, lengths 2 12 6 12: means 0.75 and 8; covariance (-1.5 - 3 - 0.5 + 1) / 4, variances 0.75 / 4 and 72 / 4.
    expected = {
        "reward_mean": 0.75,
        "reward_min": 0.0,
        "reward_max": 1.0,
        "reward_std": math.sqrt(0.1875),
        "zero_variance_share": 0.5,
        "response_length_mean": 8.0,
        "response_length_max": 12.0,
        "truncated_share": 0.25,
        "repetition_stopped_share": 0.0,
        "reward_length_correlation": -4.0 / math.sqrt(0.75 * 72),
        "repetition_share": 0.25,
        "scorer_failures": 3.0,
        "score_exact": 0.75,
    }
    assert metrics == pytest.approx(expected)


def test_responses_ended_for_repetition_are_not_truncated_ones() -> None:
    reasons = [FinishReason.REPETITION, FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION]
    metrics = rollout_metrics([group("a", [1.0, 0.0, 0.0, 0.0], reasons=reasons)])
    assert (metrics["repetition_stopped_share"], metrics["truncated_share"]) == (0.5, 0.25)


def test_tasks_are_told_apart_where_there_are_several() -> None:
    sums, words = group("sums/0", [1.0, 0.0, 0.0, 0.0], task="sums"), group("words/0", [1.0, 1.0, 1.0, 0.0], task="words")
    more = group("words/1", [0.0, 0.0, 0.0, 0.0], task="words")
    metrics = rollout_metrics([words, sums, more])
    assert (metrics["reward_mean/sums"], metrics["reward_mean/words"], metrics["reward_mean"]) == (0.25, 3 / 8, 4 / 12)
    assert (metrics["prompts/sums"], metrics["prompts/words"]) == (1.0, 2.0)
    assert not any("/" in name for name in rollout_metrics([words, more]))
    assert accuracy_metrics([words, sums, more], 1.0, 4) == pytest.approx(
        # one, three and none of four right: a pair holds a right one in 3 of 6 cases, always and never
        {"accuracy": 4 / 12, "pass@2": 1.5 / 3, "pass@4": 2 / 3}
        | {"accuracy/sums": 0.25, "pass@2/sums": 0.5, "pass@4/sums": 1.0}
        | {"accuracy/words": 3 / 8, "pass@2/words": 0.5, "pass@4/words": 0.5}
    )
    assert accuracy_metrics([sums], 1.0, 1) == {"accuracy": 0.25}


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_rates_for_powers_of_two_and_all_samples(samples: int, ks: list[int]) -> None:
    rewards = [[float((seed * 7 + i) % 3 == 0) for i in range(samples)] for seed in range(5)]
    rates = pass_rates([group(str(seed), own) for seed, own in enumerate(rewards)], 1.0, samples)
    assert list(rates) == [f"pass@{k}" for k in ks]
    for k in ks:
        subsets = [[any(draw) for draw in itertools.combinations(own, k)] for own in rewards]
        assert rates[f"pass@{k}"] == pytest.approx(sum(sum(one) / len(one) for one in subsets) / len(subsets))


def test_episodes_worked_by_hand() -> None:
    """Three of five, and two of two tokens are the policy's; one turn of two, and one."""
    policy, environment = Turn(speaker="policy", text="x"), Turn(speaker="environment", text="y")
    episode = Episode(turns=(policy, environment, policy), reward=1.0, failure=None, is_out_of_turns=True, seconds=0.5)
    short = replace(episode, turns=(policy, environment), is_out_of_turns=False, seconds=1.0)
    plain = group("a", [1.0, 0.0], responses=[[1, 2, 8, 8, 3], [1, 2]])
    masks = ((True, True, False, False, True), (True, True))
    rollouts = tuple(
        replace(one, rollout=replace(one.rollout, from_policy=mask, episode=played))
        for one, mask, played in zip(plain.rollouts, masks, (episode, short), strict=True)
    )
    metrics = rollout_metrics([replace(plain, rollouts=rollouts)])
    expected = {
        "turns_mean": 1.5,
        "turns_max": 2.0,
        "out_of_turns_share": 0.5,
        "environment_token_share": 2 / 7,
        "environment_seconds": 0.75,
        "response_length_mean": 2.5,
        "response_length_max": 3.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert not expected.keys() - {"response_length_mean", "response_length_max"} & rollout_metrics([plain]).keys()


def test_what_an_environment_repeats_is_no_repetition_of_the_policy() -> None:
    plain = group("a", [1.0], responses=[[1, *[7] * 20, 2, 3, 4]])
    (one,) = plain.rollouts
    mask = (True,) + (False,) * 20 + (True,) * 3
    masked = replace(plain, rollouts=(replace(one, rollout=replace(one.rollout, from_policy=mask)),))
    assert rollout_metrics([plain])["repetition_share"] == 1.0
    assert rollout_metrics([masked])["repetition_share"] == 0.0


def test_greedy_responses_count_as_baselines_only() -> None:
    samples = [group("a", [1.0, 0.0]), group("b", [1.0, 1.0]), group("c", [0.5])]
    (better, equal, worse) = (
        group("greedy", [reward], responses=[list(range(20))], failures=[failures]).rollouts[0]
        for reward, failures in ((2.0, ("exact: timeout",)), (1.0, ()), (0.0, ()))
    )
    groups = [replace(one, greedy=greedy) for one, greedy in zip(samples, (better, equal, worse), strict=True)]
    plain, metrics = rollout_metrics(samples), rollout_metrics(groups)
    assert plain["zero_variance_share"] == pytest.approx(2 / 3) and "greedy_reward_mean" not in plain
    changes = {"greedy_reward_mean": 1.0, "zero_variance_share": 1 / 3, "scorer_failures": 1.0}
    assert metrics == pytest.approx(plain | changes, nan_ok=True)


def test_correlation_is_undefined_for_constants() -> None:
    assert math.isnan(rollout_metrics([group("a", [1.0, 1.0], responses=[[1], [2, 3]])])["reward_length_correlation"])
    assert math.isnan(rollout_metrics([group("a", [1.0, 0.0])])["reward_length_correlation"])


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1] * 5, 0.5),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # 5 4-grams, the last is the first again
        ([2**31 - 1] * 8, 0.8),
    ],
)
def test_repetition(token_ids: list[int], expected: float) -> None:
    assert repetition(token_ids) == pytest.approx(expected)


def test_repetition_counts_every_4_gram() -> None:
    generator = random.Random(0)
    for _ in range(50):
        token_ids = [generator.choice([0, 1, 150_000]) for _ in range(generator.randrange(4, 60))]
        grams = [tuple(token_ids[start : start + 4]) for start in range(len(token_ids) - 3)]
        assert repetition(token_ids) == pytest.approx(1 - len(set(grams)) / len(grams))


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    groups = [group("a", [0, 0, 0, 1, 0]), group("b", [1, 1, 0.5, 0, 0]), group("c", [0] * 5), group("d", [1, 2, 3, 4, 5])]
    for k in range(1, 6):
        draws = [any(item.reward >= 1.0 for item in subset) for one in groups for subset in itertools.combinations(one.rollouts, k)]
        assert pass_at_k(groups, k, 1.0) == pytest.approx(sum(draws) / len(draws))
    assert pass_at_k(groups, 1, 0.5) == pytest.approx((0.2 + 0.6 + 0 + 1) / 4)
    assert math.isnan(pass_at_k([], 1, 1.0))
