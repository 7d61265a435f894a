"""What a rank holds for the whole run: weights, gradient buffers, optimizer state, the batch and the embedded engine."""

import math
from collections import Counter
from dataclasses import dataclass

from megarl.config.schema import Config, ParallelConfig
from megarl.errors import ConfigError
from megarl.families.base.architecture import Architecture
from megarl.families.base.weight_rules import Kind, Layers
from megarl.memory.activations import FLOAT, INT
from megarl.parallel.axis_sizes import AxisSizes
from megarl.weights.mapping import WeightMap
from megarl.weights.shards import Parameter

PARAMETER_ALIGNMENT = 64  # elements, of where a parameter begins in the distributed optimizer's buffers (megatron-core)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Elements of a rank's parameters.

    Attributes:
        dense: of all but experts, shared out over data and context parallel ranks by the distributed optimizer.
        experts: of routed experts, shared out over expert data parallel ranks.
        buffers: of what no gradient reaches, float32.
        largest: of the largest parameter.
    """

    dense: int
    experts: int
    buffers: int
    largest: int


def elements(weight_map: WeightMap, sizes: AxisSizes, *, aligned: bool) -> tuple[Elements, ...]:
    """Count the elements of the parameters on each pipeline stage.

    Args:
        aligned: with the gaps of the distributed optimizer's buffers.

    Raises:
        ConfigError: ep does not divide the experts, or the layers cannot be shared out.
    """
    architecture = weight_map.architecture
    if architecture.num_experts % sizes.ep:
        raise ConfigError(f"ep {sizes.ep} does not divide the model's {architecture.num_experts} experts")
    stages = sizes.pipeline_rank_of_layers(architecture.num_layers)
    own_experts = architecture.num_experts // sizes.ep
    counted: dict[tuple[object, ...], int] = {}
    counts = [Counter[str]() for _ in range(sizes.pp)]
    largest = [0] * sizes.pp
    for parameter in weight_map.parameters.values():
        is_here_already = parameter.is_copy and sizes.pp == 1
        if is_here_already or (parameter.expert is not None and parameter.expert >= own_experts):
            continue
        key = (parameter.kind, parameter.shapes, parameter.expert is not None)
        if key not in counted:
            counted[key] = _size(weight_map, parameter, sizes)
        stage, size = _stage(parameter, stages, sizes.pp), counted[key]
        largest[stage] = max(largest[stage], size)
        kind = "buffers" if parameter.is_buffer else "dense" if parameter.expert is None else "experts"
        counts[stage][kind] += math.ceil(size / PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT if aligned else size
    return tuple(
        Elements(dense=count["dense"], experts=count["experts"], buffers=count["buffers"], largest=largest[stage])
        for stage, count in enumerate(counts)
    )


def _stage(parameter: Parameter, stages: list[int], pp: int) -> int:
    if parameter.layer is not None:
        return stages[parameter.layer]
    return 0 if parameter.layers is Layers.BEFORE else pp - 1


def _size(weight_map: WeightMap, parameter: Parameter, sizes: AxisSizes) -> int:
    parts = sizes.etp if parameter.expert is not None else sizes.tp
    return math.prod(weight_map.shard_shape(parameter.megatron, 0, 1 if parameter.kind is Kind.REPLICATED else parts))


def weights(held: Elements, element: int) -> float:
    """Return the parameters in the model's type and buffers in float32."""
    return element * (held.dense + held.experts) + FLOAT * held.buffers


def gradients(held: Elements) -> float:
    """Return ``main_grad`` of megatron-core's DistributedDataParallel: float32 whatever the type of the model."""
    return FLOAT * (held.dense + held.experts)


def optimizer_state(held: Elements, parallel: ParallelConfig, sizes: AxisSizes, element: int) -> float:
    """Return Adam's ``exp_avg`` and ``exp_avg_sq`` and, for bfloat16 parameters, their float32 main weights."""
    return FLOAT * (2 if element == FLOAT else 3) * _own_elements(held, parallel, sizes)


def optimizer_step(held: Elements, parallel: ParallelConfig, sizes: AxisSizes) -> float:
    """Return two float32 tensors as large as the largest parameter that the rank updates, which torch's Adam makes on the way."""
    return 2 * FLOAT * min(held.largest, _own_elements(held, parallel, sizes))


def _own_elements(held: Elements, parallel: ParallelConfig, sizes: AxisSizes) -> float:
    if not parallel.distributed_optimizer:
        return held.dense + held.experts
    return held.dense / (sizes.dp * sizes.cp) + held.experts / sizes.expert_dp


def batch(num_tokens: int, *, reference: bool, critic: bool) -> float:
    """Return PackedBatch, TokenOutputs and TrainBatch, which every rank has whole, in host memory where there are GPUs."""
    packed = 2 * INT + 2 * FLOAT + 1  # token_ids, weight_versions; sampler_logprobs, step_rewards; loss_mask
    outputs = FLOAT * (2 + reference + 2 * critic)  # old, entropies; reference; values and returns
    trained = FLOAT * 2  # advantages, token_weights
    return num_tokens * (packed + outputs + trained)


def embedded_engine(config: Config, architecture: Architecture, weight_map: WeightMap, element: int) -> dict[str, float]:
    """Return what the embedded engine holds on rank 0: transformers' model, its key-value cache at full length and of the prompts
    alone, what one layer makes of all prompts, and logits of one step."""
    rollout, mla = config.rollout, architecture.mla
    sequences = min(rollout.embedded.batch_size, rollout.prompts_per_step * rollout.samples_per_prompt)
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    width = architecture.num_kv_heads * (architecture.head_dim + (mla.v_head_dim if mla else architecture.head_dim))
    moe = architecture.moe
    ffn = max(architecture.ffn_size, moe.top_k * moe.ffn_size + moe.shared_ffn_size if moe else 0)
    cache_of_token = element * architecture.num_layers * width
    num_weights = sum(math.prod(shape) for shape in weight_map.hugging_face_shapes().values())
    return {
        "weights": element * num_weights,
        "key-value cache": cache_of_token * sequences * length,
        "key-value cache of prompts": cache_of_token * sequences * rollout.max_prompt_tokens,
        "one layer over all prompts": element * sequences * rollout.max_prompt_tokens * (3 * ffn + 4 * architecture.hidden_size),
        "logits": 4 * FLOAT * sequences * architecture.vocabulary_size,  # logits, scaled, noise, their sum
    }
