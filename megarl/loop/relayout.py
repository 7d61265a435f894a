"""A model that learns, from one layout to another, with its optimizer state and its place in the learning-rate schedule."""

import gc

import torch

from megarl.config.schema import Config
from megarl.reshard.megatron import OptimizerTransfer, TransferSettings, WeightTransfer
from megarl.train.roles import Learner


def move_learner(source: Learner, destination: Learner, config: Config) -> None:
    """Make ``destination``, built without weights, the model that ``source`` is; collective over the world.

    Every parameter, moment and main parameter goes from a rank that holds it to those that need it, so the result is the same
    bit for bit as a checkpoint that is saved in one layout and loaded in the other.

    Args:
        source: may be retired; must not be used afterwards.
        destination: of the same model, in any layout over any ranks.
        config: its rollout.weight_transfer.bucket_mib bounds the memory of the transfer.

    Raises:
        TransferError: it failed on some rank.
    """
    settings = TransferSettings(
        bucket_bytes=config.rollout.weight_transfer.bucket_mib << 20,
        gpus_per_node=torch.cuda.device_count() or torch.distributed.get_world_size(),
        timeout_seconds=config.distributed_timeout,
    )
    with source.state_on_device(), destination.state_on_device():
        models = [(learner.engine.chunks, learner.engine.layout) for learner in (source, destination)]
        WeightTransfer(source.weight_map, models[0], models[1], settings).move()
        states = [(*model, one.megatron_optimizer) for model, one in zip(models, (source, destination), strict=True)]
        OptimizerTransfer(source.weight_map, states[0], states[1], settings).move()
    destination.go_on_from(source)


def free_memory() -> None:
    """Give back the memory of models that nothing names any more: megatron-core's hooks refer to them in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
