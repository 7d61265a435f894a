"""Groups as JSON values: every field of them back bit for bit, and what is no such group refused in one line."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarl.engines.protocol import Generation
from megarl.errors import CheckpointError
from megarl.rollout.saved_groups import load_group, load_sample, refuse_damage, save_group, save_sample
from megarl.types import GREEDY_INDEX, NO_EXPERT, Episode, FinishReason, Prompt, Rollout, RolloutGroup, ScoredRollout, Turn

PROMPT = Prompt(prompt_id="train/7", token_ids=(3, 1, 4), text="3 + 1?", reference={"answer": (4,)}, task="train")
FLOAT32 = [0.0, -0.0, -1.401298464324817e-45, -3.4028234663852886e38, float("-inf"), -0.10000000149011612]
FLOAT64 = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3]


def float32(dice: random.Random) -> float:
    """Any finite or infinite number of float32, as Python has it."""
    (number,) = struct.unpack("<f", struct.pack("<f", -(10 ** dice.uniform(-40, 5))))
    return number


def rollout(dice: random.Random, index: int, *, episode: bool, experts: bool) -> Rollout:
    length = dice.choice([0, 1, 50])
    turns = (Turn(speaker="policy", text="é\n"), Turn(speaker="environment", text=""))
    return Rollout(
        prompt=PROMPT,
        sample_index=index,
        token_ids=tuple(dice.randrange(2**31) for _ in range(length)),
        from_policy=tuple(dice.random() < 0.5 for _ in range(length)),
        logprobs=tuple((FLOAT32 + [float32(dice) for _ in range(50)])[:length]),
        weight_versions=tuple(dice.randrange(-1, 10**6) for _ in range(length)),
        finish_reason=dice.choice([FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION]),
        text="\ud800 \x00 ü",  # half of a pair, as byte-level tokenizers can decode
        episode=Episode(turns=turns, reward=0.1, failure="x", is_out_of_turns=True, seconds=1 / 3) if episode else None,
        routed_experts=torch.randint(NO_EXPERT, 30_000, (length + 3, 2, 4), dtype=torch.int16) if experts else None,
    )


def group(dice: random.Random, *, episode: bool = False, experts: bool = False, greedy: bool = True) -> RolloutGroup:
    def scored(index: int) -> ScoredRollout:
        return ScoredRollout(
            rollout=rollout(dice, index, episode=episode, experts=experts),
            reward=dice.choice([*FLOAT64, dice.random()]),
            parts={"a": dice.choice(FLOAT64), "ü": dice.random()},
            step_rewards=((0, 1 / 3), (7, -0.0)),
            failures=("one", "two"),
        )

    return RolloutGroup(
        prompt=PROMPT, rollouts=tuple(scored(index) for index in range(3)), greedy=scored(GREEDY_INDEX) if greedy else None
    )


def through_json(saved: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(saved))


def assert_same_experts(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.dtype == theirs.dtype == torch.int16 and torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"greedy": False}, {"episode": True}, {"experts": True}])
def test_a_whole_group_comes_back_bit_for_bit(options: dict[str, bool], seed: int) -> None:
    saved = group(random.Random(seed), **options)
    loaded = load_group(through_json(save_group(saved)), {"train/7": PROMPT}.__getitem__)
    assert loaded == saved
    assert repr(loaded) == repr(saved)  # signs of zeros, seconds of episodes, tuples and not lists
    for ours, theirs in zip((*saved.rollouts, saved.greedy), (*loaded.rollouts, loaded.greedy), strict=True):
        if ours is not None and theirs is not None:
            assert_same_experts(ours.rollout.routed_experts, theirs.rollout.routed_experts)
            assert theirs.rollout.prompt is PROMPT


def test_a_part_of_a_response_comes_back_bit_for_bit() -> None:
    experts = torch.arange(24, dtype=torch.int16).view(2, 3, 4).transpose(1, 2)  # not contiguous
    for saved in (
        Generation(token_ids=(), logprobs=(), weight_versions=(), finish_reason=FinishReason.ABORT),
        Generation(
            token_ids=tuple(range(6)),
            logprobs=tuple(FLOAT32),
            weight_versions=(0, 0, 1, 1, 2, 2),
            finish_reason=FinishReason.ABORT,
            routed_experts=experts,
        ),
    ):
        loaded = load_sample(through_json(save_sample(saved)))
        assert (loaded, repr(loaded.logprobs)) == (saved, repr(saved.logprobs))
        assert_same_experts(loaded.routed_experts, saved.routed_experts)


def changed(saved: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    copy = through_json(saved)
    change(copy)
    return copy


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no key": lambda saved: saved["rollouts"][0].pop("reward"),
    "a list": lambda saved: saved["rollouts"].__setitem__(0, []),
    "a number": lambda saved: saved["rollouts"][1].update(token_ids=5),
    "another base": lambda saved: saved["rollouts"][1].update(token_ids="é"),
    "cut": lambda saved: saved["rollouts"][1].update(logprobs=saved["rollouts"][1]["logprobs"][:-8]),
    "other lengths": lambda saved: saved["rollouts"][1].update(
        token_ids=save_sample(
            Generation(token_ids=(1, 2), logprobs=(0.0,) * 2, weight_versions=(0,) * 2, finish_reason=FinishReason.STOP)
        )["token_ids"]
    ),
    "no reason": lambda saved: saved["rollouts"][2].update(finish_reason="tired"),
    "experts of another shape": lambda saved: saved["rollouts"][0]["routed_experts"].__setitem__(0, [1, 1, 1]),
    "an unknown prompt": lambda saved: saved.update(prompt_id="other/7"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_is_no_group_is_refused_in_one_line(damage: str) -> None:
    saved = changed(save_group(group(random.Random(3), experts=True)), DAMAGE[damage])
    with (
        pytest.raises(CheckpointError, match=r"groups \(outstanding.json\) cannot be read .*; resume from an older") as error,
        refuse_damage(),
    ):
        load_group(saved, {"train/7": PROMPT}.__getitem__)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_another_now_is_refused_by_name() -> None:
    other = Prompt(prompt_id="train/7", token_ids=(3, 1, 5), text="", reference={}, task="train")
    saved = through_json(save_group(group(random.Random(0))))
    with pytest.raises(CheckpointError, match=r"^prompt train/7 is not the one .*; resume with the data"), refuse_damage():
        load_group(saved, lambda prompt_id: other)
