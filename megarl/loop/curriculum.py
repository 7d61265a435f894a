"""Training in stages: each is a run of its own on models that come from the stage before, in its own layouts."""

import json
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.config.stages import Stage, planned_updates, stages_of
from megarl.data.curriculum import StagedPrompts
from megarl.data.tokenizer import run_tokenizer
from megarl.errors import CheckpointError, writes
from megarl.loop.main_rank import on_main_rank
from megarl.loop.models import build_models
from megarl.loop.promotion import StageProgress
from megarl.loop.prompts import Prompts, prompts_of_stage
from megarl.loop.rl import open_rl_run, train
from megarl.loop.start_checks import check_references, row_sizes
from megarl.models.scaled_folder import with_scaled_model
from megarl.train.learner import Learner
from megarl.weights.checkpoint import whole_checkpoints
from megarl.weights.manifest import read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """What all stages have in common; ``prompts`` on rank 0."""

    config: Config
    stages: list[Stage]
    prompts: StagedPrompts | None


def run_curriculum(config: Config, resume: bool) -> None:
    """Train by RL in the stages of ``config.curriculum``; every rank of the world runs this."""
    # the launcher has made the models' folders
    stages = [replace(one, config=with_scaled_model(one.config, config.run_dir, writes=False)) for one in stages_of(config)]
    prompts = on_main_rank(lambda: _measure_prompts(config, stages))
    curriculum = Curriculum(config=config, stages=stages, prompts=prompts)
    progress = _last_position(config, stages) if resume else StageProgress(stages[0], start_step=0)
    learners: dict[str, Learner] = {}
    while True:
        step, learners = _run_stage(curriculum, progress, learners, resume=resume)
        if progress.stage is stages[-1]:
            return
        progress = StageProgress(stages[progress.stage.number + 1], start_step=step)


def _run_stage(
    curriculum: Curriculum, progress: StageProgress, learners: dict[str, Learner], *, resume: bool
) -> tuple[int, dict[str, Learner]]:
    """Train until the stage is over.

    Args:
        learners: of the stage before, by role; they are moved and forgotten one after the other.

    Returns:
        Steps of the run that are done, and the stage's learners.
    """
    stage = progress.stage
    is_carried = bool(learners)
    models = build_models(stage.config, learners, planned_updates(curriculum.config, curriculum.stages))

    def read(tokenizer: PreTrainedTokenizerBase) -> Prompts:
        assert curriculum.prompts is not None
        return prompts_of_stage(curriculum.prompts, curriculum.stages, stage)

    with open_rl_run(stage.config, models, read, resume=resume, stage=progress, is_carried=is_carried) as parts:
        train(parts, models, stage.config.observe)
        parts.reporter.message(f"stage {stage.name} is over at step {parts.run.step}: {progress.ended_by}")
        if stage is curriculum.stages[-1]:
            parts.checkpoints.export(parts.reporter.message)
        return parts.run.step, models.learners()


def _measure_prompts(config: Config, stages: list[Stage]) -> StagedPrompts:
    """Read, measure and report them."""
    tokenizer = run_tokenizer(config)
    prompts = StagedPrompts(config, stages, tokenizer, row_sizes(config, tokenizer))
    check_references(config, prompts.rows())
    path = config.run_dir / "curriculum.json"
    with writes(path):
        path.write_text(json.dumps(prompts.report(), indent=2) + "\n")
    for line in prompts.lines():
        print(line, flush=True)
    return prompts


def _last_position(config: Config, stages: list[Stage]) -> StageProgress:
    """Find where the newest checkpoint is; behind the end of a stage that is the beginning of the next."""
    checkpoint = whole_checkpoints(config.run_dir / "checkpoints")[-1]
    saved = read_manifest(checkpoint).state.stage
    if not saved:
        raise CheckpointError(f"{checkpoint} is of a run without curriculum; remove curriculum to go on with that run")
    progress = StageProgress.restore(stages, saved)
    if progress.is_over and progress.stage is not stages[-1]:
        return StageProgress(stages[progress.stage.number + 1], start_step=progress.start_step + progress.num_steps)
    return progress
