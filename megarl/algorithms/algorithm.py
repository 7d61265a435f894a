"""A policy-gradient method at work: its choices resolved to functions, and what it carries from step to step."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms.advantages import ADVANTAGES, Advantage, AdvantageInput, gae, whiten
from megarl.algorithms.batches import split_into_updates
from megarl.algorithms.gae import length_adaptive_trace_decay
from megarl.algorithms.kl import adapted_coefficient, kl_estimate
from megarl.algorithms.objectives import ObjectiveFunction, policy_objective, value_objective
from megarl.algorithms.off_policy import correction_level, sampler_weights, token_staleness
from megarl.algorithms.sequences import sums_per_sequence, trained_lengths
from megarl.algorithms.shaping import length_rewards, masks_negative, soft_overlong_penalties, without_negatives
from megarl.algorithms.surrogates import SURROGATES, Surrogate, SurrogateFunction, SurrogateInput
from megarl.algorithms.values import explained_variance
from megarl.config.checks.algorithm import check_greedy_shaping
from megarl.config.schema import AlgorithmConfig
from megarl.errors import ConfigError, TrainingError
from megarl.types import CriticTokens, PackedBatch, SampledTokens, TokenOutputs, TrainBatch
from megarl.user_functions import import_function


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """What the optimizer steps of one step learn from, and what was seen on the way; equal on every rank."""

    batches: list[TrainBatch]
    metrics: dict[str, float]


class Algorithm:
    """One method. All its work is on tensors that every rank has whole, except ``objective``, which sees one micro-batch.

    Args:
        config: one choice per axis.
        max_new_tokens: longest response allowed.

    Attributes:
        kl_coefficient: β of this step.
        needs_greedy_response: whether each prompt is also answered at temperature 0, for the baseline.

    Raises:
        ConfigError: a function of the user's own cannot be imported, or does not go with the reward shaping.
    """

    def __init__(self, config: AlgorithmConfig, max_new_tokens: int) -> None:
        self._config = config
        self._max_new_tokens = max_new_tokens
        self._advantage = _advantage(config.advantage)
        self.needs_greedy_response = self._advantage.needs_greedy_response
        if self.needs_greedy_response and (lines := list(check_greedy_shaping(config))):
            raise ConfigError(*lines)
        self._surrogate = _surrogate_function(config.surrogate)
        self.kl_coefficient = config.kl.coefficient
        self._masks_negative = False

    def prepare(self, packed: PackedBatch, outputs: TokenOutputs, step: int) -> PreparedStep:
        """Shape rewards, make advantages over the whole step's batch, and cut it into mini-batches.

        Args:
            packed: all responses of the step, whole groups.
            outputs: of the same tokens.
            step: steps done before this one, which is also the version of the policy's weights.
        """
        config = self._config
        metrics: dict[str, float] = {}
        rewards = self._shaped_rewards(packed, step, metrics)
        if outputs.reference is not None and packed.loss_mask.any():
            # of all tokens that this policy sampled, before any are left out of the loss: then the mean is KL(policy || reference)
            divergence = kl_estimate(outputs.old.double(), outputs.reference.double(), "k3")
            metrics["kl_reference"] = float(divergence[packed.loss_mask].mean())
        if config.mask_truncated:
            metrics["masked_truncated_share"] = float(packed.truncated.double().mean())
            kept = ~packed.truncated.repeat_interleave(packed.sequence_lengths)
            packed = replace(packed, loss_mask=packed.loss_mask & kept)
        limit = config.sampler_correction.max_staleness
        if limit is not None:
            is_stale = token_staleness(packed, step) > limit
            metrics["stale_tokens_masked"] = float(is_stale.sum())
            packed = replace(packed, loss_mask=packed.loss_mask & ~is_stale)
        inputs = self._advantage_input(packed, outputs, rewards, metrics)
        sampled = SampledTokens(
            old_logprobs=outputs.old,
            advantages=self._advantages(inputs, outputs, metrics),
            critic=self._critic_tokens(inputs, metrics),
            sampler_weights=self._sampler_weights(packed, outputs, metrics),
        )
        batches = split_into_updates(
            packed,
            outputs.reference,
            sampled,
            num_updates=config.updates_per_step,
            aggregation=config.aggregation,
            max_new_tokens=self._max_new_tokens,
        )
        return PreparedStep(batches=batches, metrics=metrics)

    @property
    def objective(self) -> ObjectiveFunction:
        """The loss of some tokens of a prepared batch, with this step's β: ``policy_objective``."""
        return partial(policy_objective, config=self._config, surrogate=self._surrogate, kl_coefficient=self.kl_coefficient)

    @property
    def value_objective(self) -> ObjectiveFunction:
        """The critic's loss of the same tokens: ``objectives.value_objective``."""
        return partial(value_objective, clip_range=self._config.value_clip)

    def finish_step(self, packed: PackedBatch, outputs: TokenOutputs) -> None:
        """Adapt β to the KL that the step began with.

        To be called only after steps in which the policy has moved: β is to answer for what it has done.
        """
        kl = self._config.kl
        if kl.target is not None and outputs.reference is not None:
            penalty = kl_estimate(outputs.old, outputs.reference, "k1") * packed.loss_mask
            measured = float(sums_per_sequence(penalty, packed.cu_seqlens).mean())
            self.kl_coefficient = adapted_coefficient(self.kl_coefficient, measured, kl.target, kl.adaptation_rate)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {"kl_coefficient": self.kl_coefficient, "masks_negative": self._masks_negative}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``; a coefficient that is not adapted stays the config's."""
        if self._config.kl.target is not None:
            self.kl_coefficient = state["kl_coefficient"]
        self._masks_negative = state["masks_negative"]

    def _shaped_rewards(self, packed: PackedBatch, step: int, metrics: dict[str, float]) -> Tensor:
        shaping = self._config.reward_shaping
        rewards = packed.rewards
        lengths = trained_lengths(packed.loss_mask, packed.cu_seqlens)
        if shaping.overlong_buffer > 0:
            penalties = self._overlong_penalties(lengths)
            metrics["overlong_penalty_mean"] = float(penalties.mean())
            rewards = rewards + penalties
        if shaping.length_weight > 0 and step >= shaping.length_start:
            correct = packed.rewards >= shaping.correct_reward if packed.correct is None else packed.correct
            bonus = shaping.length_weight * length_rewards(lengths, correct, packed.group_ids)
            metrics["length_reward_mean"] = float(bonus.mean())
            rewards = rewards + bonus
        return rewards

    def _shaped_greedy_rewards(self, packed: PackedBatch) -> Tensor:
        """Shape the greedy responses' rewards as the sampled ones'; a length reward is refused beside a greedy baseline."""
        if self._config.reward_shaping.overlong_buffer == 0:
            return packed.greedy_rewards
        return packed.greedy_rewards + self._overlong_penalties(packed.greedy_lengths)

    def _overlong_penalties(self, lengths: Tensor) -> Tensor:
        buffer = self._config.reward_shaping.overlong_buffer * self._max_new_tokens
        return soft_overlong_penalties(lengths, self._max_new_tokens, buffer)

    def _advantage_input(
        self, packed: PackedBatch, outputs: TokenOutputs, rewards: Tensor, metrics: dict[str, float]
    ) -> AdvantageInput:
        config = self._config
        token_rewards = torch.zeros_like(outputs.old)
        if config.kl.place == "reward":
            assert outputs.reference is not None
            token_rewards = -self.kl_coefficient * kl_estimate(outputs.old, outputs.reference, config.kl.estimator)
        if config.kl.place != "none":
            metrics["kl_coefficient"] = self.kl_coefficient
        return AdvantageInput(
            rewards=rewards,
            greedy_rewards=self._shaped_greedy_rewards(packed),
            token_rewards=token_rewards * packed.loss_mask,
            step_rewards=packed.step_rewards,
            group_ids=packed.group_ids,
            task_ids=packed.task_ids,
            cu_seqlens=packed.cu_seqlens,
            loss_mask=packed.loss_mask,
            values=outputs.values,
            discount=config.gae.discount,
            trace_decay=self._trace_decay(packed),
        )

    def _trace_decay(self, packed: PackedBatch) -> float | Tensor:
        settings = self._config.gae
        if settings.length_adaptive_alpha is None:
            return settings.trace_decay
        lengths = trained_lengths(packed.loss_mask, packed.cu_seqlens)
        return length_adaptive_trace_decay(lengths, settings.length_adaptive_alpha)

    def _critic_tokens(self, inputs: AdvantageInput, metrics: dict[str, float]) -> CriticTokens | None:
        """Return the critic's targets: V plus advantages with the critic's own λ."""
        if inputs.values is None:
            return None
        value_decay = self._config.gae.value_trace_decay
        decay = inputs.trace_decay if value_decay is None else value_decay
        returns = gae(replace(inputs, trace_decay=decay)) + inputs.values
        mask = inputs.loss_mask
        if mask.any():
            metrics["explained_variance"] = float(explained_variance(inputs.values[mask], returns[mask]))
            metrics["return_mean"] = float(returns[mask].double().mean())
        return CriticTokens(old_values=inputs.values, returns=returns)

    def _advantages(self, inputs: AdvantageInput, outputs: TokenOutputs, metrics: dict[str, float]) -> Tensor:
        config = self._config
        advantages = self._advantage(inputs)
        if not (advantages.shape == outputs.old.shape and advantages.isfinite().all()):
            raise TrainingError(
                f"algorithm.advantage {config.advantage}: gave {_described(advantages)} and {outputs.old.numel()} finite numbers, "
                "one for each token, are needed; check the function and the rewards"
            )
        if config.whiten:
            advantages = whiten(advantages, inputs.loss_mask)
        if config.entropy_control is not None:
            control = config.entropy_control
            if inputs.loss_mask.any():
                entropy = float(outputs.entropies[inputs.loss_mask].double().mean())
                self._masks_negative = masks_negative(entropy, self._masks_negative, control.low, control.high)
            metrics["negatives_masked"] = float(self._masks_negative)
            advantages = without_negatives(advantages) if self._masks_negative else advantages
        return advantages

    def _sampler_weights(self, packed: PackedBatch, outputs: TokenOutputs, metrics: dict[str, float]) -> Tensor | None:
        correction = self._config.sampler_correction
        if correction.method == "none":
            return None
        weights = sampler_weights(
            outputs.old,
            packed.sampler_logprobs,
            packed.cu_seqlens,
            packed.loss_mask,
            method=correction.method,
            level=correction_level(self._config),
            cap=correction.cap,
        )
        if packed.loss_mask.any():
            metrics["sampler_weight_mean"] = float(weights[packed.loss_mask].double().mean())
        return weights


def _advantage(name: str) -> Advantage:
    if ":" not in name:
        return ADVANTAGES[name]
    function = import_function(name, "algorithm.advantage")
    return function if isinstance(function, Advantage) else Advantage(function=function, formula=name)


def _surrogate_function(name: str) -> SurrogateFunction:
    if ":" not in name:
        return SURROGATES[name].function
    function = import_function(name, "algorithm.surrogate")

    def checked(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
        surrogate = function(inputs, config)
        if not (isinstance(surrogate, Surrogate) and surrogate.loss.shape == inputs.logprobs.shape):
            given = _described(surrogate.loss) if isinstance(surrogate, Surrogate) else type(surrogate).__name__
            raise TrainingError(
                f"algorithm.surrogate {name}: gave {given}; return megarl.algorithms.surrogates.Surrogate with a loss for "
                f"each of the {inputs.logprobs.numel()} tokens"
            )
        return surrogate

    return checked


def _described(values: Tensor) -> str:
    return f"a tensor of shape {list(values.shape)} with {int(values.isfinite().sum())} finite numbers"
