"""Preference pairs: packed for the model that is trained, and what it says of held-out ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.objectives import ObjectiveFunction, select_tokens
from megarl.algorithms.preferences import build_pair_objective
from megarl.algorithms.sequences import SequenceTokens, sequence_numbers, trained_lengths
from megarl.algorithms.step_metrics import BatchMetrics, batch_metrics, combined
from megarl.config.schema import Config
from megarl.data.packing import pack_pairs, with_scored_ends
from megarl.data.sampler import build_evaluation_pairs
from megarl.data.template import PreferencePair
from megarl.data.tokenizer import run_tokenizer
from megarl.loop.main_rank import broadcast_batch, from_main_rank, on_main_rank
from megarl.metrics import HELD_OUT
from megarl.train.learner import Learner
from megarl.train.roles import Reference
from megarl.types import PackedBatch


def pack_for(config: Config, pairs: Sequence[PreferencePair]) -> PackedBatch:
    """Pack the pairs one after the other; for a reward model all that counts of a response is the score at its last token."""
    packed = pack_pairs(pairs)
    return with_scored_ends(packed) if config.trains_reward_model else packed


class HeldOutPairs:
    """The pairs of ``evaluation.data``, which rank 0 reads; every rank must build it and call ``evaluate``.

    Args:
        config: the run.
        learner: that is evaluated.
        reference: that the loss compares with, if any. It does not change, so each pair is computed once.
    """

    def __init__(self, config: Config, learner: Learner, reference: Reference | None) -> None:
        self._config = config
        self._learner = learner
        self._reference = reference
        self._objective = build_pair_objective(config)
        self._pairs: Sequence[PreferencePair] = on_main_rank(lambda: build_evaluation_pairs(config, run_tokenizer(config))) or ()
        self._num_pairs = from_main_rank(lambda: len(self._pairs))
        self._reference_logprobs: dict[int, Tensor | None] = {}

    def evaluate(self) -> dict[str, float]:
        """Return means over all pairs of what training reports of its own, as ``held_out/...``; equal on all ranks.

        As many pairs are in memory at a time as in a training step.
        """
        parts: list[BatchMetrics] = []
        size = self._config.preference.pairs_per_step
        for first in range(0, self._num_pairs, size):
            pairs = self._pairs[first : first + size]
            packed = broadcast_batch(pack_for(self._config, pairs) if pairs else None, PackedBatch)
            if first not in self._reference_logprobs:
                self._reference_logprobs[first] = (
                    None if self._reference is None else self._reference.engine.forward_only(packed)[0]
                )
            outputs = self._learner.engine.forward_only(packed)
            parts.append(pair_metrics(packed, outputs, self._reference_logprobs[first], self._objective))
        return {f"{HELD_OUT}{name}": value for name, value in combined(parts).items()}


def pair_metrics(
    packed: PackedBatch, outputs: Sequence[Tensor], reference_logprobs: Tensor | None, objective: ObjectiveFunction
) -> BatchMetrics:
    """Compute what an objective reports of a whole batch of pairs; ``outputs`` are the model's, each float32 [num_tokens]."""
    trained = packed.loss_mask.nonzero()[:, 0]
    sequences = SequenceTokens(
        numbers=sequence_numbers(packed.cu_seqlens)[trained],
        lengths=trained_lengths(packed.loss_mask, packed.cu_seqlens),
        sum_over_ranks=lambda sums: sums,  # every token is here
    )
    data = select_tokens(build_preference_batch(packed, reference_logprobs), trained, torch.device("cpu"), sequences)
    totals = objective(*(output[trained] for output in outputs), data).metrics
    metrics = batch_metrics({name: float(value) for name, value in totals.items()}, trained.numel())
    return BatchMetrics(metrics=metrics, num_tokens=trained.numel(), num_sequences=packed.num_sequences)
