"""The engine that a configuration asks for."""

from pathlib import Path

import torch

from megarl.config.schema import Config
from megarl.rollout.embedded import EmbeddedEngine
from megarl.rollout.protocol import RolloutEngine
from megarl.rollout.vllm import VllmEngine


def build_engine(config: Config, run_dir: Path) -> RolloutEngine:
    """The engine of ``rollout.engine``, not yet started; on rank 0 only."""
    if config.rollout.engine == "vllm":
        return VllmEngine(config, run_dir)
    return EmbeddedEngine(config.model.path, getattr(torch, config.model.dtype), config.rollout.embedded)
