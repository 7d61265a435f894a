"""A policy on forked trainer ranks, and a real engine on rank 0, as the tests of weight updates use them."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from megarl.config.schema import Config
from megarl.engines.server_engine import ServerEngine
from megarl.loop.weight_sync import MainRankEngine, WeightSync
from megarl.train.roles import Policy
from megarl.weights.files.sources import SafetensorsSource
from megarl.weights.transfer import load_weights
from real_engines import all_gone, make_engine, server_processes
from tiny import write_tiny_model


@torch.no_grad()
def write_shuffled_model(folder: Path, seed: int, family: str, **overrides: Any) -> PreTrainedModel:
    """The tiny model of a family with the rows of every parameter in another order for each seed."""
    model = write_tiny_model(folder, family, **overrides)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(parameter[torch.randperm(len(parameter))])
    model.save_pretrained(folder)
    return model


@dataclass
class LiveSync:
    """One rank's part. ``engine``, ``run`` and ``warnings`` are of rank 0."""

    policy: Policy
    sync: WeightSync
    engine: ServerEngine | None
    main: MainRankEngine | None
    warnings: list[str]

    def take(self, model: Path) -> None:
        """Give the policy the weights of a model folder."""
        engine, weight_map = self.policy.engine, self.policy.weight_map
        with engine.weights.on_device():
            load_weights(engine.chunks, SafetensorsSource(model, weight_map), weight_map, engine.layout)


@contextmanager
def live_sync(
    folder: Path, name: str, policy_settings: dict[str, Any], transfer: dict[str, Any], **section: Any
) -> Iterator[LiveSync]:
    """The policy of ``folder``/model; on rank 0 the engine, started, and ended with all its processes."""
    engine, main, warnings = None, None, []
    values: dict[str, Any] = make_engine(name, folder, **section).config.model_dump()
    values |= {"policy": policy_settings | {"max_tokens_per_micro_batch": 64}, "distributed_timeout": 120.0}
    values["rollout"]["weight_transfer"] = transfer
    config = Config.model_validate(values)
    policy = Policy(config, 1)
    if dist.get_rank() == 0:
        runner = asyncio.Runner()
        engine = make_engine(name, folder, **section)
        runner.run(engine.start())
        main = MainRankEngine(engine, runner.run, warnings.append)
    try:
        yield LiveSync(policy, WeightSync(config, policy, main), engine, main, warnings)
    finally:
        if engine is not None:
            processes = server_processes(engine) if engine.server.death is None else []
            runner.run(engine.close())
            runner.close()
            assert all_gone(processes), os.getpid()
