"""Checks of a curriculum; lines start with the key."""

from collections.abc import Iterator

from megarl.config.schema import Config, StageConfig
from megarl.config.stages import stages_of
from megarl.errors import ConfigError


def check_curriculum(config: Config) -> Iterator[str]:
    """Check that the stages follow each other, and each can end."""
    curriculum = config.curriculum
    if curriculum is None:
        return
    if not config.learns_from_samples:
        yield f"curriculum: is given and kind {config.kind} has no stages; remove it, and train in stages with kind: rl"
        return
    stages = curriculum.stages
    total = sum(stage.steps for stage in stages)
    if config.steps != total:
        terms = " + ".join(str(stage.steps) for stage in stages)
        yield f"steps: {config.steps} is not the sum of the stages' steps, {terms} = {total}; make them equal"
    names: dict[str, int] = {}
    for number, stage in enumerate(stages):
        if stage.name in names:
            yield (
                f"curriculum.stages.{number}.name: {stage.name!r} is also the name of stage {names[stage.name]}; give each a name "
                "of its own"
            )
        names.setdefault(stage.name, number)
        longest = stages[number - 1].max_prompt_tokens if number else 0
        if stage.max_prompt_tokens < longest:
            yield (
                f"curriculum.stages.{number}.max_prompt_tokens: {stage.max_prompt_tokens} is below the {longest} of stage "
                f"{number - 1}, so their prompts would overlap; order the stages from short prompts to long ones"
            )
        yield from _check_promotion(config, stage, f"curriculum.stages.{number}")
    if curriculum.retrospective_share and stages[0].max_prompt_tokens == stages[-1].max_prompt_tokens:
        yield (
            f"curriculum.retrospective_share: is {curriculum.retrospective_share:g} and all stages have the same prompts; set it "
            "to 0, or let later stages have longer prompts"
        )
    try:
        yield from _check_what_stays(config)
    except ConfigError as error:
        yield str(error)


def _check_promotion(config: Config, stage: StageConfig, path: str) -> Iterator[str]:
    promotion = stage.promotion
    if promotion is None:
        return
    path = f"{path}.promotion"
    if promotion.accuracy is None and promotion.plateau_window is None:
        yield f"{path}: has no rule; give accuracy or plateau_window, or remove it"
    if promotion.min_steps > stage.steps:
        yield f"{path}.min_steps: {promotion.min_steps} exceeds the stage's {stage.steps} steps; lower it"
    if promotion.accuracy is not None and (config.evaluation.data is None or not config.evaluation.every):
        yield f"{path}.accuracy: needs evaluations during the stage; set evaluation.data and evaluation.every"
    if promotion.plateau_window is not None and 2 * promotion.plateau_window > stage.steps:
        yield (
            f"{path}.plateau_window: twice {promotion.plateau_window} steps never fit into the stage's {stage.steps} steps; "
            "lower it"
        )


def _check_what_stays(config: Config) -> Iterator[str]:
    """Check what later stages must have in common with the first, because something of theirs goes on."""
    first, *others = stages_of(config)
    for stage in others:
        if stage.config.has_critic != first.config.has_critic:
            reason = "a critic learns in all stages or in none"
            yield f"{stage.path}.changes.algorithm.advantage: differs from stage 0's, and {reason}; leave it out"
        for key, reason in (
            ("rollout.asynchronous", "responses under way go on in the next stage"),
            ("rollout.partial", "responses under way go on in the next stage"),
            ("rollout.environment", "responses under way go on in the next stage"),
        ):
            section, name = key.split(".")
            before, now = (getattr(getattr(one.config, section), name) for one in (first, stage))
            if before != now:
                yield f"{stage.path}.changes.{key}: differs from stage 0's, and {reason}; leave it out"
        for role in ("policy", "critic"):
            kinds = {(getattr(one.config, role) or one.config.policy).parallel.distributed_optimizer for one in (first, stage)}
            if len(kinds) == 2 and getattr(stage.config, role) is not None:
                yield (
                    f"{stage.path}.changes.{role}.parallel.distributed_optimizer: differs from stage 0's, and megatron-core "
                    "reads no checkpoint of one kind into the other, so a run could not be resumed here; leave it out"
                )
        groups = stage.config.rollout.samples_per_prompt
        if first.config.rollout.outlives_updates and groups != first.config.rollout.samples_per_prompt:
            yield (
                f"{stage.path}.changes.rollout.samples_per_prompt: {groups} differs from stage 0's "
                f"{first.config.rollout.samples_per_prompt}, and responses under way go on in the next stage; leave it out"
            )
