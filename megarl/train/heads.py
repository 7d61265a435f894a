"""From the last stage's hidden states to what an engine computes for each trained token."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megarl.config.schema import RoleConfig
from megarl.models.build import CausalLM
from megarl.parallel.layout import Layout
from megarl.parallel.logprobs import vocab_parallel_logprobs
from megarl.train.micro_batch import MicroBatch


class Head(Protocol):
    """Works on hidden states [tokens, 1, hidden size]; with sequence parallelism a tp rank has its share of the tokens."""

    @property
    def num_outputs(self) -> int:
        """How many tensors it gives."""

    def __call__(self, hidden: Tensor, chunk: CausalLM, micro_batch: MicroBatch) -> tuple[Tensor, ...]:
        """Float32 [trained tokens] each, differentiable, equal on all tp ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbHead:
    """Log-probabilities and entropies (nats) of the micro-batch's targets.

    Attributes:
        role: sizes.
        layout: this rank's place.
        vocabulary_size: without Megatron's padding.
        temperature: softmax temperature.
    """

    role: RoleConfig
    layout: Layout
    vocabulary_size: int
    temperature: float
    num_outputs: ClassVar[int] = 2

    def __call__(self, hidden: Tensor, chunk: CausalLM, micro_batch: MicroBatch) -> tuple[Tensor, ...]:
        """Logits exist for one chunk of tokens at a time."""
        tp_group = self.layout.groups.tp
        if self.role.parallel.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=tp_group)
        return vocab_parallel_logprobs(
            hidden[:, 0][micro_batch.rows],
            chunk.output_weight(),
            micro_batch.targets,
            vocabulary_size=self.vocabulary_size,
            temperature=self.temperature,
            chunk_tokens=self.role.logprob_chunk_tokens,
            group=tp_group,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHead:
    """The value before each of the micro-batch's targets, computed in float32 whatever the type of the model.

    Attributes:
        role: sizes.
        layout: this rank's place.
    """

    role: RoleConfig
    layout: Layout
    num_outputs: ClassVar[int] = 1

    def __call__(self, hidden: Tensor, chunk: CausalLM, micro_batch: MicroBatch) -> tuple[Tensor, ...]:
        """Compute all values on every tp rank, so that each has the whole gradient of the hidden states already."""
        if self.role.parallel.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.layout.groups.tp
            )
        return (torch.mv(hidden[:, 0][micro_batch.rows].float(), chunk.output_weight()[0].float()),)
