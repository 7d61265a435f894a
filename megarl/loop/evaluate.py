"""``megarl eval``: accuracy of a checkpoint or a Hugging Face folder on the held-out prompts."""

import json
from pathlib import Path

from megarl.config.schema import Config
from megarl.data.template import load_tokenizer
from megarl.loop.rollout import Rollout, read_held_out_prompts
from megarl.train.roles import Policy, is_main_rank
from megarl.weights.checkpoint import MANIFEST, load_policy, read_run_state


def with_checkpoint_model(config: Config, checkpoint: Path) -> Config:
    """The config with the checkpoint as its model where that is a Hugging Face folder, not one that a run saved."""
    if (checkpoint / MANIFEST).exists():
        return config
    model = config.model.model_copy(update={"path": checkpoint, "init": "pretrained"})
    return config.model_copy(update={"model": model})


def evaluate_checkpoint(config: Config, checkpoint: Path, result: Path, whole: Config) -> None:
    """Evaluate and write the metrics as JSON to ``result``; every rank of the world runs this.

    Args:
        config: of ``with_checkpoint_model``; with a curriculum its last stage.
        checkpoint: what a run saved, or the folder of the config's model.
        result: the file to write.
        whole: the run with its curriculum, if it has one.
    """
    policy = Policy(config, total_updates=1)
    version = 0
    if (checkpoint / MANIFEST).exists():
        version = read_run_state(checkpoint, policy.weight_map).weight_version
        with policy.engine.weights.on_device():
            policy.load_weights(load_policy(checkpoint, policy.sharded_weights()))
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    prompts = read_held_out_prompts(whole, tokenizer) if is_main_rank() else None
    rollout = Rollout(config, tokenizer, policy, print, prompts, with_greedy=False)
    try:
        rollout.push_weights(version)
        metrics, _ = rollout.evaluate()
    finally:
        rollout.close()
    if is_main_rank():
        result.write_text(json.dumps(metrics))
