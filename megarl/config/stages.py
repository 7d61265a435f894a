"""The stages of a run: each is the run's config with its own keys in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megarl.config.load import describe
from megarl.config.schema import Config, PromotionConfig, StageConfig
from megarl.config.yaml_text import merged
from megarl.errors import ConfigError

CHANGEABLE = ("policy", "critic", "reference", "reward_model", "optimizer", "algorithm", "rollout", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run with a curriculum.

    Attributes:
        number: from 0.
        name: in the log.
        config: everything as it is in this stage; it has no curriculum.
        steps: it lasts at most so long.
        above: its prompts are longer than so many tokens ...
        max_prompt_tokens: ... and not longer than so many.
        promotion: what ends it early.
    """

    number: int
    name: str
    config: Config
    steps: int
    above: int
    max_prompt_tokens: int
    promotion: PromotionConfig | None

    @property
    def path(self) -> str:
        """Where it stands in the config."""
        return f"curriculum.stages.{self.number}"


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run with a curriculum.

    Raises:
        ConfigError: a stage changes what it may not, or to something impossible; one line for each mistake.
    """
    assert config.curriculum is not None
    stages: list[Stage] = []
    failures: list[str] = []
    above, longest = 0, 0
    for number, stage in enumerate(config.curriculum.stages):
        if stage.max_prompt_tokens != longest:
            above, longest = longest, stage.max_prompt_tokens
        try:
            changed = _stage_config(config, stage, f"curriculum.stages.{number}.changes")
        except ConfigError as error:
            failures.append(str(error))
            continue
        stages.append(
            Stage(
                number=number,
                name=stage.name,
                config=changed,
                steps=stage.steps,
                above=above,
                max_prompt_tokens=longest,
                promotion=stage.promotion,
            )
        )
    if failures:
        raise ConfigError(*failures)
    return stages


def configs_of(config: Config) -> list[Config]:
    """Return the config of every stage; of a run without curriculum its own."""
    return [config] if config.curriculum is None else [stage.config for stage in stages_of(config)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedUpdates:
    """Optimizer steps of a whole run, where no stage ends early: the lengths of the learning-rate schedules."""

    policy: int
    critic: int


def planned_updates(config: Config, stages: Sequence[Stage] = ()) -> PlannedUpdates:
    """Count the updates of an RL run, or of all stages of one with a curriculum."""
    parts = [(stage.config, stage.steps) for stage in stages] or [(config, config.steps)]
    policy = critic = start = 0
    for part, steps in parts:
        warmup = part.critic.warmup_steps if part.critic else 0  # steps of the run in which the critic alone learns
        updates = part.algorithm.updates_per_step
        policy += updates * (steps - min(max(warmup - start, 0), steps))
        critic += updates * steps
        start += steps
    return PlannedUpdates(policy=policy, critic=critic)


def _stage_config(config: Config, stage: StageConfig, path: str) -> Config:
    _check_sections(stage.changes, path)
    changes = dict(stage.changes)
    changes["rollout"] = {**changes.get("rollout", {}), "max_prompt_tokens": stage.max_prompt_tokens}
    base = config.model_dump()
    base["curriculum"] = None
    if "rope_scaling" in changes.get("model", {}):
        base["model"]["rope_scaling"] = None  # one scaling has no names of another's
    if "preset" in changes.get("algorithm", {}):
        base["algorithm"] = {}  # another method's keys would go before the preset's
    try:
        return Config.model_validate(merged(base, changes))
    except ValidationError as error:
        raise ConfigError(*(describe(detail, path) for detail in error.errors(include_url=False))) from None


def _check_sections(changes: Mapping[str, Any], path: str) -> None:
    for name, section in changes.items():
        if name not in CHANGEABLE:
            raise ConfigError(f"{path}.{name}: cannot change between stages; a stage changes {', '.join(CHANGEABLE)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{path}.{name}: is {section!r}; give a section with keys")
    if "max_prompt_tokens" in changes.get("rollout", {}):
        raise ConfigError(f"{path}.rollout.max_prompt_tokens: is the stage's own max_prompt_tokens; remove it here")
    others = sorted(changes.get("model", {}).keys() - {"rope_scaling"})
    if others:
        raise ConfigError(f"{path}.model.{others[0]}: cannot change between stages; of model a stage changes rope_scaling")
