"""The RL method, and its presets: YAML files, each a complete choice on every axis of one method."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import model_validator

from megarl.config import yaml_text
from megarl.config.names import Name
from megarl.section import Section, key

PRESETS_FOLDER = Path(__file__).parent.parent / "presets"
PRESETS = tuple(sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml")))
ADVANTAGES = (
    "group_mean_std",
    "group_mean",
    "leave_one_out",
    "group_mean_batch_std",
    "batch_mean_std",
    "reward_to_go",
    "reward_to_go_batch_mean",
    "gae",
    "greedy_baseline",
    "process_rewards",
    "group_mean_task_std",
)
SURROGATES = ("ppo_clip", "gmpo", "cispo", "policy_gradient", "mirror_descent")


class ClipConfig(Section):
    """The clip range of the importance ratio; policy_gradient and mirror_descent do not clip."""

    low: float = key(0.2, "-", "The ratio is clipped below at 1 - low (gmpo: at e^-low).", ge=0, le=1)
    high: float = key(0.2, "-", "The ratio is clipped above at 1 + high (gmpo: at e^high).", ge=0)
    dual: float | None = key(
        None, "-", "For ppo_clip: the loss of a token with a negative advantage stays below dual times its size.", gt=1
    )


class KLConfig(Section):
    """The KL penalty against the reference model."""

    place: Literal["none", "reward", "loss"] = key(
        "none",
        "-",
        "No penalty and no reference model, a part of each token's reward, or a term of the loss.",
    )
    estimator: Literal["k1", "k2", "k3"] = key("k3", "-", "Schulman's estimator of KL(policy || reference) per token.")
    coefficient: float = key(0.0, "-", "Weight of the penalty (beta); with a target, its value at the first step.", ge=0)
    target: float | None = key(
        None, "nats per response", "The coefficient is adapted after each step to hold this KL; fixed when not given.", gt=0
    )
    adaptation_rate: float = key(0.1, "-", "With a target: K of the adaptation, beta times (1 + K error) after each step.", gt=0)


class SamplerCorrectionConfig(Section):
    """Importance weights for the gap between the sampler's log-probabilities and the trainer's."""

    method: Literal["none", "tis", "mis"] = key(
        "none", "-", "No correction; tis: ratios above the cap count as the cap; mis: tokens above the cap are left out."
    )
    level: Literal["token", "sequence"] | None = key(
        None,
        "-",
        "One ratio for each token, or the product over the response; when not given sequence for losses and ratios of whole "
        "responses (gmpo, mirror_descent, ratio sequence and sequence_token), else token.",
    )
    cap: float = key(2.0, "-", "Largest trainer / sampler probability ratio.", gt=0)
    max_staleness: int | None = key(
        None,
        "weight versions",
        "Tokens sampled by weights more than so many updates old are left out of the loss; none are when not given.",
        ge=0,
    )


class EntropyControlConfig(Section):
    """AEPO (arXiv 2512.12967): responses with negative advantages are left out while the entropy is too high."""

    low: float = key(..., "nats", "They are taken back in once the mean token entropy is below this.", ge=0)
    high: float = key(..., "nats", "They are left out once the mean token entropy is above this.", gt=0)


class RewardShapingConfig(Section):
    """What is added to each response's reward before advantages are made."""

    overlong_buffer: float = key(
        0.0,
        "share of rollout.max_new_tokens",
        "Soft overlong punishment: over this last share of the longest response the reward falls by up to 1; 0 means none.",
        ge=0,
        le=1,
    )
    length_weight: float = key(
        0.0,
        "-",
        "Weight of Kimi k1.5's length reward, which prefers the shorter of a group's correct responses; 0 means none.",
        ge=0,
    )
    length_start: int = key(0, "steps", "The length reward counts after this many steps.", ge=0)
    correct_scorers: list[str] = key(
        list,
        "-",
        "For the length reward: names of the scorers that say whether a response is correct; when empty those of type exact, math, "
        "reasoning_gym and document_qa, or a task's only one.",
    )
    correct_reward: float = key(
        1.0, "score", "For the length reward: a response to which one of these scorers gives at least this is correct."
    )


class GAEConfig(Section):
    """Generalised advantage estimation (arXiv 1506.02438), for advantage gae."""

    discount: float = key(1.0, "-", "Gamma: what a reward one token later is worth.", gt=0, le=1)
    trace_decay: float = key(
        0.95, "-", "Lambda: 1 takes whole returns, 0 the error of one token; unused with length_adaptive_alpha.", ge=0, le=1
    )
    value_trace_decay: float | None = key(
        None, "-", "Lambda of the critic's targets (VAPO, arXiv 2504.05118, uses 1); the advantages' when not given.", ge=0, le=1
    )
    length_adaptive_alpha: float | None = key(
        None, "-", "Lambda of a response of l tokens is 1 - 1 / (alpha l) (VAPO uses 0.05); trace_decay when not given.", gt=0
    )


class AlgorithmConfig(Section):
    """A policy-gradient method as one choice per axis; the defaults are GRPO (arXiv 2402.03300)."""

    preset: Annotated[str, Name(PRESETS)] | None = key(
        None, "-", "A method's choices (megarl/config/presets); keys given beside it go before the preset's."
    )
    advantage: Annotated[str, Name(ADVANTAGES, or_function=True)] = key("group_mean_std", "-", "Baseline and scale of the reward.")
    whiten: bool = key(False, "-", "Shift and scale advantages to mean 0 and variance 1 over all response tokens of the step.")
    ratio: Literal["token", "sequence", "sequence_token"] = key(
        "token", "-", "Importance ratio of each token, of the whole response (geometric mean), or the latter with token gradients."
    )
    surrogate: Annotated[str, Name(SURROGATES, or_function=True)] = key("ppo_clip", "-", "Policy loss of each token.")
    clip: ClipConfig = key(ClipConfig, "-", "Clipping of the ratio.")
    mirror_descent_tau: float = key(0.1, "-", "For mirror_descent: weight of the squared log-ratio of a response.", gt=0)
    gae: GAEConfig = key(GAEConfig, "-", "Settings of advantage gae.")
    value_clip: float = key(
        0.2, "-", "For advantage gae: values that move further from those before the step have no gradient towards it.", gt=0
    )
    aggregation: Literal["sequence_mean", "token_mean", "token_sum_over_constant", "sequence_sum"] = key(
        "sequence_mean",
        "-",
        "Over the global batch: mean of each response's token mean, mean over all tokens, token sum / (responses times "
        "rollout.max_new_tokens), or mean of each response's token sum.",
    )
    kl: KLConfig = key(KLConfig, "-", "KL penalty.")
    entropy_coefficient: float = key(0.0, "-", "Weight of the entropy bonus.", ge=0)
    entropy_control: EntropyControlConfig | None = key(None, "-", "Negative samples by entropy; all are used when not given.")
    sampler_correction: SamplerCorrectionConfig = key(SamplerCorrectionConfig, "-", "Weights for sampler and trainer that differ.")
    reward_shaping: RewardShapingConfig = key(RewardShapingConfig, "-", "Rewards for length.")
    mask_truncated: bool = key(False, "-", "Leave responses cut at rollout.max_new_tokens out of the loss (overlong filtering).")
    dynamic_sampling: bool = key(
        False,
        "-",
        "Drop groups whose rewards, the greedy response's included, are all equal and sample others in their place (DAPO, arXiv "
        "2503.14476).",
    )
    max_sampling_waves: int = key(
        10, "waves", "Dynamic sampling gives up with an error after this many waves of prompts for one step.", ge=1
    )
    over_sampling: float = key(
        1.0,
        "-",
        "Each wave of dynamic sampling asks for this many times the prompts that are missing; groups beyond the step's wait "
        "for the next steps.",
        ge=1,
    )
    max_surplus_age: int = key(1, "steps", "A group that waited longer than this is dropped; 0 keeps none for later steps.", ge=0)
    updates_per_step: int = key(1, "optimizer steps", "Mini-batches that the rollouts of one step are split into, in order.", ge=1)

    @property
    def has_critic(self) -> bool:
        """Whether a critic learns."""
        return self.advantage == "gae"

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, section: object) -> object:
        return _with_preset(section)


def _with_preset(section: object) -> object:
    """Return the algorithm section as YAML gives it, with its preset's choices under its own keys.

    A section without a preset, or with an unknown one, is returned as it is: the schema reports the latter.
    """
    name = section.get("preset") if isinstance(section, dict) else None
    return yaml_text.merged(_preset(name), section) if name in PRESETS else section


@lru_cache
def _preset(name: str) -> object:
    return yaml_text.parse((PRESETS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
