"""The models of a run: policy and critic, which learn, and reference and reward model, which do not."""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor

from megarl.config.models import ModelOfRun, critic_of, policy_of, reference_of, reward_model_of
from megarl.config.schema import Config, RewardModelConfig
from megarl.data.packing import with_scored_ends
from megarl.families.registry import read_architecture
from megarl.models.build import ValueModel, build_model_chunks, use_transformer_engine
from megarl.models.routing_replay import replay_routing
from megarl.models.transformer_config import DTYPES
from megarl.parallel.layout import build_layout
from megarl.train.engine import TrainingEngine
from megarl.train.heads import LogProbHead, ValueHead
from megarl.train.learner import Learner
from megarl.types import PackedBatch, TokenOutputs
from megarl.weights.distributed_checkpoint import is_distributed_checkpoint
from megarl.weights.files.sources import RandomSource, SafetensorsSource, WeightSource
from megarl.weights.mapping import WeightMap, build_weight_map
from megarl.weights.sharded_state import load_megatron_weights
from megarl.weights.transfer import load_weights
from megarl.weights.value_head import value_head_source, with_value_head


def _build_engine(
    config: Config, model: ModelOfRun, *, with_weights: bool = True, replays_routing: bool = False
) -> tuple[TrainingEngine, WeightMap]:
    """Build a policy or its reference; without ``with_weights`` something else must write all of its parameters."""
    role, path = model.role, model.path
    architecture = read_architecture(path)
    weight_map = build_weight_map(
        architecture, config.model.vocabulary_pad_multiple, use_transformer_engine(config.model.transformer_impl)
    )
    layout = build_layout(role.parallel, role.ranks(dist.get_world_size()))
    source: WeightSource | None = None  # made before the model: sizes that the weights do not have may not fit into memory
    if with_weights and model.is_random:
        source = RandomSource(weight_map, config.seed)
    elif with_weights and not is_distributed_checkpoint(path):
        source = SafetensorsSource(path, weight_map)
    chunks = build_model_chunks(architecture, config.model, role, layout, config.seed)
    if source is not None:
        load_weights(chunks, source, weight_map, layout)
    elif with_weights:
        load_megatron_weights(chunks, path, layout)
    if replays_routing:
        replay_routing(chunks, architecture)
    head = LogProbHead(
        role=role, layout=layout, vocabulary_size=architecture.vocabulary_size, temperature=config.trained_temperature
    )
    return TrainingEngine(chunks, role, layout, head=head, trainable=model.learns), weight_map


def _build_value_model(config: Config, model: ModelOfRun, *, with_weights: bool = True) -> tuple[TrainingEngine, WeightMap]:
    """Build a critic or reward model. One that learns may start without a head; one that does not is complete.

    Args:
        config: the run.
        model: that is built.
        with_weights: read or draw them; without, something else must write all of them.
    """
    role = model.role
    architecture = replace(read_architecture(model.path), tied_embeddings=False)  # it has no output layer that could be tied
    with_transformer_engine = use_transformer_engine(config.model.transformer_impl)
    weight_map = with_value_head(build_weight_map(architecture, config.model.vocabulary_pad_multiple, with_transformer_engine))
    layout = build_layout(role.parallel, role.ranks(dist.get_world_size()))
    source: WeightSource
    if model.is_random:
        source = RandomSource(weight_map, config.seed)
    elif model.learns:
        source = value_head_source(model.path, weight_map, config.seed)
    else:
        source = SafetensorsSource(model.path, weight_map)
    chunks = build_model_chunks(architecture, config.model, role, layout, config.seed, ValueModel)
    if with_weights:
        load_weights(chunks, source, weight_map, layout)
    return TrainingEngine(chunks, role, layout, head=ValueHead(role=role, layout=layout), trainable=model.learns), weight_map


class Reference:
    """The frozen model that the policy is compared with. Every rank must build it."""

    def __init__(self, config: Config) -> None:
        self.engine, _ = _build_engine(config, reference_of(config))
        self.engine.weights.release()


class RewardModel:
    """The frozen model that scores whole responses. Every rank must build it."""

    def __init__(self, config: Config, role: RewardModelConfig) -> None:
        self.weight = role.weight
        self.engine, _ = _build_value_model(config, reward_model_of(config, role))
        self.engine.weights.release()

    def rewards(self, packed: PackedBatch) -> Tensor:
        """Return its score of each sequence, read at the last token as transformers does: float32 [num_sequences] on the CPU."""
        ends = with_scored_ends(packed)
        (scores,) = self.engine.forward_only(ends)
        return scores[ends.loss_mask]


class Policy(Learner):
    """The language model that learns. Every rank must build it.

    Args:
        config: the run.
        total_updates: optimizer steps of the run, for the learning-rate schedule.
        with_weights: read or draw the weights; without, something else must write all of them.
    """

    def __init__(self, config: Config, total_updates: int, *, with_weights: bool = True) -> None:
        engine, weight_map = _build_engine(
            config, policy_of(config), with_weights=with_weights, replays_routing=config.rollout.routing_replay
        )
        super().__init__(engine, weight_map, DTYPES[config.model.dtype], config.optimizer, total_updates)


class Critic(Learner):
    """The model that learns what reward to expect from each token on. Every rank must build it.

    Args:
        config: the run.
        total_updates: optimizer steps of the run, for the learning-rate schedule.
        with_weights: as the policy's.
    """

    has_value_head = True

    def __init__(self, config: Config, total_updates: int, *, with_weights: bool = True) -> None:
        critic = critic_of(config)
        engine, weight_map = _build_value_model(config, critic, with_weights=with_weights)
        assert critic.optimizer is not None
        super().__init__(engine, weight_map, DTYPES[config.model.dtype], critic.optimizer, total_updates)

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Return the state as a policy's, with keys of its own, so that one checkpoint holds both."""
        state = super().sharded_state(is_loading=is_loading)
        add_prefix_for_sharding(state, "critic.")
        return state


class LearningRewardModel(Learner):
    """The reward model that a run of kind reward_model trains, in the policy's layout. Every rank must build it.

    Args:
        config: the run.
        total_updates: optimizer steps of the run, for the learning-rate schedule.
    """

    has_value_head = True

    def __init__(self, config: Config, total_updates: int) -> None:
        engine, weight_map = _build_value_model(config, policy_of(config))
        super().__init__(engine, weight_map, DTYPES[config.model.dtype], config.optimizer, total_updates)


def build_learner(config: Config, total_updates: int) -> Learner:
    """Build the model that a run without a critic trains; every rank must."""
    return LearningRewardModel(config, total_updates) if config.trains_reward_model else Policy(config, total_updates)


def compute_outputs(policy: Learner, reference: Reference | None, critic: Critic | None, packed: PackedBatch) -> TokenOutputs:
    """Compute what all models say of the batch before the updates. Models on disjoint ranks work at the same time."""
    engines = [None if model is None else model.engine for model in (policy, reference, critic)]
    computed = [None if engine is None else engine.compute_outputs(packed) for engine in engines]
    shared = [
        None if engine is None or outputs is None else engine.share_outputs(outputs)
        for engine, outputs in zip(engines, computed, strict=True)
    ]
    of_policy, of_reference, of_critic = shared
    assert of_policy is not None
    return TokenOutputs(
        old=of_policy[0],
        entropies=of_policy[1],
        reference=None if of_reference is None else of_reference[0],
        values=None if of_critic is None else of_critic[0],
    )


def is_main_rank() -> bool:
    """Tell whether this is the rank that owns prompts, engines, files and the display."""
    return dist.get_rank() == 0
