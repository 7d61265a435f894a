"""Activations that wait in host memory change no gradient, and are those of layers, never weights."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.cli.parity import ParityRun, parse_layout
from megarl.train.offload import ActivationOffload
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5


@pytest.mark.parametrize(
    ("family", "layout", "recompute"),
    [
        ("qwen2", "tp=2,pp=2,vpp=2,sequence_parallel=true,max_tokens_per_micro_batch=60", "none"),
        ("qwen3", "cp=4,context_parallel_method=ring", "none"),
        ("llama", "cp=2,pp=2,context_parallel_method=all_to_all", "full"),
        ("mixtral", "dp=2,ep=2", "selective"),
    ],
)
def test_gradients_are_those_of_one_rank_without(tmp_path: Path, family: str, layout: str, recompute: str) -> None:
    write_tiny_model(tmp_path, family)
    run = ParityRun(tiny_config(tmp_path), PROMPTS, tmp_path)
    run.set_policy(recompute=recompute, offload_activations=True)
    row = run.compare_layout(layout, parse_layout(layout))
    assert max(row.worst_gap, row.loss_gap, row.norm_gap) <= BOUND, row


def test_with_full_recomputation_the_inputs_of_layers_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four layers and two sequences in one micro-batch: four inputs, and what the norm behind the layers keeps."""
    moved = tmp_path / "moved"
    to_host = ActivationOffload._to_host

    def noted(self: ActivationOffload, tensor: Tensor) -> Tensor:
        with moved.open("a") as file:
            print(*tensor.shape, file=file)
        host = to_host(self, tensor)
        assert torch.equal(host, tensor) and host.data_ptr() != tensor.data_ptr()
        return host

    monkeypatch.setattr(ActivationOffload, "_to_host", noted)
    write_tiny_model(tmp_path, "llama")
    run = ParityRun(tiny_config(tmp_path), PROMPTS[:2], tmp_path)
    run.set_policy(recompute="full", offload_activations=True, max_tokens_per_micro_batch=4096)
    run.compare_layout("one rank", parse_layout("dp=1"))
    ((shape, number),) = Counter(moved.read_text().splitlines()).items()
    assert shape.split()[1:] == ["1", "64"]  # tokens, 1, hidden size
    assert number == 4 + 3
