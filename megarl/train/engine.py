"""The training engine: forward, forward-backward and optimizer step of one model in one layout."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.algorithms.objectives import Objective, ObjectiveFunction, select_tokens
from megarl.algorithms.sequences import SequenceTokens, sequence_numbers, trained_lengths
from megarl.algorithms.step_metrics import EXTREMES, batch_metrics
from megarl.config.schema import RoleConfig
from megarl.data.packing import plan_group_micro_batches, plan_micro_batches
from megarl.models.build import CausalLM
from megarl.models.flops import sequence_flops
from megarl.parallel.layout import Layout
from megarl.parallel.logprobs import sum_over_group
from megarl.parallel.megatron_fixes import PipelineCommunicator
from megarl.train.heads import Head
from megarl.train.micro_batch import MicroBatch, build_micro_batch
from megarl.train.offload import ActivationOffload, Offloaded
from megarl.types import PackedBatch, TrainBatch

LossParts = tuple[Tensor, Tensor, Any]  # loss, tokens that megatron-core would divide by, and what is kept of a micro-batch
LossFunction = Callable[[MicroBatch, CausalLM, Tensor], LossParts]  # of a micro-batch, the last chunk and its hidden states


class TrainingEngine:
    """One model over the ranks of its layout. The other ranks of the world have one too, without model.

    Args:
        chunks: this rank's model chunks with their weights; none outside the role.
        role: layout and sizes.
        layout: this rank's place.
        head: what it computes for each trained token.
        trainable: build gradient buffers; a frozen model has none.

    Attributes:
        weights: the parameters, which may be in host memory.
    """

    def __init__(self, chunks: list[CausalLM], role: RoleConfig, layout: Layout, *, head: Head, trainable: bool) -> None:
        self.role = role
        self.layout = layout
        self.chunks = chunks
        self.device = torch.device(torch.cuda.current_device())
        self._head = head
        self._no_tokens = torch.zeros((), dtype=torch.int, device=self.device)  # objectives hold the normaliser
        self.ddp_chunks: list[DistributedDataParallel] = self._wrap() if trainable and layout.is_member else []
        self.weights = Offloaded(self._parameters, "changing" if trainable else "constant", enabled=role.offload == "all")
        self._saving: Callable[[], AbstractContextManager[None]] = nullcontext
        if trainable and role.offload_activations:
            self._saving = ActivationOffload(self._parameters).saving

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter.data for chunk in self.chunks for parameter in chunk.parameters())

    def gradient_buffers(self) -> Iterator[Tensor]:
        """Yield megatron-core's gradient buffers, for all parameters of this rank."""
        for chunk in self.ddp_chunks:
            yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))

    def _wrap(self) -> list[DistributedDataParallel]:
        parallel, config = self.role.parallel, self.chunks[0].config
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_gradient_reduce,
            grad_reduce_in_fp32=True,
            average_in_collective=False,
        )
        wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0, pg_collection=self.layout.groups)
            for number, chunk in enumerate(self.chunks)
        ]
        if parallel.overlap_gradient_reduce:
            no_sync = [chunk.no_sync for chunk in wrapped]
            config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        # the objective's weights hold the global normaliser: gradients are summed and never divided by a token count
        config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(model, None, **kwargs)
        return wrapped

    def forward_only(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Compute what the head gives for every trained token, without gradients; collective over the world.

        Returns:
            For each of the head's outputs a float32 CPU tensor [num_tokens], 0 where ``loss_mask`` is False; equal on all ranks.
        """
        return self.share_outputs(self.compute_outputs(batch))

    def share_outputs(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Give the outputs of the role's ranks to all ranks of the world, as ``forward_only`` returns them."""
        if not self.layout.is_whole_world:
            dist.broadcast(outputs, src=self.layout.ranks.start)
        return tuple(outputs)

    def compute_outputs(self, batch: PackedBatch) -> Tensor:
        """Compute the role's part of ``forward_only``, without communication beyond its ranks.

        Returns:
            float32 [outputs, num_tokens] on the CPU; 0 on ranks outside the role.
        """
        values = torch.zeros(self._head.num_outputs, batch.token_ids.numel(), device=self.device)
        if not self.layout.is_member:
            return values.cpu()

        def outputs_of(micro_batch: MicroBatch, chunk: CausalLM, hidden: Tensor) -> LossParts:
            outputs = self._head(hidden, chunk, micro_batch)
            return outputs[0].sum(), self._no_tokens, (micro_batch.index, torch.stack(outputs))

        with torch.no_grad(), self.weights.on_device():
            found = self._schedule(batch, self.chunks, outputs_of, forward_only=True)()
        for index, rows in found:
            values[:, index.to(self.device)] = rows
        self._sum_over_replicas(values)
        return values.cpu()

    def forward_backward(self, batch: TrainBatch, objective: ObjectiveFunction) -> dict[str, float]:
        """Accumulate the gradient of the objective over the whole batch into the gradient buffers; on the role's ranks only.

        Weights and gradient buffers must be on the device.

        Returns:
            The objective's metrics, reduced over the batch; equal on all ranks of the role.
        """
        packed = batch.packed
        numbers = sequence_numbers(packed.cu_seqlens)
        lengths = trained_lengths(packed.loss_mask, packed.cu_seqlens).to(self.device)

        def loss_of(micro_batch: MicroBatch, chunk: CausalLM, hidden: Tensor) -> LossParts:
            sequences = SequenceTokens(
                numbers=numbers[micro_batch.index].to(self.device),
                lengths=lengths,
                sum_over_ranks=partial(sum_over_group, group=self.layout.groups.cp),
            )
            data = select_tokens(batch, micro_batch.index, self.device, sequences)
            result = objective(*self._head(hidden, chunk, micro_batch), data)
            return result.loss, self._no_tokens, result

        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        schedule = self._schedule(packed, self.ddp_chunks, loss_of, forward_only=False, keeps_groups=batch.keeps_groups)
        results: list[Objective] = schedule()
        return self._reduce_metrics(results, int(packed.loss_mask.sum()))

    def _schedule(
        self,
        batch: PackedBatch,
        models: Sequence[torch.nn.Module],
        loss_of: LossFunction,
        *,
        forward_only: bool,
        keeps_groups: bool = False,
    ) -> Callable[[], list[Any]]:
        """Plan micro-batches and bind megatron-core's schedule to them.

        Called, it sends the batch through the models and returns what ``loss_of`` kept of each micro-batch (last stage only).
        """
        parallel, config = self.role.parallel, self.chunks[0].config
        multiple, flops = self.layout.sequence_multiple, sequence_flops(config)
        lengths = [-(-length // multiple) * multiple for length in batch.sequence_lengths.tolist()]
        make_plan = partial(plan_group_micro_batches, batch.group_ids.tolist()) if keeps_groups else plan_micro_batches
        plan = make_plan(
            lengths,
            [flops.of(length) for length in lengths],
            num_replicas=self.layout.dp,
            max_tokens=self.role.max_tokens_per_micro_batch,
            # the interleaved schedule works through micro-batches in rounds of pp
            count_multiple=parallel.pp if parallel.vpp > 1 else 1,
        )[self.layout.dp_rank]

        def micro_batches() -> Iterator[MicroBatch]:
            for sequences in plan:
                yield build_micro_batch(batch, sequences, self.layout, self.device)

        schedule = get_forward_backward_func(pp_size=parallel.pp, vp_size=parallel.vpp if parallel.vpp > 1 else None)
        interleaved = len(models) > 1
        return partial(
            schedule,
            forward_step_func=partial(self._forward_step, loss_of),
            data_iterator=[micro_batches() for _ in models] if interleaved else micro_batches(),
            model=list(models) if interleaved else models[0],
            num_microbatches=len(plan),
            seq_length=1,  # lengths differ and are sent along
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=PipelineCommunicator(pp_group=self.layout.groups.pp, config=config),
            pg_collection=self.layout.groups,
        )

    def _forward_step(self, loss_of: LossFunction, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        """Compute a stage's hidden states of a micro-batch; the schedule gives those of the last stage to the function returned."""
        micro_batch = next(batches)
        with self._saving():
            hidden = model(micro_batch.input_ids, micro_batch.position_ids, None, packed_seq_params=micro_batch.packed_seq_params)
        chunk = model.module if isinstance(model, DistributedDataParallel) else model
        return hidden, partial(loss_of, micro_batch, chunk)

    def _sum_over_replicas(self, values: Tensor, operation: object = dist.ReduceOp.SUM) -> None:
        """Reduce over data and context parallel ranks of the last stage, then give the result to every stage."""
        groups = self.layout.groups
        if self.layout.is_last_stage:
            dist.all_reduce(values, op=operation, group=groups.dp_cp)
        if groups.pp.size() > 1:
            dist.broadcast(values, src=self.layout.last_stage_rank, group=groups.pp)

    def _reduce_metrics(self, results: list[Objective], num_tokens: int) -> dict[str, float]:
        names = [sorted(results[0].metrics) if results else []]
        if self.layout.groups.pp.size() > 1:
            dist.broadcast_object_list(names, src=self.layout.last_stage_rank, group=self.layout.groups.pp)
        sum_names = [name for name in names[0] if name not in EXTREMES]
        extreme_names = [name for name in names[0] if name in EXTREMES]
        sums = torch.zeros(len(sum_names), dtype=torch.float64, device=self.device)
        signs = torch.tensor([EXTREMES[name] for name in extreme_names], dtype=torch.float64, device=self.device)
        extremes = torch.full_like(signs, -math.inf)  # a minimum is a maximum of negative values
        for result in results:
            sums += torch.stack([result.metrics[name].double() for name in sum_names])
            if extreme_names:
                own = torch.stack([result.metrics[name].double() for name in extreme_names])
                extremes = torch.maximum(extremes, signs * own)
        self._sum_over_replicas(sums)
        self._sum_over_replicas(extremes, dist.ReduceOp.MAX)
        values = [*sums.tolist(), *(signs * extremes).tolist()]
        return batch_metrics(dict(zip((*sum_names, *extreme_names), values, strict=True)), num_tokens)
