"""The plan of DeepSeek-V3 from 4,096 training ranks to an engine of 64, against sums written out by hand."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megarl.config.schema import ModelConfig, ParallelConfig
from megarl.families.base.engine_rules import EngineLayout
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.plan import Plan, plan_transfer
from megarl.reshard.plan.report import LinkSpeeds, PlanReport, report

MODEL = Path(__file__).parent.parent.parent / "benchmarks" / "deepseek_v3"
HIDDEN, VOCABULARY, EXPERT = 7168, 129280, 3 * 7168 * 2048


@pytest.fixture(scope="module", params=[("vllm", 1), ("sglang", 8)])
def planned(request: pytest.FixtureRequest) -> Iterator[tuple[str, Plan, PlanReport]]:
    engine, etp = request.param
    training = ParallelConfig(
        tp=8, pp=16, ep=32, etp=etp, num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=2
    )
    layout = EngineLayout(engine=engine, tp=16, ep=64, replicas=1)
    model = ModelConfig(path=MODEL, dtype="bfloat16")
    plan = plan_transfer(model, training, 4096, layout, Machines(gpus_per_node=8), 512 << 20)
    yield engine, plan, report(plan, LinkSpeeds(within_node=450e9, between_nodes=50e9))


def rank_bytes(engine: str) -> int:
    """Of one engine rank, all alike: the vocabulary divides by 64 and needs no padding."""
    norms = 2 * HIDDEN + 1536 + 512
    replicated = (1536 + 512 + 64) * HIDDEN
    cut_by_tp = 128 * (128 + 64) * 1536 + 128 * (128 + 128) * 512 + HIDDEN * 128 * 128
    attention = norms + replicated + cut_by_tp // 16
    dense_mlp, shared = 3 * HIDDEN * 18432, EXPERT
    dense_ranks = 16 if engine == "vllm" else 64
    layers = 61 * attention + 3 * dense_mlp // dense_ranks
    moe = 58 * (4 * EXPERT + 256 * HIDDEN + (shared if engine == "vllm" else shared // 64))
    vocabulary = VOCABULARY // 16 + VOCABULARY // dense_ranks
    return 2 * (layers + moe + vocabulary * HIDDEN + HIDDEN) + 58 * 256 * 4


def test_every_rank_gets_its_bytes(planned: tuple[str, Plan, PlanReport]) -> None:
    engine, _, result = planned
    assert result.received.sum(axis=1).tolist() == [rank_bytes(engine)] * 64
    assert result.bytes_sent == result.bytes_needed == 64 * rank_bytes(engine)


def test_balance_and_memory(planned: tuple[str, Plan, PlanReport]) -> None:
    _, plan, result = planned
    assert result.worst_over_mean <= 1.1
    assert (result.sent.sum(axis=1) > 0).all()
    assert max(result.send_buffer, result.receive_buffer) <= 512 << 20
    in_bucket = np.zeros((result.buckets, 4096))
    np.add.at(in_bucket, (plan.bucket, plan.sender), plan.message_bytes)
    assert in_bucket.max() == result.send_buffer


def test_experts_come_from_ranks_that_hold_them(planned: tuple[str, Plan, PlanReport]) -> None:
    """Expert e is on ep rank e // 8, layer l on stage 0 (l < 3), 15 (l ≥ 59) or (l - 3) // 4 + 1; engine rank e // 4 gets it."""
    engine, plan, _ = planned
    etp = 1 if engine == "vllm" else 8
    for receiver in (0, 63):
        seen = set()
        for message in plan.for_receiver(receiver):
            for copy in message.copies:
                parts = copy.tensor.split(".")
                if parts[3:5] == ["mlp", "experts"]:
                    layer, expert = int(parts[2]), int(parts[5])
                    stage = 0 if layer < 3 else 15 if layer >= 59 else (layer - 3) // 4 + 1
                    assert expert // 4 == receiver
                    assert (message.sender // 256, message.sender // etp % 32) == (stage, expert // 8)
                    seen.add((layer, expert, parts[6]))
        assert len(seen) == 58 * 4 * 3
