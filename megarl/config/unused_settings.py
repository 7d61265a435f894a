"""Settings that a run does not use: they are no mistake, but who sets them expects something of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

from megarl.config.schema import AlgorithmConfig, Config, Section
from megarl.config.stages import configs_of

CLIPPING = ("ppo_clip", "gmpo", "cispo")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedRule:
    """Keys, dotted or whole sections, that have an effect only where ``is_used`` says so; ``only`` is said of that."""

    keys: tuple[str, ...]
    is_used: Callable[[Config], bool]
    only: str


def _is_own(name: str) -> bool:
    return ":" in name  # a function of the user's own, which may look at any setting of the method


def _engine_rule(engine: str) -> UnusedRule:
    return UnusedRule(
        keys=(f"rollout.{engine}",),
        is_used=lambda config: config.rollout.engine == engine and config.samples_responses,
        only=f"rollout.engine: {engine}",
    )


def _is_own_section(section: str) -> Callable[[Config], bool]:
    return lambda config: section in config.own_sections


def _has_schedule(config: Config) -> bool:
    return config.optimizer.schedule != "constant"


OF_KINDS = (
    *(
        UnusedRule(keys=(section,), is_used=_is_own_section(section), only=only)
        for section, only in (
            ("algorithm", "kind: rl"),
            ("reward_model", "kind: rl"),
            ("data.sampling", "kind: rl"),
            ("sft", "kind: sft"),
            ("preference", "kinds preference and reward_model"),
        )
    ),
    UnusedRule(
        keys=("rollout", "rewards"),
        is_used=lambda c: c.samples_responses,
        only="kind: rl, or kind: sft with evaluation.data,",
    ),
    UnusedRule(
        keys=("data.response_suffix",),
        is_used=lambda c: not c.learns_from_samples,
        only="kinds that train on given responses",
    ),
)
OF_METHODS = (
    UnusedRule(
        keys=("algorithm.clip.low", "algorithm.clip.high"),
        is_used=lambda c: c.algorithm.surrogate in CLIPPING or _is_own(c.algorithm.surrogate),
        only="a surrogate that clips, ppo_clip, gmpo or cispo,",
    ),
    UnusedRule(
        keys=("algorithm.mirror_descent_tau",),
        is_used=lambda c: c.algorithm.surrogate == "mirror_descent" or _is_own(c.algorithm.surrogate),
        only="surrogate: mirror_descent",
    ),
    UnusedRule(
        keys=("algorithm.gae", "algorithm.value_clip"),
        is_used=lambda c: c.algorithm.has_critic or _is_own(c.algorithm.advantage),
        only="advantage: gae",
    ),
    UnusedRule(
        keys=("algorithm.gae.trace_decay",),
        is_used=lambda c: c.algorithm.gae.length_adaptive_alpha is None,
        only="no length_adaptive_alpha, which takes its place,",
    ),
    UnusedRule(keys=("algorithm.kl.estimator",), is_used=lambda c: c.algorithm.kl.place != "none", only="kl.place: reward or loss"),
    UnusedRule(keys=("algorithm.kl.adaptation_rate",), is_used=lambda c: c.algorithm.kl.target is not None, only="kl.target"),
    UnusedRule(
        keys=("algorithm.sampler_correction.level", "algorithm.sampler_correction.cap"),
        is_used=lambda c: c.algorithm.sampler_correction.method != "none",
        only="sampler_correction.method: tis or mis",
    ),
    UnusedRule(
        keys=tuple(f"algorithm.reward_shaping.{name}" for name in ("length_start", "correct_scorers", "correct_reward")),
        is_used=lambda c: c.algorithm.reward_shaping.length_weight > 0,
        only="reward_shaping.length_weight",
    ),
    UnusedRule(
        keys=("algorithm.max_sampling_waves", "algorithm.max_surplus_age"),
        is_used=lambda c: c.algorithm.dynamic_sampling or c.rollout.outlives_updates,
        only="dynamic_sampling: true",
    ),
)
OF_THE_REST = (
    UnusedRule(
        keys=("optimizer.learning_rate",),
        is_used=lambda c: not c.optimizer.warmup_steps or c.steps * c.updates_per_step != 1,
        only="an update behind the first of a warm-up, which starts from 0, and the run has one,",
    ),
    UnusedRule(keys=("optimizer.min_learning_rate",), is_used=_has_schedule, only="a schedule that decays, linear or cosine,"),
    UnusedRule(
        keys=("critic.optimizer.min_learning_rate",),
        is_used=lambda c: c.critic is None or c.critic.optimizer is None or c.critic.optimizer.schedule != "constant",
        only="a schedule that decays, linear or cosine,",
    ),
    UnusedRule(
        keys=("data.sampling.priority_floor",),
        is_used=lambda c: c.data.sampling.order == "prioritised",
        only="data.sampling.order: prioritised",
    ),
    UnusedRule(
        keys=("evaluation.samples_per_prompt", "evaluation.temperature"),
        is_used=lambda c: c.evaluation.data is not None and not c.trains_on_pairs,
        only="evaluation.data of prompts",
    ),
    UnusedRule(
        keys=("rollout.weight_transfer.method", "rollout.weight_transfer.max_restarts"),
        is_used=lambda c: c.rollout.server is not None,
        only="an engine server, sglang or vllm,",
    ),
    UnusedRule(
        keys=("reference",), is_used=lambda c: c.has_reference, only="a KL term, observe.kl_reference or a loss with a reference"
    ),
    *(_engine_rule(engine) for engine in ("embedded", "sglang", "vllm")),
)


def unused_settings(config: Config) -> list[str]:
    """Name each setting that differs from its default, or its preset's, and has no effect in any stage; one line each."""
    parts = configs_of(config)
    unused = [dict(_unused(part)) for part in parts]
    return [line for key, line in unused[0].items() if all(key in other for other in unused)]


def _unused(config: Config) -> Iterator[tuple[str, str]]:
    covered: list[str] = []
    defaults = _defaults(config)
    for rule in (*OF_KINDS, *OF_METHODS, *OF_THE_REST):
        for key in rule.keys:
            if rule.is_used(config) or any(f"{key}.".startswith(f"{section}.") for section in covered):
                continue
            covered.append(key)
            value, default = _value(config, key), _value(defaults, key)
            for path, given in _differing(key, value, default):
                yield path, f"{path}: is {_short(given)} and has no effect: only {rule.only} uses it"


def _value(config: object, key: str) -> object:
    return reduce(lambda section, name: getattr(section, name, None), key.split("."), config)


def _defaults(config: Config) -> Config:
    """Return the config with the defaults of the method, its preset's where it has one, and of all other sections."""
    algorithm = AlgorithmConfig.model_validate({"preset": config.algorithm.preset})
    required = {"kind": config.kind, "steps": config.steps, "model": config.model}
    plain = Config.model_validate(required | {"data": {"train": config.data.train}})
    critic = None if config.critic is None else config.critic.model_copy(update={"optimizer": type(config.optimizer)()})
    return plain.model_copy(update={"algorithm": algorithm, "critic": critic})


def _differing(path: str, value: object, default: object) -> Iterator[tuple[str, object]]:
    """Yield dotted keys below ``path`` whose values are not the default's."""
    if isinstance(value, Section) and isinstance(default, Section):
        for name in type(value).model_fields:
            if not (path == "algorithm" and name == "preset"):
                yield from _differing(f"{path}.{name}", getattr(value, name), getattr(default, name, None))
    elif value != default:
        yield path, value


def _short(value: object) -> str:
    if isinstance(value, Section):
        return "given"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
