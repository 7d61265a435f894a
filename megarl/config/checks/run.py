"""Checks across keys that need neither the model nor the number of ranks; one line for each mistake."""

from collections.abc import Iterator

from megarl.config.api_keys import check_api_keys
from megarl.config.checks.algorithm import check_algorithm
from megarl.config.checks.data import check_data
from megarl.config.checks.rollout import check_rollout
from megarl.config.schema import Config, PreferenceConfig, ReasoningGymSource
from megarl.config.tasks import placed_tasks


def check_run(config: Config) -> Iterator[str]:
    """Make all checks of this file and of those that it imports."""
    for run_check in (
        check_tokenizer,
        check_optimizer,
        check_batch,
        check_algorithm,
        check_rollout,
        check_api_keys,
        check_data,
        check_preference,
    ):
        yield from run_check(config)


def check_tokenizer(config: Config) -> Iterator[str]:
    """Check that the tokenizer folder exists."""
    tokenizer = config.model.tokenizer
    if tokenizer is not None and not tokenizer.is_dir():
        yield f"model.tokenizer: {tokenizer} is not a folder; give a folder with tokenizer files or leave the key out"


def check_optimizer(config: Config) -> Iterator[str]:
    """Check that the schedule fits into the run."""
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
    """Check that a step can be split into mini-batches of whole groups."""
    if not config.learns_from_samples:
        return
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.prompts_per_step % algorithm.updates_per_step:
        yield (
            f"algorithm.updates_per_step: rollout.prompts_per_step {rollout.prompts_per_step} does not divide into "
            f"{algorithm.updates_per_step} mini-batches of whole groups; make it a multiple of {algorithm.updates_per_step}"
        )


SMOOTHED = ("dpo", "robust")
OF_POLICIES = ("loss", "beta", "label_smoothing", "simpo_margin")
OF_REWARD_MODELS = ("reward_margin", "reward_centering")


def check_preference(config: Config) -> Iterator[str]:
    """Check that settings have an effect, and the rows can have two responses."""
    if not config.trains_on_pairs:
        return
    if config.rollout.environment is not None:
        yield f"rollout.environment: is given and kind {config.kind} samples no responses; remove it"
    for path, task in placed_tasks(config):
        if isinstance(task.source, ReasoningGymSource):
            yield f"{path}.type: reasoning_gym has no rejected responses; give jsonl or datasets with a chosen and a rejected field"
    yield from _check_reward_model(config) if config.trains_reward_model else _check_loss(config)


def _check_loss(config: Config) -> Iterator[str]:
    preference = config.preference
    loss, smoothing, margin = preference.loss, preference.label_smoothing, preference.simpo_margin
    if smoothing > 0 and loss not in SMOOTHED:
        yield f"preference.label_smoothing: is {smoothing:g} and loss {loss} has none; set it to 0, or loss to dpo or robust"
    if smoothing == 0 and loss == "robust":
        yield "preference.label_smoothing: is 0, with which robust is dpo; set it to the share of wrong labels, or loss to dpo"
    if margin is not None and loss != "simpo":
        yield f"preference.simpo_margin: is {margin:g} and loss {loss} has none; remove it, or set loss to simpo"
    if margin is None and loss == "simpo":
        yield "preference.simpo_margin: is required for loss simpo; give for example 1.0 with beta 2.0"
    if config.reference is not None and not preference.has_reference:
        yield f"reference: is given and preference.loss {loss} compares with no reference; remove it"
    for name in OF_REWARD_MODELS:
        if getattr(preference, name) > 0:
            yield f"preference.{name}: is {getattr(preference, name):g} and has no use for kind preference; remove it"


def _check_reward_model(config: Config) -> Iterator[str]:
    defaults = PreferenceConfig()
    for name in OF_POLICIES:
        if (value := getattr(config.preference, name)) != getattr(defaults, name):
            yield f"preference.{name}: is {value} and has no use for kind reward_model; remove it"
    if config.reference is not None:
        yield "reference: is given and kind reward_model compares with no reference; remove it"
