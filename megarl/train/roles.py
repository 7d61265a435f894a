"""The models of a run: policy and critic, which learn, and reference and reward model, which do not."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding, extract_sharded_base
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megarl.algorithms.objectives import ObjectiveFunction
from megarl.config.schema import Config, CriticConfig, OptimizerConfig, RewardModelConfig, RoleConfig
from megarl.data.packing import with_scored_ends
from megarl.errors import TrainingError
from megarl.families.registry import read_architecture
from megarl.models.build import ValueModel, build_model_chunks, use_transformer_engine
from megarl.models.routing_replay import replay_routing
from megarl.models.transformer_config import DTYPES
from megarl.parallel.layout import build_layout
from megarl.train.engine import TrainingEngine
from megarl.train.heads import LogProbHead, ValueHead
from megarl.train.offload import Offloaded
from megarl.train.optimizer import EngineOptimizer
from megarl.types import PackedBatch, TokenOutputs, TrainBatch, UpdateResult
from megarl.weights.distributed_checkpoint import is_distributed_checkpoint
from megarl.weights.files.sources import RandomSource, SafetensorsSource, WeightSource
from megarl.weights.mapping import WeightMap, build_weight_map
from megarl.weights.megatron_start import load_megatron_weights
from megarl.weights.transfer import hugging_face_tensors, load_weights
from megarl.weights.value_head import value_head_source, with_value_head


def _build_engine(
    config: Config, role: RoleConfig, path: Path, *, trainable: bool, with_weights: bool = True, replays_routing: bool = False
) -> tuple[TrainingEngine, WeightMap]:
    """``with_weights``: the model's; without, something else must write all of its parameters."""
    architecture = read_architecture(path)
    weight_map = build_weight_map(
        architecture, config.model.vocabulary_pad_multiple, use_transformer_engine(config.model.transformer_impl)
    )
    layout = build_layout(role.parallel, role.ranks(dist.get_world_size()))
    source: WeightSource | None = None  # made before the model: sizes that the weights do not have may not fit into memory
    if with_weights and config.model.init == "random" and path == config.model.path:
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
    temperature = config.rollout.temperature if config.kind == "rl" else 1.0
    head = LogProbHead(role=role, layout=layout, vocabulary_size=architecture.vocabulary_size, temperature=temperature)
    return TrainingEngine(chunks, role, layout, head=head, trainable=trainable), weight_map


def _build_value_model(
    config: Config, role: RoleConfig, path: Path | None, *, trainable: bool, with_weights: bool = True
) -> tuple[TrainingEngine, WeightMap]:
    """A critic or reward model. One that learns may start without a head; one that does not is complete.

    Args:
        config: the run.
        role: layout and sizes.
        path: folder of its weights; the policy's starting weights when None.
        trainable: whether it learns.
        with_weights: read or draw them; without, something else must write all of them.
    """
    folder = path or config.model.path
    architecture = replace(read_architecture(folder), tied_embeddings=False)  # it has no output layer that could be tied
    with_transformer_engine = use_transformer_engine(config.model.transformer_impl)
    weight_map = with_value_head(build_weight_map(architecture, config.model.vocabulary_pad_multiple, with_transformer_engine))
    layout = build_layout(role.parallel, role.ranks(dist.get_world_size()))
    source: WeightSource
    if config.model.init == "random" and path is None:
        source = RandomSource(weight_map, config.seed)
    elif trainable:
        source = value_head_source(folder, weight_map, config.seed)
    else:
        source = SafetensorsSource(folder, weight_map)
    chunks = build_model_chunks(architecture, config.model, role, layout, config.seed, ValueModel)
    if with_weights:
        load_weights(chunks, source, weight_map, layout)
    return TrainingEngine(chunks, role, layout, head=ValueHead(role=role, layout=layout), trainable=trainable), weight_map


class Reference:
    """The frozen model that the policy is compared with. Every rank must build it."""

    def __init__(self, config: Config) -> None:
        role = config.reference or config.policy
        path = (config.reference.path if config.reference else None) or config.model.path
        self.engine, _ = _build_engine(config, role, path, trainable=False)
        self.engine.weights.release()


class RewardModel:
    """The frozen model that scores whole responses. Every rank must build it."""

    def __init__(self, config: Config, role: RewardModelConfig) -> None:
        self.weight = role.weight
        self.engine, _ = _build_value_model(config, role, role.path, trainable=False)
        self.engine.weights.release()

    def rewards(self, packed: PackedBatch) -> Tensor:
        """Its score of each sequence, read at the last token as transformers does: float32 [num_sequences] on the CPU."""
        ends = with_scored_ends(packed)
        (scores,) = self.engine.forward_only(ends)
        return scores[ends.loss_mask]


class Learner:
    """A model with its optimizer.

    Args:
        engine: the model.
        weight_map: of the model.
        dtype: of its parameters.
        optimizer: settings.
        total_updates: optimizer steps of the run, for the learning-rate schedule.

    Attributes:
        has_value_head: it gives one number for each token; a language model does not.
    """

    has_value_head: ClassVar[bool] = False

    def __init__(
        self, engine: TrainingEngine, weight_map: WeightMap, dtype: torch.dtype, optimizer: OptimizerConfig, total_updates: int
    ) -> None:
        self.engine = engine
        self.weight_map = weight_map
        self._dtype = dtype
        self._optimizer = EngineOptimizer(engine, optimizer, total_updates) if engine.layout.is_member else None
        self._has_learned = False
        enabled = engine.role.offload != "none"
        self._gradients = Offloaded(engine.gradient_buffers, "dropped", enabled=enabled)
        self._optimizer_state = Offloaded(self._optimizer_tensors, "changing", enabled=enabled)
        for part in (self._gradients, self._optimizer_state, engine.weights):
            part.release()

    @property
    def optimizer(self) -> EngineOptimizer:
        """On the role's ranks only."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def megatron_optimizer(self) -> ChainedOptimizer | None:
        """Adam with its state, if only zeros; None on the other ranks."""
        if self._optimizer is None:
            return None
        self._optimizer.fill_state()
        return self._optimizer.megatron

    def _optimizer_tensors(self) -> Iterable[Tensor]:
        return () if self._optimizer is None else self._optimizer.tensors()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it weights, gradients and optimizer state can be used."""
        with self.state_on_device(), self._gradients.on_device():
            yield

    @contextmanager
    def state_on_device(self) -> Iterator[None]:
        """Within it weights and optimizer state can be used: what a learner takes along into another layout."""
        with self.engine.weights.on_device(), self._optimizer_state.on_device():
            yield

    def retire(self) -> None:
        """Give up the gradients' memory: nothing is learned any more, weights and optimizer state only wait to be moved."""
        self._gradients.empty()

    def update_each(self, batches: Sequence[TrainBatch], objective: ObjectiveFunction) -> list[UpdateResult | None]:
        """``update`` on one batch after another."""
        with self.on_device():
            return [self.update(batch, objective) for batch in batches]

    def update(self, batch: TrainBatch, objective: ObjectiveFunction) -> UpdateResult | None:
        """One optimizer step on one batch; None on a rank outside the role, which does not wait for it (see ``share_results``)."""
        if not self.engine.layout.is_member:
            return None
        num_tokens = int(batch.packed.loss_mask.sum())
        if num_tokens == 0:  # every rank sees that: none computes anything
            metrics: dict[str, float] = {}
            norm, learning_rate, skipped = self.optimizer.pass_over()
        else:
            with self.on_device():
                metrics = self.engine.forward_backward(batch, objective)
                self._check_first_loss(metrics)
                norm, learning_rate, skipped = self.optimizer.step()
                self._has_learned |= not skipped
        return UpdateResult(
            metrics=metrics,
            gradient_norm=norm,
            learning_rate=learning_rate,
            skipped=skipped,
            empty=norm == 0,
            num_tokens=num_tokens,
            num_sequences=batch.packed.num_sequences,
        )

    def _check_first_loss(self, metrics: Mapping[str, float]) -> None:
        """Refuse to begin with a loss that no update can be made of; later ones are skipped and counted by the optimizer.

        Raises:
            TrainingError: the loss is not finite, and no update has been made since the process started.
        """
        if not self._has_learned and not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"the loss of the first update is {metrics['loss']:g}; the model's numbers or its data are not finite or overflow: "
                "look at the rows and at rope_theta and rms_norm_eps in config.json, or set model.dtype to float32"
            )

    def hugging_face_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as whole Hugging Face tensors on rank 0; every rank must exhaust it."""
        with self.engine.weights.on_device():
            yield from hugging_face_tensors(self.engine.chunks, self.weight_map, self.engine.layout, self._dtype)

    def _metadata(self) -> dict[str, Any]:
        return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self.engine.layout.groups.dp_cp}

    def sharded_weights(self) -> dict[str, Any]:
        """The model's part of ``sharded_state``, like that a view of what must be on the device until it is saved or loaded."""
        return {
            f"model{number}": chunk.sharded_state_dict(metadata=self._metadata()) for number, chunk in enumerate(self.engine.chunks)
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over the model's part of a filled state dict."""
        for number, chunk in enumerate(self.engine.chunks):
            chunk.load_state_dict(state[f"model{number}"])

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer, scheduler and random state as megatron-core's sharded state dict; collective.

        A rank outside the role has only what is equal on all ranks: rank 0 writes that, whatever its roles.

        Args:
            is_loading: it is a template to load into.
        """
        layout = self.engine.layout
        state = self._member_state(is_loading=is_loading) if layout.is_member else None
        common = layout.share(None if state is None else extract_sharded_base(state)[1])
        return common if state is None else state

    def _member_state(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.sharded_weights()
        self.optimizer.fill_state()
        optimizer = self.optimizer.megatron.sharded_state_dict(dict(model), is_loading=is_loading, metadata=self._metadata())
        return model | self._position() | {"optimizer": optimizer, "random": torch.get_rng_state()}

    def _position(self) -> dict[str, Any]:
        counters = {"num_skipped": self.optimizer.num_skipped, "num_consecutive_skipped": self.optimizer.num_consecutive_skipped}
        return {"scheduler": self.optimizer.scheduler.state_dict(), "counters": counters}

    def _load_position(self, position: dict[str, Any]) -> None:
        """Into a new schedule; its own settings stay."""
        self.optimizer.scheduler.load_state_dict(position["scheduler"])
        self.optimizer.num_skipped = position["counters"]["num_skipped"]
        self.optimizer.num_consecutive_skipped = position["counters"]["num_consecutive_skipped"]

    def go_on_from(self, other: "Learner") -> None:
        """Be where another model is in its learning-rate schedule, of which no step was made here yet; collective."""
        position = other.engine.layout.share(other._position() if other.engine.layout.is_member else None)
        if self.engine.layout.is_member:
            self._load_position(position)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a state dict that ``weights.checkpoint.load_policy`` filled."""
        torch.set_rng_state(state["random"])
        if not self.engine.layout.is_member:
            return
        self.load_weights(state)
        self.optimizer.load_state(state["optimizer"])
        self._load_position(state)


class Policy(Learner):
    """The language model that learns. Every rank must build it.

    Args:
        config: the run.
        total_updates: optimizer steps of the run, for the learning-rate schedule.
        with_weights: read or draw the weights; without, something else must write all of them.
    """

    def __init__(self, config: Config, total_updates: int, *, with_weights: bool = True) -> None:
        engine, weight_map = _build_engine(
            config,
            config.policy,
            config.model.path,
            trainable=True,
            with_weights=with_weights,
            replays_routing=config.rollout.routing_replay,
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
        role = config.critic or CriticConfig.model_validate(config.policy.model_dump())
        engine, weight_map = _build_value_model(config, role, role.path, trainable=True, with_weights=with_weights)
        super().__init__(engine, weight_map, DTYPES[config.model.dtype], role.optimizer or config.optimizer, total_updates)

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """As the policy's, with keys of its own, so that one checkpoint holds both."""
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
        engine, weight_map = _build_value_model(config, config.policy, None, trainable=True)
        super().__init__(engine, weight_map, DTYPES[config.model.dtype], config.optimizer, total_updates)


def build_learner(config: Config, total_updates: int) -> Learner:
    """The model that a run without a critic trains. Every rank must build it."""
    return LearningRewardModel(config, total_updates) if config.kind == "reward_model" else Policy(config, total_updates)


def compute_outputs(policy: Learner, reference: Reference | None, critic: Critic | None, packed: PackedBatch) -> TokenOutputs:
    """What all models say of the batch before the updates. Models on disjoint ranks work at the same time."""
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


def share_results(model: Learner, results: Sequence[UpdateResult | None]) -> list[UpdateResult]:
    """What ``update`` gave on the model's ranks, on every rank of the world; collective."""
    layout = model.engine.layout
    return layout.share([result for result in results if result is not None] if layout.is_member else None)


def is_main_rank() -> bool:
    """True on the rank that owns prompts, engines, files and the display."""
    return dist.get_rank() == 0
