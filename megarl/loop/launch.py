"""From a command to ranks: checks, run folder, processes."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from megarl.config.checks import check
from megarl.config.schema import Config, Rows
from megarl.config.stages import configs_of
from megarl.config.unused_settings import unused_settings
from megarl.engines.argument_check import check_engine_arguments
from megarl.errors import ConfigError, RunStopped
from megarl.loop.curriculum import run_curriculum
from megarl.loop.evaluate import evaluate_checkpoint, is_checkpoint, with_checkpoint_model, with_start_as_reference
from megarl.loop.preference import run_preference
from megarl.loop.rl import run_rl
from megarl.loop.run_folder import run_folder
from megarl.loop.sft import run_sft
from megarl.loop.stop_signals import stop_on_signals
from megarl.models.scaled_folder import with_scaled_model
from megarl.parallel.launch import launched_rank, run_ranks
from megarl.rewards.start_checks import refuse_evaluating_tasks

logger = logging.getLogger(__name__)

LOOPS: Mapping[Rows, Callable[[Config, bool], None]] = {"prompts": run_rl, "examples": run_sft, "pairs": run_preference}


def launch_training(config: Config, num_ranks: int, *, resume: bool) -> None:
    """Check the config and run it, on ``num_ranks`` local ranks or as the rank that a launcher placed.

    Raises:
        MegaRLError: the config, the data or the run folder is wrong, or the run failed in a way that names its fix.
    """
    launched = launched_rank()
    check(config, launched.world_size if launched else num_ranks)
    prepares = launched is None or launched.rank == 0
    if prepares:
        refuse_evaluating_tasks(config)
        for one in configs_of(config):
            check_engine_arguments(one)
        _warn_of_lost_work(config)
    with ExitStack() as stack:
        stack.enter_context(stop_on_signals(forks_ranks=launched is None))
        if prepares:
            stack.enter_context(run_folder(config, resume=resume))
            for line in unused_settings(config):
                print(f"notice: {line}", flush=True)
        # ranks that a launcher placed read the models only after their rendezvous with rank 0, which comes after this
        scaled = [with_scaled_model(one, config.run_dir, writes=prepares) for one in configs_of(config)]
        run = scaled[0] if config.curriculum is None else config
        try:
            run_ranks(_loop_of(config), (run, resume), launched, num_ranks, config.distributed_timeout, config.run_dir)
        except RunStopped:
            if prepares:  # one line, and one exit status that says so
                raise


def _warn_of_lost_work(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Warn where a launcher may start the command again, which it can do only from a checkpoint."""
    slurm, restarts = "SLURM_JOB_ID" in environment, environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if config.checkpoint.every == 0 and (slurm or restarts):
        launcher = "SLURM may requeue this job" if slurm else "torchrun may start this run again"
        logger.warning(
            "warning: checkpoint.every is 0 and %s: a run that is killed without a signal begins again from its first step; "
            "set checkpoint.every",
            launcher,
        )


def _loop_of(config: Config) -> Callable[[Config, bool], None]:
    return LOOPS[config.rows] if config.curriculum is None else run_curriculum


def launch_evaluation(config: Config, checkpoint: Path, num_ranks: int) -> dict[str, float]:
    """Accuracy of a checkpoint on the config's held-out prompts, with a curriculum as in its last stage, or pairs; empty on the
    ranks above 0 that a launcher placed."""
    whole, config = config, configs_of(config)[-1]
    if config.evaluation.data is None:
        raise ConfigError("evaluation.data is not given; name the held-out rows, e.g. --set evaluation.data.type=jsonl")
    launched = launched_rank()
    check(config, launched.world_size if launched else num_ranks)
    if launched is None or launched.rank == 0:
        refuse_evaluating_tasks(config)
        check_engine_arguments(config)
    with tempfile.TemporaryDirectory(prefix="megarl-eval-") as folder:
        result = Path(folder) / "metrics.json"
        evaluated = with_scaled_model(with_checkpoint_model(config, checkpoint), Path(folder), writes=True)
        if not is_checkpoint(checkpoint):
            evaluated = with_start_as_reference(evaluated, config, Path(folder) / "start")
        changed = evaluated.model_copy(update={"run_dir": Path(folder)})
        run_ranks(evaluate_checkpoint, (changed, checkpoint, result, whole), launched, num_ranks, config.distributed_timeout)
        return json.loads(result.read_text()) if result.exists() else {}
