"""From a command to ranks: checks, run folder, processes."""

import json
import tempfile
from pathlib import Path

import torch.distributed as dist

from megarl.config.checks import check
from megarl.config.load import save_config
from megarl.config.schema import Config
from megarl.errors import CheckpointError, ConfigError
from megarl.loop.evaluate import evaluate_checkpoint
from megarl.loop.rl import run_rl
from megarl.loop.sft import run_sft
from megarl.parallel.launch import join_world, run_local_ranks, started_by_launcher
from megarl.weights.checkpoint import whole_checkpoints


def launch_training(config: Config, num_ranks: int, *, resume: bool) -> None:
    """Check the config and run it, on ``num_ranks`` local ranks or as the rank that torchrun started.

    Raises:
        MegaRLError: the config, the data or the run folder is wrong, or the run failed in a way that names its fix.
    """
    function = run_rl if config.kind == "rl" else run_sft
    if not started_by_launcher():
        check(config, num_ranks)
        _prepare_run_folder(config, resume=resume)
        run_local_ranks(function, (config, resume), num_ranks, config.distributed_timeout)
        return
    join_world(config.distributed_timeout)
    check(config, dist.get_world_size())
    if dist.get_rank() == 0:
        _prepare_run_folder(config, resume=resume)
    function(config, resume)
    dist.destroy_process_group()


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
    """Accuracy of a checkpoint on the config's held-out prompts."""
    if config.evaluation.data is None:
        raise ConfigError("evaluation.data is not given; name the held-out prompts, e.g. --set evaluation.data.type=jsonl")
    check(config, num_ranks)
    with tempfile.TemporaryDirectory(prefix="megarl-eval-") as folder:
        result = Path(folder) / "metrics.json"
        changed = config.model_copy(update={"run_dir": Path(folder)})
        run_local_ranks(evaluate_checkpoint, (changed, checkpoint, result), num_ranks, config.distributed_timeout)
        metrics: dict[str, float] = json.loads(result.read_text())
    return metrics
