"""What a run keeps: checkpoints to go on from, and its models at the end."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megarl.algorithms.algorithm import Algorithm
from megarl.config.models import critic_of
from megarl.config.schema import Config
from megarl.errors import CheckpointError, RunStopped
from megarl.loop.main_rank import from_main_rank
from megarl.loop.run import Run
from megarl.loop.stop_signals import stop_is_requested
from megarl.train.learner import Learner
from megarl.train.roles import is_main_rank
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


class TrainingData(Protocol):
    """Where the batches of a run come from; every rank calls every method."""

    def data_state(self) -> DataState:
        """Return the position in the data, on rank 0."""

    def restore_data(self, state: DataState) -> None:
        """Go on from that position."""


class Checkpoints:
    """Restores a run, saves it after its steps and exports its models; every rank calls every method.

    Args:
        config: the run, or its stage.
        run: its position, which ``restore`` sets.
        learners: by role ``policy`` and, where there is one, ``critic``.
        algorithm: the RL method; None for the other kinds.
    """

    def __init__(self, config: Config, run: Run, learners: Mapping[str, Learner], algorithm: Algorithm | None) -> None:
        self._config = config
        self._run = run
        self._learners = learners
        self._policy, self._critic = learners["policy"], learners.get("critic")
        self._algorithm = algorithm
        self._folder = config.run_dir / "checkpoints"
        self._restored: tuple[Path, RunState] | None = None
        self._writer = CheckpointWriter(
            self._folder, self._policy.weight_map, config.checkpoint.keep, config.checkpoint.asynchronous
        )

    def restore(self, *, is_carried: bool) -> None:
        """Set position, method and models to the newest checkpoint's.

        Args:
            is_carried: the models hold what it has already.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        # rank 0 has perhaps just written it, and another machine may not see it yet
        checkpoint = from_main_rank(lambda: whole_checkpoints(self._folder)[-1])
        if is_carried:
            state = from_main_rank(lambda: read_manifest(checkpoint).state)
        else:
            manifest = check_checkpoint_together(checkpoint, self._policy.weight_map)
            if is_main_rank() and not manifest.has_digests:
                logger.warning(NO_DIGESTS, checkpoint)
            state = manifest.state
            self._restore_models(checkpoint, state)
        if self._algorithm is not None:
            self._algorithm.restore(state.algorithm)
        if self._run.stage is None and state.stage:
            raise CheckpointError(f"{checkpoint} is of a run with a curriculum; resume with the curriculum of the interrupted run")
        self._run.step, self._run.weight_version = state.step, state.weight_version
        self._restored = checkpoint, state

    def restore_data(self, data: TrainingData) -> None:
        """Set the data to the position of the checkpoint that ``restore`` found, if it was called."""
        if self._restored is not None:
            data.restore_data(read_data_state(*self._restored))

    def save_if_due(self, data: TrainingData) -> None:
        """Save after a step: at the end, every ``checkpoint.every`` steps, and where a signal asks the run to stop.

        To be called when the step's line is logged: a run killed in between does the step again, and resume never finds a line
        missing.

        Raises:
            RunStopped: a signal came; the run is saved.
        """
        run = self._run
        is_stopped = stop_is_requested() and not run.is_over
        if run.is_over or is_stopped or run.is_due(self._config.checkpoint.every):
            with run.timer.phase("save"):
                self._save(data.data_state())
        self._writer.poll(blocking=is_stopped)
        if is_stopped:
            raise RunStopped(f"step {run.step} of {self._config.steps} is done and saved; go on with --resume")

    def export(self, message: Callable[[str], None]) -> None:
        """Write the policy as the run's Hugging Face folder ``hf``, and the critic as ``hf_critic``.

        Args:
            message: called with one line for people when a folder is written.
        """
        self._writer.poll(blocking=True)
        if not self._config.checkpoint.export:
            return
        message(f"exported {self._export(self._policy, self._config.model.path, 'hf')}")
        if self._critic is not None:
            source = critic_of(self._config).path
            message(f"exported {self._export(self._critic, source, 'hf_critic')}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._writer.close()

    def _save(self, data: DataState) -> None:
        state = RunState(
            step=self._run.step,
            weight_version=self._run.weight_version,
            data=data.position,
            algorithm={} if self._algorithm is None else self._algorithm.state(),
            has_critic=self._critic is not None,
            stage={} if self._run.stage is None else self._run.stage.state(),
            distributed_optimizer=self._distributed_optimizer(),
        )
        with self._learners_on_device():
            self._writer.save(self._sharded_state(), state, data.pending)

    def _export(self, learner: Learner, source: Path, name: str) -> Path:
        tensors, folder = learner.hugging_face_tensors(), self._config.run_dir / name
        if is_main_rank():
            tokenizer = self._config.model.tokenizer or self._config.model.path
            write_hugging_face_folder(tensors, source, tokenizer, folder, with_value_head=learner.has_value_head)
        else:
            for _ in tensors:
                pass
        return folder

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

    def _sharded_state(self, *, is_loading: bool = False) -> dict[str, Any]:
        state = self._policy.sharded_state(is_loading=is_loading)
        if self._critic is not None:
            state["critic"] = self._critic.sharded_state(is_loading=is_loading)
        return state

    def _distributed_optimizer(self) -> dict[str, bool]:
        return {role: learner.engine.role.parallel.distributed_optimizer for role, learner in self._learners.items()}

    @contextmanager
    def _learners_on_device(self) -> Iterator[None]:
        with ExitStack() as stack:
            for learner in self._learners.values():
                stack.enter_context(learner.on_device())
            yield
