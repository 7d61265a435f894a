"""What a run asks: training prompts and held-out ones, of the run or of a stage of its curriculum."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.config.stages import Stage, stages_of
from megarl.data.curriculum import LengthLimit, StagedPrompts
from megarl.data.sampler import PromptSource, build_evaluation_prompts, build_prompt_source
from megarl.loop.start_checks import check_references, row_sizes
from megarl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is asked.

    Attributes:
        training: None for supervised runs.
        held_out: in the order of their evaluation.
        stages: those of the curriculum up to now, each of which is also evaluated by itself.
    """

    training: PromptSource | None
    held_out: list[Prompt]
    stages: Sequence[Stage] = ()


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read the prompts of a run without stages; raises DataError as ``build_prompt_source`` and ``check_references``."""
    training = build_prompt_source(config, tokenizer, row_sizes(config, tokenizer)) if config.learns_from_samples else None
    held_out = build_evaluation_prompts(config, tokenizer)
    check_references(config, training.rows() if training else ())
    return Prompts(training=training, held_out=held_out)


def prompts_of_stage(prompts: StagedPrompts, stages: Sequence[Stage], stage: Stage) -> Prompts:
    """Return what a stage asks and is evaluated on."""
    return Prompts(training=prompts.source(stage), held_out=prompts.evaluation_prompts(stage), stages=stages[: stage.number + 1])


def read_held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read the held-out prompts alone, with a curriculum those of all its stages."""
    check_references(config, ())
    if config.curriculum is None:
        return Prompts(training=None, held_out=build_evaluation_prompts(config, tokenizer))
    stages = stages_of(config)
    return Prompts(training=None, held_out=LengthLimit(config, stages, tokenizer).held_out_prompts(config), stages=stages)


def accuracy_name(stage: Stage) -> str:
    """Name the metric of the held-out prompts of a stage's lengths."""
    return f"accuracy@{stage.name}"
