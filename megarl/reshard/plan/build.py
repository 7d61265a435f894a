"""From a run's configuration to a plan."""

from megarl.config.schema import ModelConfig, ParallelConfig
from megarl.families.base.engine_rules import EngineLayout
from megarl.families.registry import read_architecture
from megarl.models.build import use_transformer_engine
from megarl.models.transformer_config import DTYPES
from megarl.parallel.axis_sizes import axis_sizes
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.plan import Plan, build_plan
from megarl.reshard.plan.shard_layout import megatron_shard_layout, optimizer_table, tensor_table
from megarl.weights.mapping import build_weight_map


def plan_transfer(
    model: ModelConfig,
    source: ParallelConfig,
    world_size: int,
    target: EngineLayout | ParallelConfig,
    machines: Machines,
    bucket_bytes: int,
    *,
    optimizer_state: bool = False,
) -> Plan:
    """Plan how a model gets from a Megatron layout to engines, or to another Megatron layout over the same ranks.

    Only the model's config.json is read.

    Args:
        optimizer_state: float32 tensors of the shapes of the parameters (a moment of Adam) instead of the weights.

    Raises:
        ConfigError: a layout does not divide the model or the world.
    """
    architecture = read_architecture(model.path)
    weight_map = build_weight_map(architecture, model.vocabulary_pad_multiple, use_transformer_engine(model.transformer_impl))
    tensors = optimizer_table(weight_map) if optimizer_state else tensor_table(weight_map, DTYPES[model.dtype].itemsize)
    held = megatron_shard_layout(weight_map, axis_sizes(source, world_size), tensors)
    if isinstance(target, EngineLayout):
        needed = engine_shard_layout(architecture, target, tensors)
    else:
        needed = megatron_shard_layout(weight_map, axis_sizes(target, world_size), tensors)
    return build_plan(held, needed, tensors, machines, bucket_bytes)
