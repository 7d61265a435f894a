"""The kinds of run: each answers what others ask of it, and says which models there are, with what they have from the policy."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from megarl.config.models import critic_of, models_of, reference_of
from megarl.config.schema import Config, PreferenceRun, RewardModelRun, RLRun, SFTRun

ROWS = {"type": "jsonl", "path": "rows.jsonl"}
KINDS = {"rl": RLRun, "sft": SFTRun, "preference": PreferenceRun, "reward_model": RewardModelRun}


def config(kind: str, **sections: Any) -> Config:
    return Config.model_validate({"kind": kind, "steps": 4, "model": {"path": "start"}, "data": {"train": ROWS}} | sections)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_make_a_config_gives_its_kind(kind: str) -> None:
    made = config(kind)
    assert type(made) is KINDS[kind]
    for again in (
        Config.model_validate(made),
        Config.model_validate(made.model_dump(mode="json")),
        made.model_copy(update={"steps": 5}),
        pickle.loads(pickle.dumps(made)),
    ):
        assert type(again) is KINDS[kind]
    assert made.model_dump()["kind"] == kind


def test_every_section_is_read_in_every_kind() -> None:
    sections = {"sft": {"max_tokens": 9}, "preference": {"max_tokens": 8}, "rollout": {"max_new_tokens": 7}, "critic": {}}
    for kind in KINDS:
        made = config(kind, **sections)
        assert (made.sft.max_tokens, made.preference.max_tokens, made.rollout.max_new_tokens) == (9, 8, 7)
        assert made.critic is not None


SIZES = {
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 5, "max_prompt_tokens": 30, "max_new_tokens": 10},
    "sft": {"examples_per_step": 7, "max_tokens": 20},
    "preference": {"pairs_per_step": 2, "max_tokens": 50},
}


@pytest.mark.parametrize(
    ("kind", "tokens", "unit", "longest", "share"),
    [
        ("rl", 3 * 5 * 40, 40, 40, 0.25),
        ("sft", 7 * 20, 20, 20, 1.0),
        ("preference", 2 * 2 * 50, 100, 50, 1.0),
        ("reward_model", 2 * 2 * 51, 102, 50, 1.0),  # it reads one token behind each response
    ],
)
def test_step_sizes(kind: str, tokens: int, unit: int, longest: int, share: float) -> None:
    step = config(kind, **SIZES).step_size
    assert (step.tokens, step.unit_tokens, step.longest, step.trained_share) == (tokens, unit, longest, share)
    assert str(longest) in step.longest_words


@pytest.mark.parametrize(
    ("kind", "sections", "models"),
    [
        ("rl", {}, ["policy"]),
        ("rl", {"algorithm": {"advantage": "gae"}}, ["policy", "critic"]),
        (
            "rl",
            {"algorithm": {"kl": {"place": "loss"}}, "reward_model": {"path": "judge"}},
            ["policy", "reference", "reward_model"],
        ),
        ("sft", {"algorithm": {"advantage": "gae"}, "reward_model": {"path": "judge"}}, ["policy"]),
        ("preference", {}, ["policy", "reference"]),
        ("preference", {"preference": {"loss": "orpo"}}, ["policy"]),
        ("reward_model", {}, ["policy"]),
    ],
)
def test_models_of_each_kind(kind: str, sections: dict[str, Any], models: list[str]) -> None:
    assert list(models_of(config(kind, **sections))) == models


def test_what_is_not_given_is_the_policys() -> None:
    policy = {"parallel": {"tp": 2}, "first_rank": 1, "num_ranks": 4}
    optimizer = {"learning_rate": 0.5}
    run = config("rl", algorithm={"advantage": "gae"}, policy=policy, optimizer=optimizer)
    for model in (reference_of(run), critic_of(run)):
        assert (model.role.parallel.tp, model.role.ranks(8), model.path) == (2, range(1, 5), Path("start"))
        assert model.path_key == "model.path" and not model.is_random
    assert critic_of(run).optimizer == run.optimizer and reference_of(run).optimizer is None


def test_what_is_given_is_its_own() -> None:
    critic = {"path": "own", "parallel": {"pp": 2}, "optimizer": {"learning_rate": 0.25}}
    run = config("rl", model={"path": "start", "init": "random"}, critic=critic, reference={})
    model = critic_of(run)
    assert (model.path, model.path_key, model.role.parallel.pp, model.is_random) == (Path("own"), "critic.path", 2, False)
    assert model.optimizer is not None and model.optimizer.learning_rate == 0.25
    assert reference_of(run).is_random and reference_of(run).role.parallel.tp == 1
