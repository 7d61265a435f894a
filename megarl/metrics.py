"""Every metric of the log: how values of parts become the value of the whole, its unit and its meaning.

A name may have variable parts in angle brackets, ``staleness/<k>_gap``. ``python -m megarl.metrics`` prints docs/metrics.md.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache


class Reduction(StrEnum):
    """How the values of a step's parts (micro-batches, ranks, optimizer steps, responses) become the step's value.

    All but the extremes are exact: means and sums over all members of all parts, whatever the parts' sizes.
    """

    TOKEN_MEAN = "mean over trained tokens"
    SEQUENCE_MEAN = "mean over responses"
    PROMPT_MEAN = "mean over prompts"
    UPDATE_MEAN = "mean over optimizer steps"
    SUM = "sum"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    LAST = "value at the end of the step"
    WHOLE = "computed from the whole step's data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of the log; ``unit`` is ``-`` for a plain number."""

    reduction: Reduction
    unit: str
    meaning: str


Metrics = Mapping[str, Metric]


def _metric(reduction: Reduction, unit: str, meaning: str) -> Metric:
    return Metric(reduction=reduction, unit=unit, meaning=meaning)


_TOKENS, _RESPONSES, _PROMPTS = Reduction.TOKEN_MEAN, Reduction.SEQUENCE_MEAN, Reduction.PROMPT_MEAN
_SUM, _MAXIMUM, _MINIMUM, _LAST, _WHOLE = Reduction.SUM, Reduction.MAXIMUM, Reduction.MINIMUM, Reduction.LAST, Reduction.WHOLE

UPDATE_METRICS: Metrics = {
    "loss": _metric(_RESPONSES, "-", "what is minimised: each optimizer step's loss, whose normaliser is its own"),
    "policy_loss": _metric(_RESPONSES, "-", "the surrogate's part of the loss, without KL penalty and entropy bonus"),
    "entropy": _metric(_TOKENS, "nats", "of the policy at each trained token"),
    "kl_old": _metric(
        _TOKENS, "nats", "KL(policy that the step began with || policy), k3: 0 in the first optimizer step, which moves it"
    ),
    "clip_fraction_low": _metric(_TOKENS, "share", "tokens at which the lower bound of the ratio is active"),
    "clip_fraction_high": _metric(_TOKENS, "share", "tokens at which the upper bound of the ratio is active"),
    "ratio_min": _metric(_MINIMUM, "-", "smallest importance ratio"),
    "ratio_max": _metric(_MAXIMUM, "-", "largest importance ratio"),
    "value_mean": _metric(_TOKENS, "reward", "what the critic expects"),
    "clip_fraction": _metric(_TOKENS, "share", "of the critic: values that have moved further than value_clip"),
    "accuracy": _metric(_RESPONSES, "share", "of runs on pairs: pairs whose chosen response has the larger reward"),
    "margin": _metric(_RESPONSES, "reward", "chosen less rejected"),
    "chosen_reward": _metric(_RESPONSES, "reward", "of the chosen responses"),
    "rejected_reward": _metric(_RESPONSES, "reward", "of the rejected responses"),
    "chosen_logprob": _metric(_RESPONSES, "nats", "log π of the whole chosen response"),
    "rejected_logprob": _metric(_RESPONSES, "nats", "log π of the whole rejected response"),
    "gradient_norm": _metric(Reduction.UPDATE_MEAN, "L2 norm", "of the global gradient before clipping"),
    "gradient_norm_max": _metric(_MAXIMUM, "L2 norm", "of the global gradient before clipping, largest"),
    "learning_rate": _metric(_LAST, "-", "of the last optimizer step"),
    "skipped_updates": _metric(_SUM, "optimizer steps", "whose gradient was NaN or infinite; nothing else counts them"),
    "empty_updates": _metric(_SUM, "optimizer steps", "in which nothing had a gradient; nothing else counts them"),
}
CRITIC = "critic_"  # before the names of the critic's optimizer steps
HELD_OUT = "held_out/"  # before the names of what is measured on held-out pairs

METHOD_METRICS: Metrics = {
    "kl_reference": _metric(_TOKENS, "nats", "KL(policy || reference), k3, over all sampled tokens before any is left out"),
    "kl_coefficient": _metric(_LAST, "-", "β that the step's updates had"),
    "masked_truncated_share": _metric(_RESPONSES, "share", "responses left out of the loss as truncated"),
    "stale_tokens_masked": _metric(_SUM, "tokens", "left out of the loss as staler than sampler_correction.max_staleness"),
    "overlong_penalty_mean": _metric(_RESPONSES, "reward", "what reward_shaping.overlong_buffer adds"),
    "length_reward_mean": _metric(_RESPONSES, "reward", "what reward_shaping.length_weight adds"),
    "return_mean": _metric(_TOKENS, "reward", "what the critic's values are to become"),
    "explained_variance": _metric(_WHOLE, "-", "of the returns by the critic's values: 1 for a perfect critic, 0 for a constant"),
    "negatives_masked": _metric(_LAST, "0 or 1", "whether entropy control left negative advantages out"),
    "sampler_weight_mean": _metric(_TOKENS, "-", "importance weights of the sampler correction"),
    "logprob_gap_mean": _metric(_TOKENS, "nats", "|trainer − sampler| log-probs of tokens sampled by the newest weights"),
    "logprob_gap_max": _metric(_MAXIMUM, "nats", "the largest of these"),
    "staleness_mean": _metric(_TOKENS, "updates", "between the weights that sampled a token and those that are trained"),
    "staleness_max": _metric(_MAXIMUM, "updates", "the largest of these"),
    "staleness/<k>_tokens": _metric(_SUM, "tokens", "trained tokens of staleness k"),
    "staleness/<k>_gap": _metric(_TOKENS, "nats", "|trainer − sampler| log-probs of tokens of staleness k"),
    "staleness/<k>_gap_corrected": _metric(_TOKENS, "nats", "what the sampler correction does not make up for"),
}

ROLLOUT_METRICS: Metrics = {
    "reward_mean": _metric(_RESPONSES, "reward", "before shaping"),
    "reward_min": _metric(_MINIMUM, "reward", "the smallest"),
    "reward_max": _metric(_MAXIMUM, "reward", "the largest"),
    "reward_std": _metric(_WHOLE, "reward", "standard deviation (population) over responses"),
    "reward_mean/<task>": _metric(_RESPONSES, "reward", "of one task of several"),
    "prompts/<task>": _metric(_SUM, "prompts", "of one task of several"),
    "score_<scorer>": _metric(_RESPONSES, "score", "one scorer's, without its weight; score_reward_model is the reward model's"),
    "greedy_reward_mean": _metric(_PROMPTS, "reward", "of the greedy responses"),
    "zero_variance_share": _metric(_PROMPTS, "share", "groups whose rewards are all equal: they teach nothing"),
    "response_length_mean": _metric(_RESPONSES, "tokens", "that the policy sampled"),
    "response_length_max": _metric(_MAXIMUM, "tokens", "the longest response"),
    "truncated_share": _metric(_RESPONSES, "share", "responses that ended at max_new_tokens"),
    "repetition_stopped_share": _metric(_RESPONSES, "share", "responses ended by rollout.repetition_stop"),
    "repetition_share": _metric(_RESPONSES, "share", "responses more than half of whose 4-grams stood in them already"),
    "reward_length_correlation": _metric(_WHOLE, "-", "Pearson, over responses; null where either is constant"),
    "scorer_failures": _metric(_SUM, "failures", "of scorers and environments, greedy responses' included"),
    "turns_mean": _metric(_RESPONSES, "turns", "of the policy in an episode"),
    "turns_max": _metric(_MAXIMUM, "turns", "of the longest episode"),
    "out_of_turns_share": _metric(_RESPONSES, "share", "episodes that ended at max_turns"),
    "environment_token_share": _metric(_WHOLE, "share", "of all tokens behind the prompts"),
    "environment_seconds": _metric(_RESPONSES, "s", "an episode's wait for its environment"),
    "data/seen_share": _metric(_LAST, "share", "rows that were answered so far"),
    "data/success_rate_mean": _metric(_LAST, "share", "mean success rate of these rows"),
    "curriculum/stage": _metric(_LAST, "-", "number of the stage, from 0"),
    "curriculum/earlier_share": _metric(_PROMPTS, "share", "prompts of earlier stages"),
}

COLLECT_METRICS: Metrics = {
    "rollout/wall_seconds": _metric(
        _SUM, "s", "from the first request to the last reward; of asynchronous rollouts the wait for them"
    ),
    "rollout/generating_seconds": _metric(_SUM, "s", "wall time with at least one request at the engine"),
    "rollout/generate_seconds": _metric(_SUM, "s", "at the engine, over all requests"),
    "rollout/score_seconds": _metric(_SUM, "s", "in scorers, over all responses"),
    "rollout/waves": _metric(_SUM, "waves", "rounds of prompts"),
    "rollout/dropped_unscored": _metric(_SUM, "groups", "dropped because a scorer or the environment failed"),
    "rollout/dropped_filtered": _metric(_SUM, "groups", "dropped by dynamic sampling for equal rewards"),
    "rollout/reused": _metric(_SUM, "groups", "of the step that waited from an earlier one"),
    "rollout/dropped_surplus": _metric(_SUM, "groups", "that waited longer than algorithm.max_surplus_age"),
    "rollout/surplus": _metric(_LAST, "groups", "that wait for the next step"),
    "rollout/retries": _metric(_SUM, "requests", "sent again"),
    "rollout/environment_failures": _metric(_SUM, "episodes", "whose environment failed, in dropped groups too"),
    "rollout/failures": _metric(_SUM, "failures", "of requests, scorers and environments"),
    "rollout/replaced_workers": _metric(_SUM, "processes", "of scorers and environments that ended before they had answered"),
    "rollout/pass@<k>": _metric(_PROMPTS, "share", "unbiased pass@k of all groups sampled, dropped ones among them (2107.03374)"),
}

EVALUATION_METRICS: Metrics = {
    "accuracy": _metric(_PROMPTS, "share", "held-out prompts answered rightly, by one response (pass@1)"),
    "accuracy/<task>": _metric(_PROMPTS, "share", "of one task of several"),
    "accuracy@<stage>": _metric(_PROMPTS, "share", "of the prompts of one stage's own lengths"),
    "pass@<k>": _metric(_PROMPTS, "share", "held-out prompts answered rightly by one of k responses (unbiased, 2107.03374)"),
    "pass@<k>/<task>": _metric(_PROMPTS, "share", "of one task of several"),
}

SECTIONS: Mapping[str, tuple[str, Metrics]] = {
    "Updates": (
        "Of the policy's optimizer steps, or of the model that a run on examples or pairs trains. The critic's have `critic_` in "
        "front. What held-out pairs give has `held_out/` in front. Updates that were skipped or empty only count as such.",
        UPDATE_METRICS,
    ),
    "Method": ("What the method did with the step's batch before the updates.", METHOD_METRICS),
    "Responses": ("Of the responses that the step trains on.", ROLLOUT_METRICS),
    "Sampling": ("What it took to collect them.", COLLECT_METRICS),
    "Evaluation": ("Where `evaluation` is due.", EVALUATION_METRICS),
}

INTRODUCTION = """# Metrics

<!-- made by `python -m megarl.metrics`; do not edit -->

Each line of `metrics.jsonl` has `step`, `time` (Unix seconds), `metrics` and `seconds` (wall time by phase). NaN and infinity are
null. TensorBoard has the same names, phases as `seconds/<phase>`. A step's value is made of those of its micro-batches, ranks,
optimizer steps and responses as the second column says.
"""


def find_metric(name: str) -> Metric | None:
    """Return the metric of a name in the log, without the prefixes ``critic_`` and ``held_out/``; None where there is none."""
    name = name.removeprefix(HELD_OUT).removeprefix(CRITIC)
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


@cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    named = [item for _, metrics in SECTIONS.values() for item in metrics.items()]
    return [(re.compile(re.sub(r"<\w+>", ".+", name)), metric) for name, metric in sorted(named, key=lambda item: "<" in item[0])]


def metrics_markdown() -> str:
    """Return docs/metrics.md: one table for each section, with name, reduction, unit and meaning."""
    lines = [INTRODUCTION]
    for title, (sentence, metrics) in SECTIONS.items():
        lines += [f"## {title}", "", sentence, "", "| metric | a step's value | unit | meaning |", "|---|---|---|---|"]
        for name, metric in metrics.items():
            cells = (f"`{name}`", metric.reduction.value, metric.unit, metric.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(metrics_markdown())
