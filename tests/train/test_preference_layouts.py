"""Losses of preference pairs, of policies and reward models: one rank against transformers, every layout against one rank."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from megarl.cli.parity import ParityRun, parse_layout
from megarl.errors import DataError
from tiny import tiny_config, write_tiny_model

BOUND = 1e-5
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13], [14, 15], [16]]
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5, "label_smoothing": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0, "simpo_margin": 0.5},
    "orpo": {"loss": "orpo", "beta": 0.5},
    "reward": {"reward_margin": 0.2, "reward_centering": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.5},
    "robust": {"loss": "robust", "beta": 0.5, "label_smoothing": 0.1},
}
ALL_TO_ALL = "context_parallel_method=all_to_all"
RING = "context_parallel_method=ring"
HYBRID = "context_parallel_method=hybrid,ulysses_size=2"
SEQUENCE = "sequence_parallel=true"
LAYOUTS = [
    ("dpo", "dp=7,distributed_optimizer=false"),  # one replica has no pair
    ("dpo", "dp=3,max_tokens_per_micro_batch=30"),
    ("dpo", f"tp=2,dp=2,{SEQUENCE},max_tokens_per_micro_batch=24"),
    ("dpo", "pp=4,max_tokens_per_micro_batch=24"),
    ("dpo", "pp=2,vpp=2,dp=2,max_tokens_per_micro_batch=24"),
    ("dpo", "cp=2,max_tokens_per_micro_batch=40"),
    ("dpo", f"cp=4,{ALL_TO_ALL}"),
    ("dpo", f"cp=8,{RING}"),
    ("dpo", f"cp=4,{HYBRID}"),
    ("dpo", f"tp=2,cp=2,pp=2,{SEQUENCE}"),
    ("simpo", f"cp=2,pp=2,vpp=2,{RING},max_tokens_per_micro_batch=40"),
    ("orpo", f"cp=8,{RING}"),
    ("ipo", f"tp=2,cp=4,{HYBRID},{SEQUENCE}"),
    ("robust", f"cp=2,dp=2,{ALL_TO_ALL},max_tokens_per_micro_batch=40"),
    ("dpo", "dp=2,reference.first_rank=1,reference.tp=2"),
    ("reward", "dp=3,max_tokens_per_micro_batch=30"),
    ("reward", f"tp=2,pp=2,cp=2,{SEQUENCE}"),
    ("reward", f"cp=4,{HYBRID}"),
    ("reward", "pp=2,vpp=2,dp=2,distributed_optimizer=false,max_tokens_per_micro_batch=26"),
    ("dpo", f"cp=2,reference.first_rank=2,reference.cp=4,reference.{RING}"),
]


def preference_run(folder: Path, loss: str) -> ParityRun:
    kind = "reward_model" if loss == "reward" else "preference"
    config = tiny_config(folder, kind=kind, preference=LOSSES[loss], rollout={"max_new_tokens": 6})
    return ParityRun(config, PROMPTS, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParityRun]:
    found = {}
    for loss in LOSSES:
        folder = tmp_path_factory.mktemp(loss)
        write_tiny_model(folder, "qwen3")
        found[loss] = preference_run(folder, loss)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("loss", "layout"), LAYOUTS)
def test_gradients_equal_one_rank(runs: dict[str, ParityRun], loss: str, layout: str) -> None:
    row = runs[loss].compare_layout(layout, parse_layout(layout))
    assert max(row.worst_gap, row.loss_gap, row.norm_gap, row.output_gap) <= BOUND, row


@pytest.mark.timeout(60)
def test_with_experts(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3_moe")
    run = preference_run(tmp_path, "dpo")
    layout = "cp=2,ep=2,max_tokens_per_micro_batch=40"
    row = run.compare_layout(layout, parse_layout(layout))
    assert max(row.worst_gap, row.loss_gap, row.norm_gap, row.output_gap) <= BOUND, row


def mean_or_sum(model: PreTrainedModel, tokens: Tensor, prompt: int, *, is_mean: bool) -> Tensor:
    logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    chosen = [logprobs[position - 1, tokens[position]] for position in range(prompt, len(tokens))]
    total = torch.stack(chosen).sum()
    return total / len(chosen) if is_mean else total


def loop_written(loss: str, model: PreTrainedModel, folder: Path) -> Tensor:
    """DPO with smoothed labels, or SimPO, one unpacked response at a time."""
    packed, scores = torch.load(folder / "batch.pt", weights_only=False)
    starts = packed.cu_seqlens.tolist()
    compared, responses = [], []
    for start, stop in itertools.pairwise(starts):
        mask = packed.loss_mask[start:stop]
        prompt = int((~mask).sum())
        value = mean_or_sum(model, packed.token_ids[start:stop], prompt, is_mean=loss == "simpo")
        frozen = sum(float(x) for x in scores.reference[start:stop][mask]) if loss == "dpo" else 0.0
        compared.append(value - frozen)
        responses.append(stop - start - prompt)
    assert min(responses) == 1 and max(responses) > 3  # ragged, with responses of one token
    terms = []
    for chosen, rejected in zip(compared[::2], compared[1::2], strict=True):
        if loss == "dpo":
            right = torch.sigmoid(0.5 * (chosen - rejected))
            terms.append(-0.9 * right.log() - 0.1 * (1 - right).log())
        else:
            terms.append(-torch.sigmoid(2.0 * (chosen - rejected) - 0.5).log())
    return sum(terms, torch.zeros((), dtype=torch.float64)) / len(terms)


def assert_same_gradient(run: ParityRun, model: torch.nn.Module, loss: Tensor) -> None:
    """The run's loss and gradients on one rank are those of ``loss``, made of the float64 ``model``."""
    loss.backward()
    assert run.reference.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gap = (run.reference.gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert gap <= BOUND, (name, gap)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_gradient_equals_a_loop_over_transformers(tmp_path: Path, loss: str) -> None:
    model = write_tiny_model(tmp_path, "llama").double()
    run = preference_run(tmp_path, loss)
    expected = loop_written(loss, model, tmp_path)
    assert_same_gradient(run, model, expected)


def test_gradient_of_a_reward_model_equals_a_loop_over_transformers(tmp_path: Path) -> None:
    """Started from a folder of transformers with one label."""
    write_tiny_model(tmp_path, "llama")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    run = preference_run(tmp_path, "reward")
    packed, _ = torch.load(tmp_path / "batch.pt", weights_only=False)
    scores = []
    for start, stop in itertools.pairwise(packed.cu_seqlens.tolist()):
        tokens = packed.token_ids[start : stop - 1]  # but the one behind the end
        scores.append(model(tokens[None], attention_mask=torch.ones_like(tokens[None])).logits[0, 0])
    terms = [
        -torch.sigmoid(chosen - rejected - 0.2).log() + 0.1 * (chosen + rejected) ** 2
        for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
    ]
    expected = torch.stack(terms).mean()
    assert_same_gradient(run, model, expected)


def test_a_pair_that_no_micro_batch_holds_is_refused(runs: dict[str, ParityRun]) -> None:
    """Each of its responses would fit."""
    with pytest.raises(DataError, match=r"group \d, sequences \d to \d, has 1\d tokens, above max_tokens_per_micro_batch = 12"):
        runs["dpo"].compare_layout("small", parse_layout("max_tokens_per_micro_batch=12"))
