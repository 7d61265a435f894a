"""Checks of rows, their tasks and order, their rewards, and evaluation on them; lines start with the key."""

import math
from collections.abc import Iterator, Sequence
from datetime import date

from megarl.builtin.scorers import BaseScorer, DocumentQAScorer, ReasoningGymScorer
from megarl.config.schema import Config, JsonlSource, MixtureSource, ReasoningGymSource, RowSource
from megarl.config.tasks import EVALUATION, TRAIN, placed_scorers, placed_tasks, scorers_of, tasks_of


def check_data(config: Config) -> Iterator[str]:
    """Make all checks of this file."""
    for data_check in (
        check_sources,
        check_chat_template,
        check_tasks,
        check_order,
        check_too_long,
        check_mixture,
        check_surplus,
        check_evaluation,
        check_rewards,
        check_judges,
    ):
        yield from data_check(config)


def check_sources(config: Config) -> Iterator[str]:
    """Check that sources exist and the template has a place for the prompt."""
    template = config.data.template
    if template != "chat" and "{prompt}" not in template:
        yield f"data.template: {template!r} has no {{prompt}} in it; add it, or write chat for the tokenizer's chat template"
    for path, source in _sources(config):
        if isinstance(source, JsonlSource) and source.path.is_dir():
            yield f"{path}.path: {source.path} is a folder; name a file in it, or set {path}.type: datasets for a dataset's folder"
        elif isinstance(source, JsonlSource) and not source.path.is_file():
            yield f"{path}.path: {source.path} does not exist; give a file of rows (relative to the current directory)"


def _sources(config: Config) -> Iterator[tuple[str, RowSource]]:
    """Yield every source of rows with its dotted path."""
    for path, task in placed_tasks(config):
        yield path, task.source
    for index, source in enumerate(config.data.exclude):
        yield f"data.exclude.{index}", source


def check_chat_template(config: Config) -> Iterator[str]:
    """Check that the chat template's settings can be used."""
    data = config.data
    try:
        date.fromisoformat(data.chat_template_date)
    except ValueError:
        yield f"data.chat_template_date: {data.chat_template_date!r} is no date; give for example 2024-07-26"
    if data.chat_template is not None and not data.chat_template.is_file():
        yield f"data.chat_template: {data.chat_template} does not exist; give a Jinja file (relative to the current directory)"
    environment = config.rollout.environment
    if data.template == "chat" or (environment is not None and environment.observation_template is None):
        return
    for name in ("chat_template", "chat_template_options"):
        if getattr(data, name):
            yield f"data.{name}: has no use with the text in data.template; set data.template to chat, or remove it"


def check_tasks(config: Config) -> Iterator[str]:
    """Check that tasks can be told apart, and a task of training and evaluation has one set of scorers."""
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
    """Check that what becomes of long rows can be done to them."""
    policy = config.data.too_long
    if policy == "cut_middle" and not config.learns_from_samples:
        yield f"data.too_long: cut_middle cuts prompts of kind rl, and kind is {config.kind}; set it to leave_out or refuse"
    if policy != "refuse" and config.curriculum is not None:
        yield f"data.too_long: is {policy} and a curriculum leaves out or cuts by curriculum.too_long; remove data.too_long"


def check_order(config: Config) -> Iterator[str]:
    """Check that the order of rows has what it needs, and no settings without effect."""
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
    """Check that a step can hold equally many prompts of each task, and no prompt twice."""
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
    """Check that over-sampling has an effect, and a surplus that a step uses."""
    algorithm = config.algorithm
    if config.learns_from_samples and algorithm.over_sampling > 1 and not algorithm.dynamic_sampling:
        yield (
            f"algorithm.over_sampling: is {algorithm.over_sampling:g} and only dynamic sampling drops groups that it would "
            "replace; set algorithm.dynamic_sampling: true, or over_sampling to 1"
        )


def check_evaluation(config: Config) -> Iterator[str]:
    """Check that evaluation has data, and more samples only where they can differ."""
    evaluation = config.evaluation
    if evaluation.data is None and evaluation.every > 0:
        yield f"evaluation.every: is {evaluation.every} but there is no evaluation.data; give held-out prompts or set every to 0"
    if evaluation.data is not None and evaluation.samples_per_prompt > 1 and evaluation.temperature == 0:
        yield (
            f"evaluation.samples_per_prompt: {evaluation.samples_per_prompt} greedy responses (temperature 0) are all the same; "
            "use 1, or a temperature above 0"
        )


def check_rewards(config: Config) -> Iterator[str]:
    """Check that there is a scorer where responses are scored, and the log can tell scorers apart."""
    for path, scorers in placed_scorers(config):
        yield from _check_scorers(path, scorers)
    scored = [
        (path, task)
        for path, task in placed_tasks(config)
        if config.samples_responses and (config.learns_from_samples or path.startswith("evaluation"))
    ]
    for path, task in scored:
        scorers = scorers_of(config, task)
        is_training = path.startswith("data.train")
        has_others = config.rollout.environment is not None or (is_training and config.reward_model is not None)
        if not scorers and not has_others:
            user = "kind: rl" if is_training else "evaluation.data"
            yield f"rewards.scorers: is empty and {user} needs at least one; add for example - type: math"
            break
        if any(isinstance(scorer, ReasoningGymScorer) for scorer in scorers) and not isinstance(task.source, ReasoningGymSource):
            key = f"{path.removesuffix('source')}scorers" if task.scorers else "rewards.scorers"
            yield f"{key}: reasoning_gym scores only its own tasks, and {path} has type {task.source.type}; use another scorer"


def _check_scorers(path: str, scorers: Sequence[BaseScorer]) -> Iterator[str]:
    """Check that each scorer of one list is whole, and has a name of its own."""
    seen: dict[str, int] = {}
    for index, scorer in enumerate(scorers):
        name = scorer.log_name
        if name in seen:
            yield f"{path}.{index}.name: {name!r} is also the name of scorer {seen[name]}; give one of them another name"
        seen.setdefault(name, index)
        yield from (f"{path}.{index}.{line}" for line in scorer.mistakes())


def check_judges(config: Config) -> Iterator[str]:
    """Check that a judge's requests fit into the time of a prompt, and a scorer's parts have log names of their own."""
    limit = config.rollout.time_limit(0)
    for path, scorers in placed_scorers(config):
        names = [scorer.log_name for scorer in scorers]
        for index, scorer in enumerate(scorers):
            for part in scorer.log_names()[1:]:
                if part in names:
                    yield f"{path}.{index}.name: the scorer logs its part {part}, another scorer's name; rename one of them"
            judge = scorer.judge if isinstance(scorer, DocumentQAScorer) else None
            if judge is not None and judge.longest_wait > limit:
                yield (
                    f"{path}.{index}.judge.timeout: {judge.retries + 1} requests of {judge.timeout:g} s and the waits between them "
                    f"take up to {judge.longest_wait:g} s, above the {limit:g} s of rollout.request_timeout; lower timeout or "
                    "retries, or raise rollout.request_timeout"
                )
