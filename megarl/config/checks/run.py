"""Checks across keys that need neither the model nor the number of ranks; one line for each mistake."""

from collections.abc import Callable, Iterator
from datetime import date

from megarl.config.api_keys import check_api_keys
from megarl.config.checks.algorithm import check_algorithm
from megarl.config.checks.asynchronous import check_asynchronous
from megarl.config.checks.data import check_mixture, check_order, check_repetition_stop, check_surplus, check_tasks, check_too_long
from megarl.config.checks.environment import check_environment
from megarl.config.checks.preference import check_preference
from megarl.config.checks.rewards import check_judges, check_rewards
from megarl.config.schema import Config, JsonlSource, RowSource
from megarl.config.tasks import placed_tasks


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
    updates = config.updates_per_step
    total = config.steps * updates
    # steps: 0 only evaluates, and must not ask for another schedule.
    if optimizer.warmup_steps > total > 0:
        words = f"steps {config.steps} × updates_per_step {updates} = {total}" if updates > 1 else f"steps {total}"
        yield f"optimizer.warmup_steps: {optimizer.warmup_steps} optimizer steps exceed the run's {words}; lower it or train longer"


def check_batch(config: Config) -> Iterator[str]:
    """A step can be split into mini-batches of whole groups."""
    if not config.learns_from_samples:
        return
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.prompts_per_step % algorithm.updates_per_step:
        yield (
            f"algorithm.updates_per_step: rollout.prompts_per_step {rollout.prompts_per_step} does not divide into "
            f"{algorithm.updates_per_step} mini-batches of whole groups; make it a multiple of {algorithm.updates_per_step}"
        )


def check_sampling(config: Config) -> Iterator[str]:
    """The engine can sample as asked, and report the log-probabilities that the trainer needs."""
    if not config.samples_responses:
        return
    rollout, reshaping = config.rollout, config.rollout.reshaping()
    temperatures = {"rollout.temperature": rollout.temperature} if config.learns_from_samples else {}
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
    section = config.rollout.server
    if section is None:
        return
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
    if config.rollout.server is None:
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
