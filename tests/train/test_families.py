"""Experts and latent attention in many layouts: gradients and their norm are those of transformers' own model, and the optimizer
reaches every weight."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.cli.parity import gather_sharded_gradients, parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import PackedBatch
from megarl.weights.transfer import hugging_face_gradients
from tiny import PROMPTS, YARN, tiny_config, write_tiny_model

BOUND = 1e-5
SEQUENCE = "sequence_parallel=true"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mistral, 3 key-value heads": (
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        ["", f"tp=3,{SEQUENCE}", f"pp=2,{FIRST}=3,dp=2", f"pp=3,vpp=1,{FIRST}=1,{LAST}=2,cp=2"],
    ),
    "phi3": (
        "phi3",
        {},
        [
            "",
            f"tp=2,{SEQUENCE}",
            "tp=4,distributed_optimizer=false",
            "pp=2,vpp=2,dp=2",
            "cp=2,dp=2,max_tokens_per_micro_batch=40",
            f"tp=2,cp=2,pp=2,{SEQUENCE},context_parallel_method=all_to_all",
            f"tp=2,cp=2,{SEQUENCE},context_parallel_method=ring",
            "dp=4,overlap_gradient_reduce=true,max_tokens_per_micro_batch=30",
        ],
    ),
    "olmo2": (
        "olmo2",
        {},
        [
            "",
            "tp=2",
            f"tp=2,{SEQUENCE}",
            "tp=4,distributed_optimizer=false",
            f"pp=2,vpp=2,tp=2,{SEQUENCE}",
            "cp=2,dp=2,max_tokens_per_micro_batch=40",
            f"tp=2,cp=2,pp=2,{SEQUENCE},context_parallel_method=all_to_all",
            f"tp=4,pp=2,{SEQUENCE},max_tokens_per_micro_batch=30",
        ],
    ),
    "mixtral": (
        "mixtral",
        {},
        [
            "",
            f"tp=2,{SEQUENCE}",
            f"pp=2,{LAST}=1",
            "ep=2,dp=2",
            f"tp=2,pp=2,ep=2,dp=2,{SEQUENCE}",
            "etp=2,ep=2,dp=4,max_tokens_per_micro_batch=30",
        ],
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {},
        [
            "",
            f"tp=2,etp=1,ep=2,{SEQUENCE}",
            "ep=3,dp=3",
            f"tp=2,pp=2,ep=2,dp=2,{SEQUENCE}",
            "pp=2,vpp=2,ep=2,dp=2,overlap_gradient_reduce=true",
            f"cp=2,ep=2,pp=2,{FIRST}=1",
        ],
    ),
    "qwen3_moe, scores not normalised, tied": (
        "qwen3_moe",
        {"norm_topk_prob": False, "tie_word_embeddings": True, "decoder_sparse_step": 2, "mlp_only_layers": []},
        ["", f"tp=2,pp=2,ep=2,etp=1,{SEQUENCE}"],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {},
        [
            "",
            f"tp=2,{SEQUENCE}",
            "ep=4,dp=4,distributed_optimizer=false",
            f"tp=2,pp=2,ep=2,dp=2,{SEQUENCE}",
            f"tp=2,cp=2,ep=2,{SEQUENCE},context_parallel_method=all_to_all",
            "cp=4,ep=2,context_parallel_method=hybrid,ulysses_size=2",
            f"pp=3,{FIRST}=1,{LAST}=1,cp=2,ep=2",
            "pp=2,vpp=2,ep=2,dp=2",
        ],
    ),
    "deepseek_v3, queries without latent, YaRN": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_parameters": YARN, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
        ["", f"tp=4,etp=2,ep=2,{SEQUENCE}"],
    ),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers computes; tensors by their names on disk."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    packed: PackedBatch


def by_names_on_disk(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """transformers keeps experts fused in memory and writes them one by one."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def expected_of(model: PreTrainedModel, config: Config, folder: Path) -> Expected:
    """The gradient of the targets' mean negative log-probability, one unpacked sequence at a time, in float64."""
    weights = load_file(config.model.path / "model.safetensors")
    packed = synthetic_batch(PROMPTS, config)
    model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    model = model.double()
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        tokens, trained = packed.token_ids[start:stop], packed.loss_mask[start:stop]
        rows = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        kept = torch.where(trained[1:], rows, 0.0)
        (-kept.sum() / packed.loss_mask.sum()).backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    by_name = by_names_on_disk(gradients, folder / "gradients")
    return Expected(weights, {name: tensor for name, tensor in by_name.items() if "correction_bias" not in name}, packed)


def compute(config: Config, packed: PackedBatch, output: Path) -> None:
    """One rank: gradients, their norm, and the weights after one step."""
    policy = Policy(config, total_updates=1)
    policy.engine.forward_backward(build_supervised_batch(packed), supervised_objective)
    gather_sharded_gradients(policy.engine)
    gradients = dict(hugging_face_gradients(policy.engine.chunks, policy.weight_map, policy.engine.layout))
    norm, _, _ = policy.optimizer.step()
    after = dict(policy.hugging_face_tensors())
    if is_main_rank():
        save_file(after, output / "after.safetensors")
        torch.save((gradients, norm), output / "results.pt")


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_every_layout(tmp_path: Path, case: str) -> None:
    family, sizes, layouts = CASES[case]
    model = write_tiny_model(tmp_path / "model", family, **sizes)
    config = tiny_config(tmp_path / "model", kind="sft")
    expected = expected_of(model, config, tmp_path)
    for layout in layouts:
        changed, num_ranks = with_layout(config, parse_layout(layout))
        run_local_ranks(compute, (changed, expected.packed, tmp_path), num_ranks, 120)
        gradients, norm = torch.load(tmp_path / "results.pt")
        assert gradients.keys() == expected.gradients.keys(), layout
        for name, gradient in expected.gradients.items():
            assert (gradients[name] - gradient).norm() <= BOUND * gradient.norm(), (layout, name)
        total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
        assert abs(norm - total) <= BOUND * total, layout
        # the optimizer reaches every tensor but the router's constant bias
        after = load_file(tmp_path / "after.safetensors")
        assert after.keys() == expected.weights.keys(), layout
        for name, tensor in expected.weights.items():
            assert torch.equal(after[name], tensor) == (name not in gradients or not gradients[name].any()), (layout, name)
