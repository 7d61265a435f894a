"""``megarl eval``: accuracy of a checkpoint or a Hugging Face folder on the held-out prompts or pairs."""

import json
from pathlib import Path

from megarl.config.models import reference_of
from megarl.config.schema import Config
from megarl.data.tokenizer import run_tokenizer
from megarl.errors import ConfigError
from megarl.loop.main_rank import on_main_rank
from megarl.loop.pairs import HeldOutPairs
from megarl.loop.prompts import read_held_out_prompts
from megarl.loop.rollout_manager import RolloutManager
from megarl.models.scaled_folder import with_scaled_model
from megarl.train.learner import Learner
from megarl.train.roles import Reference, build_learner
from megarl.weights.checkpoint import POLICY, check_checkpoint_together, load_policy
from megarl.weights.manifest import MANIFEST


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a run saved it; else it is a Hugging Face folder."""
    return (folder / MANIFEST).exists() or (folder / POLICY).is_dir()


def with_checkpoint_model(config: Config, checkpoint: Path) -> Config:
    """Return the config with the checkpoint as its model where that is a Hugging Face folder, not one that a run saved."""
    if is_checkpoint(checkpoint):
        return config
    model = config.model.model_copy(update={"path": checkpoint, "init": "pretrained"})
    return config.model_copy(update={"model": model})


def with_start_as_reference(evaluated: Config, config: Config, folder: Path) -> Config:
    """Return a preference run's config of ``with_checkpoint_model`` whose reference stays what the run's policy starts from.

    Args:
        evaluated: the config with the checkpoint as its model.
        config: the run.
        folder: temporary, for a model with the run's RoPE scaling.

    Raises:
        ConfigError: what it starts from is in no folder.
    """
    given = config.reference.path if config.reference is not None else None
    if not config.trains_on_pairs or not config.has_reference or given is not None:
        return evaluated
    if config.model.init == "random":
        raise ConfigError(
            "model.init: random weights, which the loss compares with, cannot be drawn again beside another model; evaluate a "
            "checkpoint of the run, or set reference.path"
        )
    start = with_scaled_model(config, folder, writes=True).model.path
    return evaluated.model_copy(update={"reference": reference_of(config).role.model_copy(update={"path": start})})


def evaluate_checkpoint(config: Config, checkpoint: Path, result: Path, whole: Config) -> None:
    """Evaluate and write the metrics as JSON to ``result``; every rank of the world runs this.

    Args:
        config: of ``with_checkpoint_model``; with a curriculum its last stage.
        checkpoint: what a run saved, or the folder of the config's model.
        result: the file to write.
        whole: the run with its curriculum, if it has one.
    """
    learner = build_learner(config, total_updates=1)
    version = 0
    if is_checkpoint(checkpoint):
        version = check_checkpoint_together(checkpoint, learner.weight_map).state.weight_version
        with learner.engine.weights.on_device():
            learner.load_weights(load_policy(checkpoint, learner.sharded_weights()))
    if config.trains_on_pairs:
        reference = Reference(config) if config.has_reference else None
        metrics = HeldOutPairs(config, learner, reference).evaluate()
    else:
        metrics = _evaluate_on_prompts(config, whole, learner, version)
    on_main_rank(lambda: result.write_text(json.dumps(metrics)))


def _evaluate_on_prompts(config: Config, whole: Config, policy: Learner, version: int) -> dict[str, float]:
    tokenizer = run_tokenizer(config)
    prompts = on_main_rank(lambda: read_held_out_prompts(whole, tokenizer))
    rollout = RolloutManager(config, tokenizer, policy, print, prompts, with_greedy=False)
    try:
        rollout.push_weights(version)
        metrics, _ = rollout.evaluate()
    finally:
        rollout.close()
    return metrics
