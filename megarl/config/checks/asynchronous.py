"""Checks of the sections that let responses outlive a weight update: asynchronous and partial rollouts."""

from collections.abc import Iterator

from megarl.config.schema import Config


def check_asynchronous(config: Config) -> Iterator[str]:
    """All checks of this file; lines start with the key."""
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
    """The limit of the age of tokens can have an effect."""
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
