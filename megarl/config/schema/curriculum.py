"""Progressive training: stages of growing context (QwenLong-L1, arXiv 2505.17667)."""

from typing import Any, Literal

from megarl.section import Section, key


class PromotionConfig(Section):
    """What ends a stage before its last step. Each rule that is given ends it."""

    min_steps: int = key(1, "steps", "The stage lasts at least so long.", ge=1)
    accuracy: float | None = key(
        None, "share", "It ends when an evaluation finds this accuracy on the held-out prompts of its own lengths.", gt=0, le=1
    )
    plateau_window: int | None = key(
        None,
        "steps",
        "It ends when the mean reward of its last so many steps is not plateau_gain above that of as many before them.",
        ge=1,
    )
    plateau_gain: float = key(0.01, "reward", "For plateau_window: a smaller gain is a plateau.")


class StageConfig(Section):
    """One stage: which prompts, for how long, and what is different from the rest of the file."""

    name: str = key(..., "-", "Name in the log.", min_length=1)
    steps: int = key(..., "steps", "The stage lasts at most so long; steps of the run is the sum over the stages.", ge=1)
    max_prompt_tokens: int = key(
        ...,
        "tokens",
        "The stage trains on the prompts that are longer than those of the stage before and not longer than this; where both "
        "stages have the same number, on the same prompts.",
        ge=1,
    )
    promotion: PromotionConfig | None = key(None, "-", "What ends the stage early; its steps alone when not given.")
    changes: dict[str, Any] = key(
        dict,
        "-",
        "Keys that the stage changes, in their sections: policy, critic, reference, reward_model, optimizer, algorithm, rollout "
        "and model.rope_scaling.",
    )


class CurriculumConfig(Section):
    """Stages, one after another. Models and optimizer states go from layout to layout, and the engine is started anew."""

    stages: list[StageConfig] = key(..., "-", "The stages, from short prompts to long ones.", min_length=1)
    retrospective_share: float = key(
        0.0,
        "share of a step's prompts",
        "So many prompts of a later stage are those of earlier stages, drawn in proportion to 1 / mean reward.",
        ge=0,
        lt=1,
    )
    retrospective_floor: float = key(
        0.1, "reward", "A prompt with a mean reward below this is drawn as often as one with this.", gt=0
    )
    too_long: Literal["leave_out", "cut_middle"] = key(
        "leave_out",
        "-",
        "Prompts that are longer than those of the last stage: list them in curriculum.json and leave them out, or cut tokens out "
        "of their middle.",
    )
