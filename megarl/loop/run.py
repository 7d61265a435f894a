"""What every training run has around its loop: position, sampling, checkpoints, and what people watch."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.metrics import step_metrics
from megarl.algorithms.objectives import masked_mean_gap
from megarl.config.models_of import samples_responses, trains_on_pairs
from megarl.config.schema import Config
from megarl.config.stages import Stage
from megarl.data.curriculum import StagedPrompts
from megarl.data.packing import pack_examples
from megarl.data.sampler import build_pair_source, build_sft_source
from megarl.data.tokenizer import run_tokenizer
from megarl.errors import CheckpointError, RunStopped
from megarl.loop.broadcast import broadcast_batch, broadcast_value
from megarl.loop.pairs import HeldOutPairs, pack_for
from megarl.loop.promotion import StageProgress
from megarl.loop.rollout_manager import Collected, Prompts, RolloutManager, accuracy_name, prompts_of_stage, read_prompts
from megarl.loop.run_folder import accept_config
from megarl.loop.start_checks import row_sizes
from megarl.loop.stop_signals import stop_is_requested
from megarl.observe.progress import RunProgress
from megarl.observe.sentinels import EntropyFloor, check_logprob_gap
from megarl.observe.sinks import LOGS, MetricsWriter, RolloutWriter, TicketsWriter, first_value, read_log
from megarl.observe.timers import PhaseTimer
from megarl.parallel.rank_board import announce_phase
from megarl.train.roles import Critic, Learner, is_main_rank
from megarl.types import PackedBatch, RolloutGroup, TokenOutputs, UpdateResult
from megarl.weights.checkpoint import (
    CheckpointWriter,
    DataState,
    check_checkpoint_together,
    load_policy,
    read_data_state,
    whole_checkpoints,
)
from megarl.weights.export import write_hugging_face_folder
from megarl.weights.manifest import RunState, read_manifest

logger = logging.getLogger(__name__)

NO_DIGESTS = "notice: %s was saved without digests by an earlier version, so only the sizes of its files were checked"


class Examples:
    """Supervised examples, or preference pairs: rank 0 reads them, every rank gets them."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._config = config
        self._examples = (
            build_sft_source(config, tokenizer, row_sizes(config, tokenizer)) if config.kind == "sft" and is_main_rank() else None
        )
        self._pairs = (
            build_pair_source(config, tokenizer, row_sizes(config, tokenizer))
            if trains_on_pairs(config) and is_main_rank()
            else None
        )

    def take(self, count: int) -> PackedBatch:
        """The next ``count`` examples or pairs."""
        packed = None
        if self._examples is not None:
            packed = pack_examples(self._examples.take(count))
        elif self._pairs is not None:
            packed = pack_for(self._config, self._pairs.take(count))
        return broadcast_batch(packed, PackedBatch)

    def data_state(self) -> DataState:
        """Position in the data, on rank 0."""
        source = self._examples or self._pairs
        return DataState(position={} if source is None else source.state(), pending=None)

    def restore_data(self, state: DataState) -> None:
        """Go on from that position."""
        source = self._examples or self._pairs
        if source is not None:
            source.restore(state.position)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """The stage of a curriculum that a Run is.

    Attributes:
        stages: of the curriculum.
        progress: position in the stage.
        prompts: of all stages, on rank 0.
        is_carried: the models hold what the newest checkpoint has, from which the rest is restored.
    """

    stages: Sequence[Stage]
    progress: StageProgress
    prompts: StagedPrompts | None
    is_carried: bool


class Run:
    """One run, from restore to export; a context manager that ends engines and closes files.

    Args:
        config: the run.
        policy: its model, which may be a reward model; restored here when the run resumes.
        algorithm: its RL method, restored likewise; None for the other kinds.
        critic: restored likewise; None for methods without.
        resume: go on from the newest checkpoint.
        stage: which of a curriculum this is.
        held_out: what a run on pairs is evaluated on; the other kinds are by sampled responses.

    Attributes:
        step: steps done.
        weight_version: version of the policy's weights, equal to the steps done.
        timer: seconds by phase.
    """

    def __init__(
        self,
        config: Config,
        policy: Learner,
        algorithm: Algorithm | None = None,
        critic: Critic | None = None,
        *,
        resume: bool,
        stage: StageRun | None = None,
        held_out: HeldOutPairs | None = None,
    ) -> None:
        self._config = config
        self._stage = stage
        self._held_out = held_out
        self._policy = policy
        self._algorithm = algorithm
        self._critic = critic
        self.timer = PhaseTimer(on_phase=self._announce)
        folder = config.run_dir / "checkpoints"
        self._checkpoints = CheckpointWriter(folder, policy.weight_map, config.checkpoint.keep, config.checkpoint.asynchronous)
        goes_on = resume or (stage is not None and stage.is_carried)
        # rank 0 has perhaps just written it, and another machine may not see it yet
        checkpoint = broadcast_value(whole_checkpoints(folder)[-1] if is_main_rank() else None) if goes_on else None
        state = self._restore(checkpoint) if checkpoint else None
        if stage is None and state is not None and state.stage:
            raise CheckpointError(f"{checkpoint} is of a run with a curriculum; resume with the curriculum of the interrupted run")
        self.step = state.step if state else 0
        self.weight_version = state.weight_version if state else 0
        self._has_compared_logprobs = False
        self._metrics: MetricsWriter | None = None
        self._rollouts: RolloutWriter | None = None
        self._tickets: TicketsWriter | None = None
        self._progress = _progress(config, self.step)
        logged = config.run_dir / "metrics.jsonl"
        first_entropy = first_value(logged, "entropy", self.step) if goes_on and is_main_rank() else None
        self._entropy_floor = EntropyFloor(config.observe.min_entropy, config.observe.min_entropy_share, first_entropy)
        tokenizer = run_tokenizer(config)
        self._examples = Examples(config, tokenizer) if config.kind != "rl" else None
        samples = samples_responses(config)
        with_greedy = algorithm is not None and algorithm.needs_greedy_response
        prompts = self._prompts(tokenizer) if samples and is_main_rank() else None
        self._rollout = (
            RolloutManager(config, tokenizer, policy, self.message, prompts, with_greedy=with_greedy) if samples else None
        )
        if checkpoint and state:
            self._data.restore_data(read_data_state(checkpoint, state))
        self._open_files(resume=goes_on)

    @property
    def rollout(self) -> RolloutManager:
        """Sampling and scoring; an SFT run has it only for evaluation, one on pairs not at all."""
        assert self._rollout is not None
        return self._rollout

    @property
    def examples(self) -> Examples:
        """Examples of an SFT run, or pairs."""
        assert self._examples is not None
        return self._examples

    @property
    def _data(self) -> RolloutManager | Examples:
        return self._examples or self.rollout

    def _sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        state = self._policy.sharded_state(is_loading=is_loading)
        if self._critic is not None:
            state["critic"] = self._critic.sharded_state(is_loading=is_loading)
        return state

    def _learners(self) -> dict[str, Learner]:
        return {"policy": self._policy} | ({} if self._critic is None else {"critic": self._critic})

    def _distributed_optimizer(self) -> dict[str, bool]:
        return {role: learner.engine.role.parallel.distributed_optimizer for role, learner in self._learners().items()}

    @contextmanager
    def _learners_on_device(self) -> Iterator[None]:
        with ExitStack() as stack:
            for learner in self._learners().values():
                stack.enter_context(learner.on_device())
            yield

    @property
    def is_over(self) -> bool:
        """Whether the last step, of the run or of its stage, is done."""
        return self.step >= self._config.steps if self._stage is None else self._stage.progress.is_over

    def _prompts(self, tokenizer: Any) -> Prompts:
        if self._stage is None or self._stage.prompts is None:
            return read_prompts(self._config, tokenizer)
        return prompts_of_stage(self._stage.prompts, self._stage.stages, self._stage.progress.stage)

    def _restore(self, checkpoint: Path) -> RunState:
        if self._stage is not None and self._stage.is_carried:
            # this run has just written it, and other machines may not see it yet
            state = broadcast_value(read_manifest(checkpoint).state if is_main_rank() else None)
        else:
            manifest = check_checkpoint_together(checkpoint, self._policy.weight_map)
            if is_main_rank() and not manifest.has_digests:
                logger.warning(NO_DIGESTS, checkpoint)
            state = manifest.state
            self._restore_models(checkpoint, state)
        if self._algorithm is not None:
            self._algorithm.restore(state.algorithm)
        return state

    def _restore_models(self, checkpoint: Path, state: RunState) -> None:
        if self._critic is not None and not state.has_critic:
            raise CheckpointError(f"{checkpoint} has no critic; resume from a checkpoint of a run with one, or start a new run")
        for role, kind in self._distributed_optimizer().items():
            if (saved := state.distributed_optimizer.get(role, kind)) != kind:
                raise CheckpointError(
                    f"{role}.parallel.distributed_optimizer: is {kind}, and the optimizer state in {checkpoint}, saved with "
                    f"{saved}, can be read with {saved} only; set it to {saved}"
                )
        with self._learners_on_device():
            tensors = load_policy(checkpoint, self._sharded_state(is_loading=True))
            self._policy.load_state(tensors)
            if self._critic is not None:
                self._critic.load_state(tensors["critic"])

    def _open_files(self, *, resume: bool) -> None:
        """The run is accepted from here on: rank 0 says so, and writes over what an interrupted run did after its checkpoint."""
        if is_main_rank():
            config = self._config
            resume_step = self.step if resume else None
            for name in LOGS if resume else ():
                read_log(config.run_dir / name, self.step)  # all of them, before one is written over
            self._metrics = MetricsWriter(config.run_dir, tensorboard=config.observe.tensorboard, resume_step=resume_step)
            if config.rollout.asynchronous is not None or config.rollout.partial is not None:
                self._tickets = TicketsWriter(config.run_dir, resume_step=resume_step)
            self._rollouts = RolloutWriter(config.run_dir, config.observe.rollouts_per_step)
            accept_config(config.run_dir)

    def _announce(self, phase: str) -> None:
        announce_phase(f"{'the rest' if phase == 'other' else phase} of step {self.step + (phase != 'save')}")

    def message(self, line: str) -> None:
        """Print one line, on rank 0."""
        if self._progress is not None:
            self._progress.message(line)

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step; a resumed run has done so already."""
        if self.step == 0 and self._config.evaluation.data is not None:
            metrics = self._evaluate()
            if self._metrics is not None:
                self._metrics.write(0, metrics)

    def _evaluate(self) -> dict[str, float]:
        if self._held_out is not None:
            metrics = self._held_out.evaluate()
            accuracy, loss = metrics["held_out/accuracy"], metrics["held_out/loss"]
            self.message(f"step {self.step}: held-out accuracy {accuracy:.1%}, loss {loss:.4f}")
            return metrics
        if self._config.kind == "sft":
            self.rollout.push_weights(self.weight_version)
        metrics, groups = self.rollout.evaluate()
        if self._rollouts is not None:
            self._rollouts.write(self.step, groups, kind="evaluation")
        self.message(f"step {self.step}: held-out " + ", ".join(f"{name} {value:.1%}" for name, value in metrics.items()))
        return metrics

    def finish_step(
        self,
        results: Sequence[UpdateResult],
        collected: Collected | None = None,
        outputs: TokenOutputs | None = None,
        algorithm_metrics: Mapping[str, float] | None = None,
        critic_results: Sequence[UpdateResult] = (),
    ) -> None:
        """Count the step, watch it, and evaluate, save and log as due."""
        self.step += 1
        self.weight_version += 1
        metrics = step_metrics(results) | dict(algorithm_metrics or {})
        metrics |= {f"critic_{name}": value for name, value in step_metrics(critic_results).items()}
        groups: tuple[RolloutGroup, ...] = ()
        if collected is not None and outputs is not None:
            groups = collected.groups
            metrics |= collected.metrics | self._watch(collected, outputs)
            if is_main_rank() and self._config.rollout.asynchronous is None:
                self.timer.move("generate", "score", collected.score_seconds)
        metrics |= self._evaluate_at_end_or_when_due(collected)
        seconds = self.timer.step_breakdown()
        if self._metrics is not None and self._rollouts is not None and self._progress is not None:
            self._metrics.write(self.step, metrics, seconds)
            self._rollouts.write(self.step, groups)
            if collected is not None and collected.tickets is not None and self._tickets is not None:
                self._tickets.write(self.step, collected.tickets.trained, collected.tickets.dropped)
            self._progress.update(self.step, metrics, seconds)
        # after the step's line: a run killed in between does the step again, and resume never finds a line missing
        is_stopped = stop_is_requested() and not self.is_over
        if self.is_over or is_stopped or _is_due(self.step, self._config.checkpoint.every):
            with self.timer.phase("save"):
                self._save()
        self._checkpoints.poll(blocking=is_stopped)
        if is_stopped:
            raise RunStopped(f"step {self.step} of {self._config.steps} is done and saved; go on with --resume")

    def _evaluate_at_end_or_when_due(self, collected: Collected | None) -> dict[str, float]:
        """The end of a stage, which an evaluation may bring about, is evaluated as the end of the run is."""
        evaluation, metrics = self._config.evaluation, {}
        last_step = self._config.steps if self._stage is None else self._stage.progress.last_step
        is_due = self.step == last_step or _is_due(self.step, evaluation.every)
        if evaluation.data is not None and is_due:
            metrics = self._evaluate_in_time()
        if self._stage is not None and collected is not None:
            progress = self._stage.progress
            progress.observe(self.step, collected.reward_mean, metrics.get(accuracy_name(progress.stage)))
            if evaluation.data is not None and progress.is_over and not is_due:
                metrics = self._evaluate_in_time()
        return metrics

    def _evaluate_in_time(self) -> dict[str, float]:
        with self.timer.phase("evaluate"):
            return self._evaluate()

    def _watch(self, collected: Collected, outputs: TokenOutputs) -> dict[str, float]:
        packed = collected.packed
        if not packed.loss_mask.any():
            return {}
        entropy = float(outputs.entropies[packed.loss_mask].double().mean())
        # tokens of older weights have other log-probabilities, which says nothing of the setup
        is_current = packed.loss_mask & (packed.weight_versions == self.weight_version - 1)
        mean_gap, max_gap = masked_mean_gap(outputs.old, packed.sampler_logprobs, is_current)
        first = not self._has_compared_logprobs
        self._has_compared_logprobs |= bool(is_current.any())
        gap_warning = check_logprob_gap(mean_gap, self._config.observe.max_logprob_gap, self.step, first=first)
        for warning in (gap_warning, self._entropy_floor.check(entropy, self.step)):
            if warning:
                self.message(f"warning: {warning}")
        return {"logprob_gap_mean": mean_gap, "logprob_gap_max": max_gap}

    def _save(self) -> None:
        data = self._data.data_state()
        state = RunState(
            step=self.step,
            weight_version=self.weight_version,
            data=data.position,
            algorithm={} if self._algorithm is None else self._algorithm.state(),
            has_critic=self._critic is not None,
            stage={} if self._stage is None else self._stage.progress.state(),
            distributed_optimizer=self._distributed_optimizer(),
        )
        with self._learners_on_device():
            self._checkpoints.save(self._sharded_state(), state, data.pending)

    def export(self) -> None:
        """Write the policy as the run's Hugging Face folder ``hf``, and the critic as ``hf_critic``; collective."""
        self._checkpoints.poll(blocking=True)
        if not self._config.checkpoint.export:
            return
        self._export(self._policy, self._config.model.path, "hf")
        if self._critic is not None:
            critic = self._config.critic
            self._export(self._critic, (critic and critic.path) or self._config.model.path, "hf_critic")

    def _export(self, learner: Learner, source: Path, name: str) -> None:
        tensors, folder = learner.hugging_face_tensors(), self._config.run_dir / name
        if is_main_rank():
            tokenizer = self._config.model.tokenizer or self._config.model.path
            write_hugging_face_folder(tensors, source, tokenizer, folder, with_value_head=learner.has_value_head)
        else:
            for _ in tensors:
                pass
        self.message(f"exported {folder}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rollout is not None:
            self._rollout.close()
        with ExitStack() as stack:  # whatever fails, the rest is closed too
            if error is None:
                stack.callback(self._checkpoints.close)
            if self._progress is not None:
                stack.callback(self._progress.__exit__, kind, error, trace)
            for log in (self._metrics, self._tickets):
                if log is not None:
                    stack.callback(log.close)


def _progress(config: Config, start_step: int) -> RunProgress | None:
    """The display, on rank 0."""
    if not is_main_rank():
        return None
    return RunProgress(config.steps, start_step=start_step, enabled=config.observe.progress).__enter__()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
