"""A whole method's loss twice: by megarl on some micro-batches, and by loops over Python floats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import references
from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.objectives import Objective, select_tokens
from megarl.algorithms.sequences import SequenceTokens, sequence_numbers, trained_lengths
from megarl.config.schema import AlgorithmConfig
from megarl.config.schema.algorithm import PRESETS
from megarl.types import TrainBatch
from ragged import GREEDY_LENGTHS, GROUPS, LONGEST, TASKS, Ragged

# every preset; what would wait for later steps (Kimi's length reward) or a higher entropy does not
RUNNABLE = {name: {"preset": name} for name in PRESETS} | {
    "kimi_k1_5": {"preset": "kimi_k1_5", "reward_shaping": {"length_start": 0, "correct_reward": 0.5}},
    "aepo": {"preset": "aepo", "entropy_control": {"low": 0.1, "high": 0.2}},
}


def tokens_of(sequences: Sequence[int], batch: TrainBatch) -> Tensor:
    """Positions of the trained tokens of some sequences."""
    numbers = sequence_numbers(batch.packed.cu_seqlens)
    return (torch.isin(numbers, torch.tensor(list(sequences))) & batch.packed.loss_mask).nonzero()[:, 0]


def objective_of(
    algorithm: Algorithm, batch: TrainBatch, logprobs: Tensor, entropies: Tensor, sequences: Sequence[int]
) -> Objective:
    """The objective of one micro-batch, as the engine calls it on one rank."""
    index = tokens_of(sequences, batch)
    positions = SequenceTokens(
        numbers=sequence_numbers(batch.packed.cu_seqlens)[index],
        lengths=trained_lengths(batch.packed.loss_mask, batch.packed.cu_seqlens),
        sum_over_ranks=lambda values: values,
    )
    data = select_tokens(batch, index, torch.device("cpu"), positions)
    return algorithm.objective(logprobs[index], entropies[index], data)


@dataclass(frozen=True)
class Reference:
    """One update on a whole batch, in loops; ``masks_negative`` is the entropy control's answer."""

    batch: Ragged
    config: AlgorithmConfig
    masks_negative: bool = False

    def trained(self) -> list[list[int]]:
        cut = self.batch.packed.truncated.tolist()
        return [[] if self.config.mask_truncated and cut[i] else one for i, one in enumerate(self.batch.trained)]

    def rewards(self) -> list[float]:
        shaping = self.config.reward_shaping
        plain = self.batch.packed.rewards.tolist()
        lengths = [len(one) for one in self.batch.trained]
        correct = [reward >= shaping.correct_reward for reward in plain]
        rewards = []
        for i, reward in enumerate(plain):
            overlong = references.soft_overlong(lengths[i], LONGEST, shaping.overlong_buffer * LONGEST)
            length = references.kimi_length_reward(i, lengths, correct, GROUPS)
            rewards.append(reward + (overlong if shaping.overlong_buffer > 0 else 0.0) + shaping.length_weight * length)
        return rewards

    def greedy_rewards(self) -> list[float]:
        buffer = self.config.reward_shaping.overlong_buffer * LONGEST
        rewards = self.batch.packed.greedy_rewards.tolist()
        if buffer == 0:
            return rewards
        return [
            reward + references.soft_overlong(GREEDY_LENGTHS[group], LONGEST, buffer)
            for reward, group in zip(rewards, GROUPS, strict=True)
        ]

    def advantages(self) -> list[list[float]]:
        kl, outputs = self.config.kl, self.batch.outputs
        penalties = [
            [-kl.coefficient * float(outputs.old[p] - outputs.reference[p]) if kl.place == "reward" else 0.0 for p in one]
            for one in self.trained()
        ]
        values = [[float(outputs.values[p]) for p in one] for one in self.trained()]
        gae = (values, self.config.gae.discount, self.config.gae.trace_decay)
        advantages = references.token_advantages(
            self.config.advantage,
            self.rewards(),
            penalties,
            GROUPS,
            self.greedy_rewards(),
            *gae,
            tasks=TASKS,
            steps=self.batch.steps(),
            positions=self.trained(),
        )
        if self.config.whiten:
            advantages = references.whitened(advantages)
        if self.masks_negative:
            advantages = [[max(advantage, 0.0) for advantage in sequence] for sequence in advantages]
        return advantages

    def loss(self, logps: Sequence[float], frozen: Sequence[float], entropies: Sequence[float]) -> float:
        """Loss with log-probabilities ``logps`` (by position in the packed batch); see references.surrogate_terms."""
        config, clip = self.config, self.config.clip
        settings = {"low": clip.low, "high": clip.high, "dual": clip.dual or 0.0, "tau": config.mirror_descent_tau}
        old, reference, sampler = (
            values.tolist() for values in (self.batch.outputs.old, self.batch.outputs.reference, self.batch.packed.sampler_logprobs)
        )
        rows = []
        for positions, advantages in zip(self.trained(), self.advantages(), strict=True):
            if not positions:
                rows.append([])
                continue
            own, fixed, olds = ([values[p] for p in positions] for values in (logps, frozen, old))
            terms = references.surrogate_terms(config.surrogate, config.ratio, own, fixed, olds, advantages, settings)
            correction = config.sampler_correction
            if correction.method != "none":
                is_whole = config.surrogate in ("gmpo", "mirror_descent") or config.ratio != "token"
                level = correction.level or ("sequence" if is_whole else "token")
                weights = references.sampler_weight(olds, [sampler[p] for p in positions], correction.method, level, correction.cap)
                terms = [term * weight for term, weight in zip(terms, weights, strict=True)]
            for t, position in enumerate(positions):
                if config.kl.place == "loss":
                    terms[t] += config.kl.coefficient * references.kl(logps[position], reference[position], config.kl.estimator)
                terms[t] -= config.entropy_coefficient * entropies[position]
            rows.append(terms)
        return references.aggregated(config.aggregation, rows, LONGEST)

    def gradient(self, logps: Sequence[float], entropies: Sequence[float]) -> list[float]:
        """Central differences by position in the packed batch; what is under a stop-gradient stays as it is."""
        step = 1e-6
        gradient = [0.0] * len(logps)
        for positions in self.trained():
            for position in positions:
                ends = []
                for sign in (1, -1):
                    moved = list(logps)
                    moved[position] += sign * step
                    ends.append(self.loss(moved, logps, entropies))
                gradient[position] = (ends[0] - ends[1]) / (2 * step)
        return gradient
