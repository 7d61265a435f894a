"""Checks of the tasks of a mixture, and of how their rows are sampled; lines start with the key."""

import math
from collections.abc import Iterator

from megarl.config.schema import Config, MixtureSource, ReasoningGymSource
from megarl.config.tasks import EVALUATION, TRAIN, tasks_of


def check_tasks(config: Config) -> Iterator[str]:
    """Tasks can be told apart, and a task of training and evaluation has one set of scorers."""
    train = tasks_of(config.data.train, TRAIN)
    held_out = [] if config.evaluation.data is None else tasks_of(config.evaluation.data, EVALUATION)
    for path, tasks in (("data.train", train), ("evaluation.data", held_out)):
        seen: dict[str, int] = {}
        for index, task in enumerate(tasks):
            if task.name in seen:
                yield (
                    f"{path}.tasks.{index}.name: {task.name!r} is also the name of task {seen[task.name]}; give each a name of "
                    "its own"
                )
            seen.setdefault(task.name, index)
    own = {task.name: task.scorers for task in train}
    for index, task in enumerate(held_out):
        if task.scorers and own.get(task.name) and task.scorers != own[task.name]:
            yield (
                f"evaluation.data.tasks.{index}.scorers: differ from those of data.train's task {task.name!r}; leave them out "
                "to use those, or give the task another name"
            )


def check_too_long(config: Config) -> Iterator[str]:
    """What becomes of long rows can be done to them."""
    policy = config.data.too_long
    if policy == "cut_middle" and not config.learns_from_samples:
        yield f"data.too_long: cut_middle cuts prompts of kind rl, and kind is {config.kind}; set it to leave_out or refuse"
    if policy != "refuse" and config.curriculum is not None:
        yield f"data.too_long: is {policy} and a curriculum leaves out or cuts by curriculum.too_long; remove data.too_long"


def check_order(config: Config) -> Iterator[str]:
    """The order of rows has what it needs, and no settings without effect."""
    sampling = config.data.sampling
    if sampling.order == "curriculum" and sampling.difficulty_field is None:
        yield (
            "data.sampling.order: curriculum needs to know how hard each row is; set data.sampling.difficulty_field to a field "
            "of the rows, or choose another order"
        )
    if sampling.order in ("shuffle", "sequential") and sampling.difficulty_field is not None:
        yield (
            f"data.sampling.difficulty_field: is {sampling.difficulty_field!r} and order {sampling.order} does not look at it; "
            "remove it, or set data.sampling.order: curriculum"
        )
    if sampling.order != "prioritised":
        return
    if not config.learns_from_samples:
        yield (
            f"data.sampling.order: prioritised draws rows by how often the policy solves them, and kind {config.kind} samples no "
            "responses; choose another"
        )
    elif config.reward_model is not None:
        yield (
            "data.sampling.order: prioritised with a reward_model, and success is counted by what the scorers say alone, before it "
            "scores; choose another order, or remove reward_model"
        )


def check_mixture(config: Config) -> Iterator[str]:
    """A step can hold equally many prompts of each task, and no prompt twice."""
    rollout, tasks = config.rollout, tasks_of(config.data.train, TRAIN)
    balanced = config.data.sampling.mixture == "balanced"
    if balanced and len(tasks) < 2:
        yield (
            "data.sampling.mixture: balanced needs several tasks, and data.train has one; give it type: mixture, or remove the key"
        )
        return
    if not config.learns_from_samples:
        return
    if balanced and rollout.prompts_per_step % len(tasks):
        yield (
            f"rollout.prompts_per_step: {rollout.prompts_per_step} prompts are not divisible by the {len(tasks)} tasks of "
            f"data.train, and data.sampling.mixture is balanced; make it a multiple of {len(tasks)}"
        )
    total = sum(task.weight for task in tasks)
    for index, task in enumerate(tasks):
        share = 1 / len(tasks) if balanced else task.weight / total
        num_prompts = math.ceil(rollout.prompts_per_step * share)
        if isinstance(task.source, ReasoningGymSource) and task.source.size < num_prompts:
            path = f"data.train.tasks.{index}.source" if isinstance(config.data.train, MixtureSource) else "data.train"
            whole = num_prompts == rollout.prompts_per_step
            of = "" if whole else f", of which {num_prompts} are of this task"
            yield (
                f"{path}.size: {task.source.size} prompts are fewer than rollout.prompts_per_step "
                f"{rollout.prompts_per_step}{of}, so one step would hold a prompt twice; raise size"
            )


def check_surplus(config: Config) -> Iterator[str]:
    """Over-sampling has an effect, and a surplus that a step uses."""
    algorithm = config.algorithm
    if config.learns_from_samples and algorithm.over_sampling > 1 and not algorithm.dynamic_sampling:
        yield (
            f"algorithm.over_sampling: is {algorithm.over_sampling:g} and only dynamic sampling drops groups that it would "
            "replace; set algorithm.dynamic_sampling: true, or over_sampling to 1"
        )


def check_repetition_stop(config: Config) -> Iterator[str]:
    """The pattern's sizes make sense, and the engine can look for it."""
    repetition, engine = config.rollout.repetition_stop, config.rollout.engine
    if repetition is None:
        return
    if repetition.min_pattern_size > repetition.max_pattern_size:
        yield (
            f"rollout.repetition_stop.min_pattern_size: {repetition.min_pattern_size} is above max_pattern_size "
            f"{repetition.max_pattern_size}; lower it"
        )
    shortest = repetition.min_pattern_size * repetition.min_count
    if shortest >= config.rollout.max_new_tokens:
        yield (
            f"rollout.repetition_stop.min_count: {repetition.min_count} patterns of {repetition.min_pattern_size} tokens or "
            f"more never fit into fewer than rollout.max_new_tokens {config.rollout.max_new_tokens}; lower it"
        )
    if engine == "sglang":
        yield "rollout.repetition_stop: SGLang cannot end responses that repeat themselves; use vllm or embedded, or remove it"
