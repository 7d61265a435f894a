"""From a config and its models to a run that may begin, or go on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from megarl.algorithms.algorithm import Algorithm
from megarl.config.schema import Config
from megarl.loop.checkpoints import Checkpoints, TrainingData
from megarl.loop.evaluation import Evaluation, Measure
from megarl.loop.main_rank import on_main_rank
from megarl.loop.promotion import StageProgress
from megarl.loop.run import Run
from megarl.loop.run_folder import accept_config
from megarl.observe.reporter import MainReporter, Reporter
from megarl.train.learner import Learner

Data = TypeVar("Data", bound=TrainingData)

MakeData = Callable[[Run, Reporter, ExitStack], tuple[Data, Measure | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts(Generic[Data]):
    """A run's position and what works beside its loop, each called by the loop by name.

    Attributes:
        run: the position.
        data: what the batches come from.
        evaluation: measures the run as it is due.
        reporter: tells people, on rank 0.
        checkpoints: saves the run as it is due, and exports its models.
    """

    run: Run
    data: Data
    evaluation: Evaluation
    reporter: Reporter
    checkpoints: Checkpoints


@contextmanager
def open_run(
    config: Config,
    learners: Mapping[str, Learner],
    make_data: MakeData[Data],
    *,
    algorithm: Algorithm | None = None,
    resume: bool,
    stage: StageProgress | None = None,
    is_carried: bool = False,
) -> Iterator[RunParts[Data]]:
    """Restore the run where it goes on, open its data and its files, and close all of it at the end; collective.

    Args:
        config: the run, or its stage.
        learners: the models that it trains, by role ``policy`` and ``critic``; restored here.
        make_data: gives the data and what an evaluation measures; what is to be closed it gives to the stack.
        algorithm: the RL method, restored likewise; None for the other kinds.
        resume: go on from the newest checkpoint.
        stage: of a curriculum, position in it.
        is_carried: the models hold what the newest checkpoint has, from which the rest is restored.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another run.
        MegaRLError: the data or the run folder is wrong, or the engine does not start.
    """
    run = Run(config.steps, stage)
    goes_on = resume or is_carried
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(config, run, learners, algorithm))
        if goes_on:
            checkpoints.restore(is_carried=is_carried)
        reporter = on_main_rank(lambda: MainReporter(config, run.step)) or Reporter()
        stack.callback(reporter.close)
        data, measure = make_data(run, reporter, stack)
        if goes_on:
            checkpoints.restore_data(data)
        reporter.open_files(run.step if goes_on else None)
        on_main_rank(lambda: accept_config(config.run_dir))
        evaluation = Evaluation(config.evaluation, run, reporter, measure)
        yield RunParts(run=run, data=data, evaluation=evaluation, reporter=reporter, checkpoints=checkpoints)
