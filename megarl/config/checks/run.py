"""Checks across keys that need neither the model nor the number of ranks; one line for each mistake."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import date

from megarl.config.api_keys import check_api_keys
from megarl.config.checks.algorithm import check_algorithm
from megarl.config.checks.asynchronous import check_asynchronous
from megarl.config.checks.data import check_mixture, check_order, check_repetition_stop, check_surplus, check_tasks, check_too_long
from megarl.config.checks.document_qa import check_document_qa, check_judges
from megarl.config.checks.environment import check_environment
from megarl.config.checks.preference import check_preference
from megarl.config.models_of import samples_responses
from megarl.config.names import FUNCTION_PATTERN
from megarl.config.schema import Config, EngineServerConfig, JsonlSource, ReasoningGymSource, RowSource, ScorerConfig, Section
from megarl.config.tasks import placed_scorers, placed_tasks, scorers_of


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
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.prompts_per_step % algorithm.updates_per_step:
        yield (
            f"algorithm.updates_per_step: rollout.prompts_per_step {rollout.prompts_per_step} does not divide into "
            f"{algorithm.updates_per_step} mini-batches of whole groups; make it a multiple of {algorithm.updates_per_step}"
        )


def check_sampling(config: Config) -> Iterator[str]:
    """The engine can sample as asked, and report the log-probabilities that the trainer needs."""
    if not samples_responses(config):
        return
    rollout, reshaping = config.rollout, config.rollout.reshaping()
    temperatures = {"rollout.temperature": rollout.temperature} if config.kind == "rl" else {}
    if config.evaluation.data is not None and config.evaluation.temperature > 0:
        temperatures["evaluation.temperature"] = config.evaluation.temperature
    for key, temperature in temperatures.items():
        if rollout.engine == "vllm" and temperature != 1 and reshaping:
            yield (
                f"{key}: {temperature:g} with {' and '.join(f'{name} {value:g}' for name, value in reshaping.items())} on engine "
                "vllm: vLLM's log-probabilities are then of what these leave, and the trainer's are over the whole vocabulary; "
                "use temperature 1, or leave them out"
            )
    if rollout.engine == "sglang":
        yield from _check_sglang_sampling(config)
    resumes = rollout.partial is not None or (rollout.asynchronous is not None and rollout.asynchronous.on_update == "continue")
    for name in ("presence_penalty", "frequency_penalty"):
        if name in reshaping and resumes:
            yield (
                f"rollout.{name}: is {reshaping[name]:g} and counts the tokens of one request, but responses go on in another "
                "after a weight update; use repetition_penalty, or leave it out"
            )


def _check_sglang_sampling(config: Config) -> Iterator[str]:
    reshaping, server = config.rollout.reshaping(), config.rollout.sglang
    for name, value in reshaping.items():
        if name.endswith("_penalty"):
            yield (
                f"rollout.{name}: is {value:g}, and SGLang's log-probabilities are of the logits after it, the trainer's of those "
                "before; use engine vllm or embedded, or leave it out"
            )
    arguments = {name.replace("-", "_"): value for name, value in server.arguments.items()}
    if "min_p" in reshaping and arguments.get("enable_deterministic_inference") is not False:
        yield (
            f"rollout.min_p: is {reshaping['min_p']:g}, which SGLang cannot do with seeds; use engine vllm or embedded, leave it "
            "out, or set rollout.sglang.arguments.enable_deterministic_inference to false"
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


def check_weight_transfer(config: Config) -> Iterator[str]:
    """A transport is chosen only for what goes by it."""
    transfer = config.rollout.weight_transfer
    if transfer.transport == "auto":
        return
    key = f"rollout.weight_transfer.transport: {transfer.transport} has no use with"
    if config.rollout.engine == "embedded":
        yield f"{key} rollout.engine embedded, which takes the weights from rank 0's memory; leave it out"
    elif transfer.method == "broadcast":
        yield f"{key} method broadcast, which goes by gloo; leave it out, or set method to slices"


def check_data(config: Config) -> Iterator[str]:
    """Sources exist and the template has a place for the prompt."""
    template = config.data.template
    if template != "chat" and "{prompt}" not in template:
        yield f"data.template: {template!r} has no {{prompt}} in it; add it, or write chat for the tokenizer's chat template"
    for path, source in _sources(config):
        if isinstance(source, JsonlSource) and source.path.is_dir():
            yield f"{path}.path: {source.path} is a folder; name a file in it, or set {path}.type: datasets for a dataset's folder"
        elif isinstance(source, JsonlSource) and not source.path.is_file():
            yield f"{path}.path: {source.path} does not exist; give a file of rows (relative to the current directory)"


def check_chat_template(config: Config) -> Iterator[str]:
    """The chat template's settings can be used."""
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


def check_routing_replay(config: Config) -> Iterator[str]:
    """The experts of tokens are kept where a response is one request and is trained on in its own step."""
    if not config.rollout.routing_replay:
        return
    for name, is_used in (
        ("rollout.environment", config.rollout.environment is not None),
        ("algorithm.over_sampling", config.algorithm.over_sampling > 1),
    ):
        if is_used:
            yield f"rollout.routing_replay: is true and does not go together with {name}; remove one of the two"


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
    for path, scorers in placed_scorers(config):
        yield from check_scorers(path, scorers)
    scored = [
        (path, task)
        for path, task in placed_tasks(config)
        if samples_responses(config) and (config.kind == "rl" or path.startswith("evaluation"))
    ]
    for path, task in scored:
        scorers = scorers_of(config, task)
        is_training = path.startswith("data.train")
        has_others = config.rollout.environment is not None or (is_training and config.reward_model is not None)
        if not scorers and not has_others:
            user = "kind: rl" if is_training else "evaluation.data"
            yield f"rewards.scorers: is empty and {user} needs at least one; add for example - type: math"
            break
        if any(scorer.type == "reasoning_gym" for scorer in scorers) and not isinstance(task.source, ReasoningGymSource):
            key = f"{path.removesuffix('source')}scorers" if task.scorers else "rewards.scorers"
            yield f"{key}: reasoning_gym scores only its own tasks, and {path} has type {task.source.type}; use another scorer"


def check_scorers(path: str, scorers: Sequence[ScorerConfig]) -> Iterator[str]:
    """Each scorer of one list is whole, and has a name of its own."""
    seen: dict[str, int] = {}
    for index, scorer in enumerate(scorers):
        name = scorer.name or scorer.type
        if name in seen:
            yield f"{path}.{index}.name: {name!r} is also the name of scorer {seen[name]}; give one of them another name"
        seen.setdefault(name, index)
        for line in check_scorer(scorer):
            yield f"{path}.{index}.{line}"


SCORER_FIELDS = {
    "pattern": ("regex", "format", "exact", "math", "reasoning_gym", "document_qa"),
    "tags": ("format",),
    "ngram": ("repetition",),
    "script": ("language",),
    "extract": ("document_qa",),
    "match": ("document_qa",),
    "judge": ("document_qa",),
    "function": ("python",),
    "step_separator": ("python",),
    "url": ("reward_server",),
    "engine": ("reward_server",),
    "api_key_env": ("reward_server",),
}
REQUIRED_SCORER_FIELDS = {
    "ngram": "for example 4",
    "script": "for example latin",
    "url": "for example http://127.0.0.1:8000",
    "engine": "vllm or sglang",
}


def check_scorer(scorer: ScorerConfig) -> Iterator[str]:
    """A scorer has the fields that its type needs, and only those; lines start with the field's name."""
    for name, users in SCORER_FIELDS.items():
        value = getattr(scorer, name)
        if value and scorer.type not in users:
            given = f"{name}:" if isinstance(value, Section) else f"{name}: {value!r}"
            yield f"{given} has no use for type {scorer.type}; remove it or use type {' or '.join(users)}"
        if value is None and users == (scorer.type,) and name in REQUIRED_SCORER_FIELDS:
            yield f"{name}: is required for type {scorer.type}; give {REQUIRED_SCORER_FIELDS[name]}"
    if scorer.type == "regex" and scorer.pattern is None:
        yield "pattern: is required for type regex; give a regular expression"
    if scorer.type == "format" and bool(scorer.tags) == (scorer.pattern is not None):
        yield "tags: type format needs either tags or a pattern; give for example tags: [think, answer]"
    if any(re.search(r"[<>/\s]", tag) or not tag for tag in scorer.tags):
        yield f"tags: {scorer.tags!r} must be names without <, >, / and spaces; give for example [think, answer]"
    if scorer.type == "python" and (scorer.function is None or not FUNCTION_PATTERN.fullmatch(scorer.function)):
        given = "is required" if scorer.function is None else f"{scorer.function!r} is not module:function"
        yield f"function: {given} for type python; give for example my_package.rewards:score"
    if scorer.type == "document_qa":
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


def _sources(config: Config) -> Iterator[tuple[str, RowSource]]:
    """Every source of rows with its dotted path."""
    for path, task in placed_tasks(config):
        yield path, task.source
    for index, source in enumerate(config.data.exclude):
        yield f"data.exclude.{index}", source


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    check_tokenizer,
    check_optimizer,
    check_batch,
    check_algorithm,
    check_sampling,
    check_asynchronous,
    check_engine_server,
    check_api_keys,
    check_weight_transfer,
    check_data,
    check_chat_template,
    check_tasks,
    check_order,
    check_too_long,
    check_mixture,
    check_surplus,
    check_repetition_stop,
    check_routing_replay,
    check_evaluation,
    check_rewards,
    check_judges,
    check_environment,
    check_preference,
)
