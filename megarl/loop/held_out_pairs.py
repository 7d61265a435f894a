"""What a policy in training says of held-out preference pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.objectives import finish_metrics, select_tokens
from megarl.algorithms.preferences import preference_objective
from megarl.algorithms.sequences import SequenceTokens, sequence_numbers, trained_lengths
from megarl.config.schema import Config, PreferenceConfig
from megarl.data.packing import pack_pairs
from megarl.data.sampler import build_evaluation_pairs
from megarl.data.template import PreferencePair, load_tokenizer
from megarl.loop.broadcast import broadcast_batch, broadcast_value
from megarl.train.roles import Policy, Reference, is_main_rank
from megarl.types import PackedBatch


class HeldOutPairs:
    """The pairs of ``evaluation.data``, which rank 0 reads; every rank must build it and call ``evaluate``.

    Args:
        config: the run.
        policy: that is evaluated.
        reference: that the loss compares with, if any. It does not change, so it scores each pair once.
    """

    def __init__(self, config: Config, policy: Policy, reference: Reference | None) -> None:
        self._config = config.preference
        self._policy = policy
        self._reference = reference
        self._pairs: Sequence[PreferencePair] = ()
        if is_main_rank():
            tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
            self._pairs = build_evaluation_pairs(config, tokenizer)
        self._num_pairs: int = broadcast_value(len(self._pairs))
        self._reference_logprobs: dict[int, Tensor | None] = {}

    def evaluate(self) -> dict[str, float]:
        """Means over all pairs of what training reports of its own, with ``held_out/`` in front; equal on all ranks.

        As many pairs are in memory at a time as in a training step.
        """
        means: dict[str, float] = {}
        for first in range(0, self._num_pairs, self._config.pairs_per_step):
            pairs = self._pairs[first : first + self._config.pairs_per_step]
            packed = broadcast_batch(pack_pairs(pairs) if is_main_rank() else None, PackedBatch)
            if first not in self._reference_logprobs:
                self._reference_logprobs[first] = None if self._reference is None else self._reference.engine.score(packed)[0]
            logprobs, entropies = self._policy.engine.score(packed)
            share = packed.num_sequences / 2 / self._num_pairs
            metrics = pair_metrics(packed, logprobs, entropies, self._reference_logprobs[first], self._config)
            for name, value in metrics.items():
                means[f"held_out/{name}"] = means.get(f"held_out/{name}", 0.0) + share * value
        return means


def pair_metrics(
    packed: PackedBatch, logprobs: Tensor, entropies: Tensor, reference_logprobs: Tensor | None, config: PreferenceConfig
) -> dict[str, float]:
    """Means over the pairs of a batch; log-probabilities and entropies are float32 [num_tokens]."""
    trained = packed.loss_mask.nonzero()[:, 0]
    sequences = SequenceTokens(
        numbers=sequence_numbers(packed.cu_seqlens)[trained],
        lengths=trained_lengths(packed.loss_mask, packed.cu_seqlens),
        sum_over_ranks=lambda sums: sums,  # every token is here
    )
    data = select_tokens(build_preference_batch(packed, reference_logprobs), trained, torch.device("cpu"), sequences)
    sums = preference_objective(logprobs[trained], entropies[trained], data, config=config).sums
    return finish_metrics({name: float(value) for name, value in sums.items()}, {}, trained.numel())
