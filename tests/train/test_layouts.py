"""Every layout gives one rank's loss, gradient norm and gradients (megarl parity's own machinery, on tiny models)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.cli.parity import ParityRun, parse_layout
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5
ULYSSES = "context_parallel_method=all_to_all"
RING = "context_parallel_method=ring"
HYBRID = "context_parallel_method=hybrid,ulysses_size=2"
LAYOUTS = [
    "dp=2",
    "dp=4,distributed_optimizer=false",
    "dp=2,overlap_gradient_reduce=true",
    "dp=3,max_tokens_per_micro_batch=40",
    "tp=2",
    "tp=2,sequence_parallel=true",
    "tp=4,sequence_parallel=true",
    "tp=4,distributed_optimizer=false",
    "tp=2,dp=2,max_tokens_per_micro_batch=33",
    "pp=2",
    "pp=4,max_tokens_per_micro_batch=25",
    "pp=2,dp=2,distributed_optimizer=false",
    "pp=2,vpp=2",
    "pp=2,vpp=2,dp=2,overlap_gradient_reduce=true,max_tokens_per_micro_batch=30",
    "pp=2,vpp=2,tp=2,sequence_parallel=true",
    "cp=2",
    f"cp=2,{ULYSSES}",
    "cp=4",
    f"cp=4,{ULYSSES}",
    f"cp=2,{RING}",
    f"cp=8,{RING}",
    f"cp=4,{HYBRID}",
    f"cp=3,dp=2,{RING},max_tokens_per_micro_batch=60",
    f"cp=2,pp=2,vpp=2,{RING}",
    f"tp=2,cp=4,{RING},sequence_parallel=true",
    f"cp=4,pp=2,{HYBRID},max_tokens_per_micro_batch=50",
    "cp=2,dp=2,distributed_optimizer=false",
    "cp=2,pp=2,max_tokens_per_micro_batch=50",
    f"cp=2,pp=2,vpp=2,{ULYSSES}",
    "tp=2,cp=2,sequence_parallel=true",
    f"tp=2,cp=2,{ULYSSES},sequence_parallel=true",
    "tp=2,pp=2,dp=2,sequence_parallel=true",
    "tp=2,pp=2,cp=2,sequence_parallel=true,max_tokens_per_micro_batch=40",
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def rl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParityRun]:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    yield ParityRun(tiny_config(folder), PROMPTS, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grpo_gradients_equal_one_rank(rl: ParityRun, layout: str) -> None:
    row = rl.compare_layout(layout, parse_layout(layout))
    assert row.worst_gap <= BOUND, row
    assert row.loss_gap <= BOUND and row.norm_gap <= BOUND, row


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def sft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParityRun]:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    yield ParityRun(tiny_config(folder, kind="sft"), PROMPTS, folder)


@pytest.mark.parametrize("layout", LAYOUTS[::3])
def test_sft_gradients_equal_one_rank(sft: ParityRun, layout: str) -> None:
    row = sft.compare_layout(layout, parse_layout(layout))
    assert row.worst_gap <= BOUND, row
    assert row.loss_gap <= BOUND and row.norm_gap <= BOUND, row


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(tmp_path: Path, recompute: str) -> None:
    write_tiny_model(tmp_path, "olmo2")  # whose norms over all heads are sums over ranks, in the recomputation too
    run = ParityRun(tiny_config(tmp_path), PROMPTS, tmp_path)
    run.set_policy(recompute=recompute)
    row = run.compare_layout(recompute, parse_layout("tp=2,pp=2,sequence_parallel=true"))
    assert row.worst_gap <= BOUND, row


def test_ranks_without_sequences_change_no_gradient(tmp_path: Path) -> None:
    """3 sequences on 4 replicas, and on 2 replicas of which one has fewer than the rounds of its pipeline."""
    write_tiny_model(tmp_path, "qwen3_moe")
    run = ParityRun(tiny_config(tmp_path), PROMPTS[1:2], tmp_path)
    for layout in ("dp=4,ep=2", "dp=2,pp=2,vpp=2", "dp=2,tp=2,pp=2,vpp=2,ep=2,sequence_parallel=true"):
        row = run.compare_layout(layout, parse_layout(layout))
        assert row.worst_gap <= BOUND and row.loss_gap <= BOUND and row.norm_gap <= BOUND, row
