"""Checks of the algorithm section: choices that clash, and what each asks of rollout, data and rewards."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

from megarl.config.schema import AlgorithmConfig, Config, RolloutConfig
from megarl.config.tasks import TRAIN, correct_scorers, scorers_of, tasks_of

GROUP_ADVANTAGES = ("group_mean_std", "group_mean", "leave_one_out", "group_mean_batch_std", "group_mean_task_std")
GREEDY_ADVANTAGES = ("greedy_baseline",)
TOKEN_ADVANTAGES = ("reward_to_go", "reward_to_go_batch_mean", "gae", "process_rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Two choices that cannot go together.

    Attributes:
        first, second: dotted key in the algorithm section, and its values that clash.
        reason: why, and what to set.
    """

    first: tuple[str, tuple[object, ...]]
    second: tuple[str, tuple[object, ...]]
    reason: str


WHOLE_RESPONSE_SURROGATES = ("gmpo", "mirror_descent")
CLASHES = (
    Clash(
        first=("ratio", ("sequence", "sequence_token")),
        second=("surrogate", ("gmpo", "policy_gradient", "mirror_descent")),
        reason="these surrogates use each token's own ratio or none; set ratio: token, or surrogate: ppo_clip or cispo",
    ),
    Clash(
        first=("ratio", ("sequence",)),
        second=("advantage", TOKEN_ADVANTAGES),
        reason="one ratio and one clipping decision for a response cannot weigh advantages that differ by token; set ratio: "
        "sequence_token, or an advantage of whole responses",
    ),
    Clash(
        first=("surrogate", WHOLE_RESPONSE_SURROGATES),
        second=("advantage", TOKEN_ADVANTAGES),
        reason="the surrogate is of whole responses and the advantage differs by token; set an advantage of whole responses, for "
        "example group_mean",
    ),
    Clash(
        first=("surrogate", ("mirror_descent",)),
        second=("aggregation", ("sequence_mean", "token_mean", "token_sum_over_constant")),
        reason="the squared log-ratio is of a whole response; set aggregation: sequence_sum",
    ),
    Clash(
        first=("advantage", ("process_rewards",)),
        second=("kl.place", ("reward",)),
        reason="process rewards are made of the rewards of steps alone; set kl.place: loss or none",
    ),
    Clash(
        first=("kl.place", ("reward",)),
        second=("kl.estimator", ("k2", "k3")),
        reason="the penalty in the reward is the log-ratio itself, the only one whose policy gradient is the KL's; set "
        "kl.estimator: k1",
    ),
)


def check_algorithm(config: Config) -> Iterator[str]:
    """Make all checks of this file; lines start with the key."""
    if not config.learns_from_samples:
        return
    algorithm = config.algorithm
    yield from check_clashes(algorithm)
    yield from check_kl(algorithm)
    yield from check_settings(algorithm)
    yield from check_ratio(algorithm)
    yield from check_critic(config)
    if algorithm.advantage in GREEDY_ADVANTAGES:
        yield from check_greedy_shaping(algorithm)
    yield from check_groups(algorithm, config.rollout)
    yield from check_task_std(config)
    yield from check_process_rewards(config)
    yield from check_correctness(config)


def check_clashes(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Check that no two choices clash."""
    for clash in CLASHES:
        (first, first_values), (second, second_values) = clash.first, clash.second
        first_value, second_value = _value(algorithm, first), _value(algorithm, second)
        if first_value in first_values and second_value in second_values:
            yield f"algorithm.{first}: {first_value} and algorithm.{second} {second_value} do not go together: {clash.reason}"


def _value(algorithm: AlgorithmConfig, path: str) -> object:
    return reduce(getattr, path.split("."), algorithm)


def check_kl(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Check that place, coefficient and target of the KL penalty agree."""
    kl = algorithm.kl
    if kl.place != "none" and kl.coefficient == 0:
        yield (
            f"algorithm.kl.coefficient: is 0 with kl.place {kl.place}, so the reference model has no effect; "
            "set a coefficient, or kl.place: none"
        )
    if kl.place == "none" and kl.coefficient > 0:
        yield (
            f"algorithm.kl.coefficient: is {kl.coefficient:g} but kl.place is none, so it has no effect; "
            "set kl.place: loss or reward, or the coefficient to 0"
        )
    if kl.place == "none" and kl.target is not None:
        yield f"algorithm.kl.target: is {kl.target:g} but kl.place is none, so there is no KL to hold; set kl.place, or remove it"


def check_settings(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Check that settings of one choice are given only with that choice, and their ranges make sense."""
    control, clip = algorithm.entropy_control, algorithm.clip
    if clip.dual is not None and algorithm.surrogate != "ppo_clip":
        yield f"algorithm.clip.dual: is {clip.dual:g} and only surrogate ppo_clip uses it, not {algorithm.surrogate}; remove it"
    elif clip.dual is not None and clip.dual <= 1 + clip.high:
        yield f"algorithm.clip.dual: {clip.dual:g} is not above the clip range's 1 + {clip.high:g}; raise it, 3 is usual"
    if control is not None and control.low >= control.high:
        yield f"algorithm.entropy_control.low: {control.low:g} is not below high {control.high:g}; lower it"


def check_ratio(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Check that the loss can be corrected for what the ratio or the weights are of."""
    correction, surrogate, updates = algorithm.sampler_correction, algorithm.surrogate, algorithm.updates_per_step
    is_whole = surrogate in WHOLE_RESPONSE_SURROGATES or algorithm.ratio == "sequence"
    if is_whole and correction.method != "none" and correction.level == "token":
        choice = f"surrogate {surrogate}" if surrogate in WHOLE_RESPONSE_SURROGATES else f"ratio {algorithm.ratio}"
        yield (
            f"algorithm.sampler_correction.level: token with algorithm.{choice}, whose loss is one term of a whole response: "
            "weights that differ within it make it another loss; set level: sequence, or leave it out"
        )
    if surrogate == "policy_gradient" and updates > 1:
        yield (
            f"algorithm.updates_per_step: {updates} with surrogate policy_gradient, which has no importance ratio: after the first "
            "update the rest of the step's responses would be of another policy; set updates_per_step: 1, or surrogate: ppo_clip"
        )


def check_critic(config: Config) -> Iterator[str]:
    """Check that a critic is configured where one learns, and the policy learns too."""
    algorithm, critic = config.algorithm, config.critic
    if not algorithm.has_critic:
        if critic is not None:
            yield (
                f"critic: is given and algorithm.advantage {algorithm.advantage} has no critic; remove it, or set "
                "algorithm.advantage: gae"
            )
        return
    if critic is not None and critic.warmup_steps >= config.steps > 0:
        yield (
            f"critic.warmup_steps: {critic.warmup_steps} leaves none of the run's {config.steps} steps to the policy; lower it or "
            "train longer"
        )


def check_greedy_shaping(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Check that with an advantage that needs greedy responses, all that is added to a response's reward can be added to theirs."""
    weight = algorithm.reward_shaping.length_weight
    if weight > 0:
        yield (
            f"algorithm.reward_shaping.length_weight: is {weight:g}, and the length reward compares a prompt's sampled responses "
            f"with each other, so the greedy one that algorithm.advantage {algorithm.advantage} needs has none; set it to 0"
        )


def check_groups(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Check that responses can be compared with others."""
    # a function of the user's own may need the greedy response too, which this package cannot know without importing it
    may_have_greedy = algorithm.advantage in GREEDY_ADVANTAGES or ":" in algorithm.advantage
    if rollout.samples_per_prompt < 2 and algorithm.advantage in GROUP_ADVANTAGES:
        yield (
            f"rollout.samples_per_prompt: {rollout.samples_per_prompt} response per prompt makes every advantage 0 with "
            f"algorithm.advantage {algorithm.advantage}; use 2 or more"
        )
    elif rollout.samples_per_prompt < 2 and algorithm.dynamic_sampling and not may_have_greedy:
        yield (
            f"rollout.samples_per_prompt: {rollout.samples_per_prompt} response per prompt makes all rewards of a group equal, so "
            "algorithm.dynamic_sampling would never fill a step; use 2 or more, or set it to false"
        )
    if rollout.samples_per_prompt * rollout.prompts_per_step < 2 and (algorithm.advantage == "batch_mean_std" or algorithm.whiten):
        choice = "whiten true" if algorithm.whiten else "advantage batch_mean_std"
        yield f"rollout.prompts_per_step: 1 response in a step leaves nothing to compare with algorithm.{choice}; raise it"


def check_task_std(config: Config) -> Iterator[str]:
    """Check that a standard deviation by task has several tasks."""
    if config.algorithm.advantage == "group_mean_task_std" and len(tasks_of(config.data.train, TRAIN)) < 2:
        yield (
            "algorithm.advantage: group_mean_task_std needs a mixture of several tasks, and data.train holds one; give data.train "
            "type: mixture, or choose group_mean_batch_std"
        )


def check_correctness(config: Config) -> Iterator[str]:
    """Check that with a length reward it is clear which scorer says that an answer is right."""
    shaping = config.algorithm.reward_shaping
    tasks = tasks_of(config.data.train, TRAIN) if shaping.length_weight > 0 else []
    known = {scorer.log_name for task in tasks for scorer in scorers_of(config, task)}
    for name in shaping.correct_scorers:
        if tasks and name not in known:
            yield (
                f"algorithm.reward_shaping.correct_scorers: no scorer of the training tasks is called {name!r}; give names among "
                f"{', '.join(sorted(known)) or '(none)'}"
            )
            return
    for task in tasks:
        names = [scorer.log_name for scorer in scorers_of(config, task)]
        if names and not correct_scorers(config, task):
            yield (
                f"algorithm.reward_shaping.correct_scorers: of the scorers {', '.join(names)} of task {task.name} none is known to "
                "say that an answer is right, which the length reward needs; name those that do"
            )


def check_process_rewards(config: Config) -> Iterator[str]:
    """Check that with rewards for steps, every task has a scorer that gives them, and nothing shapes rewards that are not used."""
    algorithm = config.algorithm
    if algorithm.advantage != "process_rewards":
        return
    for task in tasks_of(config.data.train, TRAIN):
        if all(scorer.step_end is None for scorer in scorers_of(config, task)):
            yield (
                f"algorithm.advantage: process_rewards needs a reward for each step of a response, and task {task.name} has no "
                "scorer with step_separator; add one of type python, or choose for example group_mean_std"
            )
    for name in ("overlong_buffer", "length_weight"):
        if (value := getattr(algorithm.reward_shaping, name)) > 0:
            yield (
                f"algorithm.reward_shaping.{name}: is {value:g} and changes rewards of whole responses, which advantage "
                "process_rewards does not use; set it to 0"
            )
    if config.reward_model is not None:
        yield (
            "reward_model: scores whole responses, and advantage process_rewards uses rewards of steps alone; remove it, or choose "
            "another advantage"
        )
    if algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling: is true and drops groups by the rewards of whole responses, which advantage "
            "process_rewards does not use; set it to false"
        )
