"""Checks of the rollout section: sampling, engine, environment, responses that outlive an update; lines start with the key."""

from collections.abc import Iterator

from megarl.config.schema import Config, ReasoningGymSource
from megarl.config.tasks import placed_scorers, placed_tasks


def check_rollout(config: Config) -> Iterator[str]:
    """Make all checks of this file."""
    yield from check_sampling(config)
    yield from check_asynchronous(config)
    yield from check_engine_server(config)
    yield from check_weight_transfer(config)
    yield from check_repetition_stop(config)
    yield from check_routing_replay(config)
    yield from check_environment(config)


def check_sampling(config: Config) -> Iterator[str]:
    """Check that the engine can sample as asked, and report the log-probabilities that the trainer needs."""
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


def check_asynchronous(config: Config) -> Iterator[str]:
    """Check that responses may outlive an update only where that is useful, and nothing stands against it."""
    rollout = config.rollout
    given = [name for name in ("asynchronous", "partial") if getattr(rollout, name) is not None]
    if not config.learns_from_samples:
        for name in given:
            yield f"rollout.{name}: is given and kind {config.kind} samples nothing to train on; remove it"
        return
    if len(given) == 2:
        yield (
            "rollout.partial: is given beside rollout.asynchronous, where responses outlive an update anyway and none needs a "
            "budget; remove one of them"
        )
    for key, is_used in (
        ("rollout.environment", rollout.environment is not None),
        ("rollout.routing_replay", rollout.routing_replay),
        ("algorithm.over_sampling", config.algorithm.over_sampling > 1),
        ("data.sampling.mixture: balanced", config.data.sampling.mixture == "balanced"),
    ):
        if is_used:
            for name in given:
                yield f"rollout.{name}: is given and does not go together with {key}; remove one of the two"
    if rollout.partial is not None and rollout.partial.step_token_budget >= rollout.max_new_tokens:
        yield (
            f"rollout.partial.step_token_budget: {rollout.partial.step_token_budget} tokens are all that a response may have "
            f"(rollout.max_new_tokens {rollout.max_new_tokens}), so none would ever be cut; lower it or remove rollout.partial"
        )
    yield from _check_limit(config)


def _check_limit(config: Config) -> Iterator[str]:
    """Check that the limit of the age of tokens can have an effect."""
    limit, asynchronous = config.algorithm.sampler_correction.max_staleness, config.rollout.asynchronous
    if limit is None:
        return
    if asynchronous is None and config.rollout.partial is None:
        yield (
            f"algorithm.sampler_correction.max_staleness: is {limit} and every token is sampled by the weights it trains; remove "
            "it, or set rollout.asynchronous or rollout.partial"
        )
    elif asynchronous is not None and limit >= asynchronous.max_staleness:
        yield (
            f"algorithm.sampler_correction.max_staleness: {limit} leaves nothing out, as rollout.asynchronous.max_staleness "
            f"{asynchronous.max_staleness} bounds the age of every token; lower it or remove it"
        )


def check_engine_server(config: Config) -> Iterator[str]:
    """Check that the settings of the chosen engine's server agree."""
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
    """Check that a transport is chosen only for what goes by it."""
    transfer = config.rollout.weight_transfer
    if transfer.transport == "auto":
        return
    key = f"rollout.weight_transfer.transport: {transfer.transport} has no use with"
    if config.rollout.server is None:
        yield f"{key} rollout.engine embedded, which takes the weights from rank 0's memory; leave it out"
    elif transfer.method == "broadcast":
        yield f"{key} method broadcast, which goes by gloo; leave it out, or set method to slices"


def check_repetition_stop(config: Config) -> Iterator[str]:
    """Check that the pattern's sizes make sense, and the engine can look for it."""
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


def check_routing_replay(config: Config) -> Iterator[str]:
    """Check that the experts of tokens are kept where a response is one request and is trained on in its own step."""
    if not config.rollout.routing_replay:
        return
    for name, is_used in (
        ("rollout.environment", config.rollout.environment is not None),
        ("algorithm.over_sampling", config.algorithm.over_sampling > 1),
    ):
        if is_used:
            yield f"rollout.routing_replay: is true and does not go together with {name}; remove one of the two"


def check_environment(config: Config) -> Iterator[str]:
    """Check that the environment's own keys are right, and rows, scorers and templates go with it."""
    environment = config.rollout.environment
    if environment is None:
        return
    yield from (f"rollout.environment.{line}" for line in environment.mistakes())
    template = environment.observation_template
    if template is None and config.data.template != "chat":
        yield (
            f"rollout.environment.observation_template: is not given and data.template {config.data.template!r} is no chat; give a "
            "text with {observation} in it"
        )
    if template is not None and template.count("{observation}") != 1:
        yield f"rollout.environment.observation_template: {template!r} must have {{observation}} in it, once"
    for path, scorers in placed_scorers(config):
        for index, scorer in enumerate(scorers):
            if scorer.name == "environment":
                yield f"{path}.{index}.name: 'environment' is the name of the environment's rewards; give another name"
            if scorer.step_end is not None:
                yield f"{path}.{index}.step_separator: steps are of one turn, rollout.environment makes several; remove one of them"
    if environment.plays is not None:
        for path, played in placed_tasks(config):
            source = played.source
            task = source.task if isinstance(source, ReasoningGymSource) else f"of type {source.type}"
            if task != environment.plays:
                yield (
                    f"rollout.environment.type: {environment.type} plays reasoning_gym's task {environment.plays} and {path} is "
                    f"{task}; use another source or environment"
                )
