"""A model with its optimizer: what an update, a checkpoint and a move into another layout need of it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megarl.algorithms.objectives import ObjectiveFunction
from megarl.config.schema import OptimizerConfig
from megarl.errors import TrainingError
from megarl.train.engine import TrainingEngine
from megarl.train.offload import Offloaded
from megarl.train.optimizer import EngineOptimizer
from megarl.types import TrainBatch, UpdateResult
from megarl.weights.mapping import WeightMap
from megarl.weights.transfer import hugging_face_tensors


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
        """Let weights, gradients and optimizer state be used within the block."""
        with self.state_on_device(), self._gradients.on_device():
            yield

    @contextmanager
    def state_on_device(self) -> Iterator[None]:
        """Let weights and optimizer state be used within the block: what a learner takes along into another layout."""
        with self.engine.weights.on_device(), self._optimizer_state.on_device():
            yield

    def retire(self) -> None:
        """Give up the gradients' memory: nothing is learned any more, weights and optimizer state only wait to be moved."""
        self._gradients.empty()

    def update(self, batch: TrainBatch, objective: ObjectiveFunction) -> UpdateResult | None:
        """Make one optimizer step; None on a rank outside the role, which does not wait for it (see ``share_results``)."""
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
        """Yield the weights as whole Hugging Face tensors on rank 0; every rank must exhaust it."""
        with self.engine.weights.on_device():
            yield from hugging_face_tensors(self.engine.chunks, self.weight_map, self.engine.layout, self._dtype)

    def _metadata(self) -> dict[str, Any]:
        return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self.engine.layout.groups.dp_cp}

    def sharded_weights(self) -> dict[str, Any]:
        """Return the model's part of ``sharded_state``: a view of what must be on the device until it is saved or loaded."""
        return {
            f"model{number}": chunk.sharded_state_dict(metadata=self._metadata()) for number, chunk in enumerate(self.engine.chunks)
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over the model's part of a filled state dict."""
        for number, chunk in enumerate(self.engine.chunks):
            chunk.load_state_dict(state[f"model{number}"])

    def sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Return model, optimizer, scheduler and random state as megatron-core's sharded state dict; collective.

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


def share_results(model: Learner, results: Sequence[UpdateResult | None]) -> list[UpdateResult]:
    """Give every rank of the world what ``update`` gave on the model's ranks; collective."""
    layout = model.engine.layout
    return layout.share([result for result in results if result is not None] if layout.is_member else None)
