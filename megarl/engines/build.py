"""The engine that a configuration asks for."""

from collections.abc import Mapping
from pathlib import Path

import torch

from megarl.config.schema import Config
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import RolloutEngine
from megarl.engines.server_engine import ServerEngine
from megarl.engines.sglang import SGLangEngine
from megarl.engines.vllm import VllmEngine

SERVER_ENGINES: dict[str, type[ServerEngine]] = {"sglang": SGLangEngine, "vllm": VllmEngine}


def build_engine(config: Config, run_dir: Path, weight_shapes: Mapping[str, tuple[int, ...]]) -> RolloutEngine:
    """Build the engine of ``rollout.engine``, not yet started; on rank 0 only.

    Args:
        config: the run.
        run_dir: where a server's log goes.
        weight_shapes: of every Hugging Face tensor that a weight update brings, by name.
    """
    if config.rollout.server_engine is not None:
        return SERVER_ENGINES[config.rollout.server_engine](config, run_dir, weight_shapes)
    return EmbeddedEngine(
        config.model.path,
        getattr(torch, config.model.dtype),
        config.rollout.embedded,
        weight_shapes,
        reports_experts=config.rollout.routing_replay,
    )
