"""The RL loop without an engine: every step trains on the same batch, and keeps what it reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.config.schema import Config
from megarl.loop.collected import Collected
from megarl.loop.evaluation import Evaluation
from megarl.loop.open_run import RunParts
from megarl.loop.run import Run
from megarl.observe.reporter import Reporter
from megarl.types import PackedBatch

OWN_LOGPROBS = {"max_logprob_gap": 1e9}  # observe: no engine has sampled the batch


class SameBatch:
    """In the place of the RolloutManager and of the checkpoints."""

    outlives_updates = False
    phase = "generate"

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed

    def collect(self, step: int) -> Collected:
        return Collected(packed=self.packed, groups=(), metrics={}, score_seconds=0.0, tickets=None, reward_mean=0.0)

    def push_weights(self, version: int) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self, version: int) -> None:
        pass

    def save_if_due(self, data: object) -> None:
        pass


class KeptMetrics(Reporter):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []

    def step(
        self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float], groups: Sequence[Any] = (), tickets: Any = None
    ) -> None:
        self.steps.append((step, dict(metrics)))


def parts_of(config: Config, packed: PackedBatch) -> RunParts[Any]:
    """What ``loop.rl.train`` needs, with nothing around it."""
    run, reporter, data = Run(config.steps), KeptMetrics(), SameBatch(packed)
    evaluation = Evaluation(config.evaluation, run, reporter, None)
    checkpoints: Any = data
    return RunParts(run=run, data=data, evaluation=evaluation, reporter=reporter, checkpoints=checkpoints)
