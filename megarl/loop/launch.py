"""From a command to ranks: checks, run folder, processes."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from megarl.config.checks import check
from megarl.config.load import save_config
from megarl.config.models_of import trains_on_pairs
from megarl.config.schema import Config
from megarl.config.stages import configs_of
from megarl.errors import CheckpointError, ConfigError
from megarl.loop.asynchronous import run_asynchronous_rl
from megarl.loop.curriculum import run_curriculum
from megarl.loop.evaluate import evaluate_checkpoint, is_checkpoint, with_checkpoint_model, with_start_as_reference
from megarl.loop.preference import run_preference
from megarl.loop.rl import run_rl
from megarl.loop.sft import run_sft
from megarl.models.scaled_folder import with_scaled_model
from megarl.parallel.launch import launched_rank, run_ranks
from megarl.rewards.evaluating_tasks import refuse_evaluating_tasks
from megarl.weights.checkpoint import whole_checkpoints


def launch_training(config: Config, num_ranks: int, *, resume: bool) -> None:
    """Check the config and run it, on ``num_ranks`` local ranks or as the rank that a launcher placed.

    Raises:
        MegaRLError: the config, the data or the run folder is wrong, or the run failed in a way that names its fix.
    """
    place = launched_rank()
    check(config, place.world_size if place else num_ranks)
    prepares = place is None or place.rank == 0
    if prepares:
        refuse_evaluating_tasks(config)
        _prepare_run_folder(config, resume=resume)
    # ranks that a launcher placed read the models only after their rendezvous with rank 0, which comes after this
    scaled = [with_scaled_model(one, config.run_dir, writes=prepares) for one in configs_of(config)]
    run = scaled[0] if config.curriculum is None else config
    run_ranks(_loop_of(config), (run, resume), place, num_ranks, config.distributed_timeout)


def _loop_of(config: Config) -> Callable[[Config, bool], None]:
    if config.curriculum is not None:
        return run_curriculum
    if config.kind == "sft":
        return run_sft
    if trains_on_pairs(config):
        return run_preference
    return run_rl if config.rollout.asynchronous is None else run_asynchronous_rl


def _prepare_run_folder(config: Config, *, resume: bool) -> None:
    folder = config.run_dir
    has_run = (folder / "metrics.jsonl").exists()
    if resume and not whole_checkpoints(folder / "checkpoints"):
        raise CheckpointError(
            f"--resume: {folder / 'checkpoints'} has no finished checkpoint; start without --resume in another --run-dir"
        )
    if has_run and not resume:
        raise ConfigError(f"run_dir {folder} already holds a run; add --resume to go on with it or choose another --run-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be made: {error}") from error
    save_config(config, folder / "config.yaml")


def launch_evaluation(config: Config, checkpoint: Path, num_ranks: int) -> dict[str, float]:
    """Accuracy of a checkpoint on the config's held-out prompts, with a curriculum as in its last stage, or pairs; empty on the
    ranks above 0 that a launcher placed."""
    whole, config = config, configs_of(config)[-1]
    if config.evaluation.data is None:
        raise ConfigError("evaluation.data is not given; name the held-out rows, e.g. --set evaluation.data.type=jsonl")
    place = launched_rank()
    check(config, place.world_size if place else num_ranks)
    if place is None or place.rank == 0:
        refuse_evaluating_tasks(config)
    with tempfile.TemporaryDirectory(prefix="megarl-eval-") as folder:
        result = Path(folder) / "metrics.json"
        evaluated = with_scaled_model(with_checkpoint_model(config, checkpoint), Path(folder), writes=True)
        if not is_checkpoint(checkpoint):
            evaluated = with_start_as_reference(evaluated, config, Path(folder) / "start")
        changed = evaluated.model_copy(update={"run_dir": Path(folder)})
        run_ranks(evaluate_checkpoint, (changed, checkpoint, result, whole), place, num_ranks, config.distributed_timeout)
        return json.loads(result.read_text()) if result.exists() else {}
