"""Checks across keys that need neither the model nor the number of ranks; one line for each mistake."""

import re
from collections.abc import Callable, Iterator

from megarl.config.algorithm_checks import check_algorithm
from megarl.config.document_qa_checks import check_document_qa, check_judges
from megarl.config.names import FUNCTION_PATTERN
from megarl.config.schema import Config, DataSource, EngineServerConfig, JsonlSource, ReasoningGymSource, ScorerConfig


def check_run(config: Config) -> Iterator[str]:
    """All checks of this file."""
    for run_check in CHECKS:
        yield from run_check(config)


def check_tokenizer(config: Config) -> Iterator[str]:
    """The tokenizer folder exists."""
    tokenizer = config.model.tokenizer
    if tokenizer is not None and not tokenizer.is_dir():
        yield f"model.tokenizer: {tokenizer} is not a folder; give a folder with tokenizer files or leave the key out"


def check_optimizer(config: Config) -> Iterator[str]:
    """The schedule fits into the run."""
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate: {optimizer.min_learning_rate:g} is above learning_rate {optimizer.learning_rate:g}; "
            "lower it or raise learning_rate"
        )
    updates = config.algorithm.updates_per_step if config.kind == "rl" else 1
    total = config.steps * updates
    # steps: 0 only evaluates, and must not ask for another schedule.
    if optimizer.warmup_steps > total > 0:
        words = f"steps {config.steps} × updates_per_step {updates} = {total}" if updates > 1 else f"steps {total}"
        yield f"optimizer.warmup_steps: {optimizer.warmup_steps} optimizer steps exceed the run's {words}; lower it or train longer"


def check_batch(config: Config) -> Iterator[str]:
    """A step can be split into mini-batches of whole groups."""
    if config.kind != "rl":
        return
    rollout, algorithm, train = config.rollout, config.algorithm, config.data.train
    if rollout.prompts_per_step % algorithm.updates_per_step:
        yield (
            f"algorithm.updates_per_step: rollout.prompts_per_step {rollout.prompts_per_step} does not divide into "
            f"{algorithm.updates_per_step} mini-batches of whole groups; make it a multiple of {algorithm.updates_per_step}"
        )
    if isinstance(train, ReasoningGymSource) and train.size < rollout.prompts_per_step:
        yield (
            f"data.train.size: {train.size} prompts are fewer than rollout.prompts_per_step {rollout.prompts_per_step}, so one "
            "step would hold a prompt twice; raise size"
        )


def check_sampling(config: Config) -> Iterator[str]:
    """The engine can report the log-probabilities that the trainer needs."""
    rollout = config.rollout
    truncated = [f"top_p {rollout.top_p:g}"] if rollout.top_p < 1 else []
    truncated += [f"top_k {rollout.top_k}"] if rollout.top_k > 0 else []
    if config.kind == "rl" and rollout.engine == "vllm" and rollout.temperature != 1 and truncated:
        yield (
            f"rollout.temperature: {rollout.temperature:g} with {' and '.join(truncated)} on engine vllm: vLLM then renormalises "
            "its log-probabilities over the truncated set, and the trainer's are over the whole vocabulary; "
            "use temperature 1, or top_p 1 and top_k 0"
        )


def check_engine_server(config: Config) -> Iterator[str]:
    """The settings of the chosen engine's server agree."""
    engine = config.rollout.engine
    if engine == "embedded":
        return
    section: EngineServerConfig = getattr(config.rollout, engine)
    if section.url is not None:
        own_server = {"python": section.python, "port": section.port, "arguments": section.arguments}
        for name, value in own_server.items():
            if value:
                yield (
                    f"rollout.{engine}.{name}: is {value} but rollout.{engine}.url {section.url} uses a server that already runs; "
                    f"remove {name}, or url to start a server"
                )
    elif section.python is not None and not section.python.is_file():
        yield (
            f"rollout.{engine}.python: {section.python} does not exist; give the Python of an environment with {engine}, "
            f"or leave the key out and run make engine-{engine}"
        )


def check_data(config: Config) -> Iterator[str]:
    """Sources exist and the template has a place for the prompt."""
    template = config.data.template
    if template != "chat" and "{prompt}" not in template:
        yield f"data.template: {template!r} has no {{prompt}} in it; add it, or write chat for the tokenizer's chat template"
    for path, source in _sources(config):
        if isinstance(source, JsonlSource) and not source.path.is_file():
            yield f"{path}.path: {source.path} does not exist; give a JSON-lines file (relative to the current directory)"


def check_evaluation(config: Config) -> Iterator[str]:
    """Evaluation has data, and more samples only where they can differ."""
    evaluation = config.evaluation
    if evaluation.data is None and evaluation.every > 0:
        yield f"evaluation.every: is {evaluation.every} but there is no evaluation.data; give held-out prompts or set every to 0"
    if evaluation.data is not None and evaluation.samples_per_prompt > 1 and evaluation.temperature == 0:
        yield (
            f"evaluation.samples_per_prompt: {evaluation.samples_per_prompt} greedy responses (temperature 0) are all the same; "
            "use 1, or a temperature above 0"
        )


def check_rewards(config: Config) -> Iterator[str]:
    """There is a scorer where responses are scored, and the log can tell scorers apart."""
    scorers = config.rewards.scorers
    needs_scorers = config.kind == "rl" and config.reward_model is None
    user = "kind: rl" if needs_scorers else "evaluation.data" if config.evaluation.data is not None else None
    if user is not None and not scorers:
        yield f"rewards.scorers: is empty and {user} needs at least one; add for example - type: math"
    seen: dict[str, int] = {}
    for index, scorer in enumerate(scorers):
        name = scorer.name or scorer.type
        if name in seen:
            yield f"rewards.scorers.{index}.name: {name!r} is also the name of scorer {seen[name]}; give one of them another name"
        seen.setdefault(name, index)
        for line in check_scorer(scorer):
            yield f"rewards.scorers.{index}.{line}"
        if scorer.type == "reasoning_gym":
            scored = [("data.train", config.data.train)] if config.kind == "rl" else []
            scored += [("evaluation.data", config.evaluation.data)] if config.evaluation.data is not None else []
            for path, source in scored:
                if not isinstance(source, ReasoningGymSource):
                    yield (
                        f"rewards.scorers.{index}.type: reasoning_gym scores only its own tasks, and {path} has type "
                        f"{source.type}; use another scorer"
                    )


def check_scorer(scorer: ScorerConfig) -> Iterator[str]:
    """A scorer has the fields that its type needs, and only those; lines start with the field's name."""
    if scorer.type == "regex" and scorer.pattern is None:
        yield "pattern: is required for type regex; give a regular expression"
    if scorer.type == "python" and scorer.pattern is not None:
        yield f"pattern: {scorer.pattern!r} has no use for type python; remove it"
    if scorer.type != "python" and scorer.function is not None:
        yield f"function: {scorer.function!r} has no use for type {scorer.type}; remove it or use type python"
    if scorer.type == "python" and (scorer.function is None or not FUNCTION_PATTERN.fullmatch(scorer.function)):
        given = "is required" if scorer.function is None else f"{scorer.function!r} is not module:function"
        yield f"function: {given} for type python; give for example my_package.rewards:score"
    yield from check_document_qa(scorer)
    if scorer.pattern is None:
        return
    try:
        groups = re.compile(scorer.pattern).groups
    except re.error as error:
        yield f"pattern: {scorer.pattern!r} is not a regular expression ({error}); correct it"
        return
    if scorer.type in ("exact", "math", "reasoning_gym", "document_qa") and groups == 0:
        yield f"pattern: {scorer.pattern!r} has no group to take the answer from; put the answer's part in ( )"


def _sources(config: Config) -> Iterator[tuple[str, DataSource]]:
    """Every data source with its dotted path."""
    yield "data.train", config.data.train
    for index, source in enumerate(config.data.exclude):
        yield f"data.exclude.{index}", source
    if config.evaluation.data is not None:
        yield "evaluation.data", config.evaluation.data


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_tokenizer,
    check_optimizer,
    check_batch,
    check_algorithm,
    check_sampling,
    check_engine_server,
    check_data,
    check_evaluation,
    check_rewards,
    check_judges,
)
