"""megatron-core's Adam and learning-rate schedule for one engine, with non-finite gradients skipped and counted."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.distributed import distributed_c10d

from megarl.config.schema import OptimizerConfig
from megarl.errors import TrainingError
from megarl.train.engine import TrainingEngine
from megarl.train.offload import storages

SETTINGS = ("max_lr", "min_lr", "betas", "eps")  # of a parameter group, which checkpoints hold too
NO_PARAMETER = "no parameter"  # key in the state of an Adam without parameters


class EngineOptimizer:
    """Optimizer and schedule of a trainable engine.

    Args:
        engine: the engine whose gradient buffers are stepped on.
        config: settings.
        total_steps: optimizer steps of the run; the schedule's decay ends there.
    """

    def __init__(self, engine: TrainingEngine, config: OptimizerConfig, total_steps: int) -> None:
        transformer = engine.chunks[0].config
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.epsilon,
            bf16=transformer.bf16,
            params_dtype=transformer.params_dtype,
            use_distributed_optimizer=engine.role.parallel.distributed_optimizer,
            clip_grad=config.clip_gradient,
        )
        with _as_world(engine.layout.groups.intra_dist_opt):
            self.megatron = get_megatron_optimizer(
                megatron_config,
                engine.ddp_chunks,
                config_overrides=get_standard_config_overrides(megatron_config),
                use_gloo_process_groups=False,
                pg_collection=engine.layout.groups,
            )
        transformer.grad_scale_func = self.megatron.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(total_steps, config.warmup_steps + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._settings = [{name: group[name] for name in SETTINGS if name in group} for group in self.megatron.param_groups]
        self._config = config
        self._chunks = engine.chunks
        self._is_distributed = engine.role.parallel.distributed_optimizer
        self.num_skipped = 0
        self.num_consecutive_skipped = 0

    @torch.no_grad()
    def step(self) -> tuple[float, float, bool]:
        """Clip and apply the gradient, unless it is NaN, Inf or exactly 0, and advance the schedule.

        A gradient of 0 leaves Adam's state alone too: with it momentum and weight decay would move weights of which nothing in
        the batch speaks.

        Returns:
            Gradient norm before clipping, learning rate of the step, and whether the step was skipped for NaN or Inf.

        Raises:
            TrainingError: too many consecutive steps were skipped.
        """
        self.scheduler.step(increment=0)  # the rate of this step, also after a checkpoint was loaded
        found_inf = self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        skipped = bool(found_inf) or not math.isfinite(norm)
        if skipped:
            self._count_skipped(norm)
        elif norm > 0:
            self.num_consecutive_skipped = 0
            self._clip(norm)
            self.megatron.step_with_ready_grads()
        self.megatron.zero_grad()
        return norm, self._advance(), skipped

    def pass_over(self) -> tuple[float, float, bool]:
        """Advance the schedule by a step that has nothing to learn from; returns what ``step`` does for a gradient of 0."""
        return 0.0, self._advance(), False

    def _advance(self) -> float:
        """Give the rate of this step, and go on to the next: the schedule is of planned steps, whatever becomes of one."""
        learning_rate = self.scheduler.get_lr(self.megatron.param_groups[0])
        self.scheduler.step(increment=1)
        return learning_rate

    def _clip(self, norm: float) -> None:
        if self._config.clip_gradient == 0:
            return
        for optimizer in self.megatron.chained_optimizers:
            clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self._config.clip_gradient, total_norm=norm)

    def _count_skipped(self, norm: float) -> None:
        self.num_skipped += 1
        self.num_consecutive_skipped += 1
        if self.num_consecutive_skipped > self._config.max_skipped_steps:
            raise TrainingError(
                f"gradient norm {norm} in {self.num_consecutive_skipped} consecutive steps, more than optimizer.max_skipped_steps "
                f"{self._config.max_skipped_steps}; lower the learning rate or look at the last rollouts"
            )

    def load_state(self, state: dict[str, object]) -> None:
        """Take over Adam's state; its settings, which checkpoints hold too, stay those of this run."""
        self.megatron.load_state_dict(state)
        for group, settings in zip(self.megatron.param_groups, self._settings, strict=True):
            group.update(settings)

    def tensors(self) -> Iterator[Tensor]:
        """State on the device and float32 main parameters, without those that are the model's own parameters."""
        own = storages(parameter.data for chunk in self._chunks for parameter in chunk.parameters())
        for optimizer in self.megatron.chained_optimizers:
            adam = optimizer.optimizer
            main = [parameter.data for group in adam.param_groups for parameter in group["params"]]
            moments = [value for state in adam.state.values() for name, value in state.items() if name != "step"]
            yield from (tensor for tensor in (*main, *moments) if tensor.untyped_storage()._cdata not in own)

    def fill_state(self) -> None:
        """Give a fresh Adam its zero state (step 0): checkpoints are written from it and loaded into it."""
        adams: list[Any] = [optimizer.optimizer for optimizer in self.megatron.chained_optimizers]
        for adam in adams:
            for group in adam.param_groups:
                for parameter in group["params"]:
                    if not adam.state[parameter]:
                        adam.state[parameter] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
        if self._is_distributed:
            _keep_step_where_there_are_no_parameters(adams)


@contextmanager
def _as_world(group: dist.ProcessGroup) -> Iterator[None]:
    """Let megatron-core, which compares parameter groups over all ranks there are, ask those of one role."""
    world = distributed_c10d._get_default_group()
    distributed_c10d._update_default_pg(group)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(world)


def _keep_step_where_there_are_no_parameters(adams: list[Any]) -> None:
    """Give each torch Adam without parameters (the experts' on a pipeline stage without experts) the step of the others.

    megatron-core's DistributedOptimizer asks the state for the step, and rank 0's answer is what all experts resume from.
    """
    steps = [state["step"] for adam in adams for key, state in adam.state.items() if key != NO_PARAMETER]
    for adam in adams:
        state: dict[Any, Any] = adam.state
        if isinstance(adam, torch.optim.Adam) and not state.keys() - {NO_PARAMETER}:
            state[NO_PARAMETER] = {"step": steps[0].clone() if steps else torch.tensor(0.0)}
