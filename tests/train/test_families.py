"""Experts and latent attention in many layouts: weights go in and out bit for bit, and log-probabilities, gradients and their
norm are those of transformers' own model, which knows nothing of the weight map."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.config.schema import Config
from megarl.loop.parity import gather_sharded_gradients, parse_layout, synthetic_batch, with_layout
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import PackedBatch
from megarl.weights import mapping
from megarl.weights.rules import Family, Parameter, Rule, Shard
from megarl.weights.transfer import hugging_face_gradients
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5
SEQUENCE = "sequence_parallel=true"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
}
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mistral, 3 key-value heads": (
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        ["", f"tp=3,{SEQUENCE}", f"pp=2,{FIRST}=3,dp=2", f"pp=3,vpp=1,{FIRST}=1,{LAST}=2,cp=2"],
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
    logprobs: Tensor
    gradients: dict[str, Tensor]
    packed: PackedBatch


def by_names_on_disk(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """transformers keeps experts fused in memory and writes them one by one."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def expected_of(model: PreTrainedModel, config: Config, folder: Path) -> Expected:
    """Log-probabilities and the gradient of their negative mean, one unpacked sequence at a time, in float64."""
    weights = load_file(config.model.path / "model.safetensors")
    packed = synthetic_batch(PROMPTS, config)
    model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    model = model.double()
    logprobs = torch.zeros(packed.token_ids.numel(), dtype=torch.float64)
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        tokens, trained = packed.token_ids[start:stop], packed.loss_mask[start:stop]
        rows = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        kept = torch.where(trained[1:], rows, 0.0)
        (-kept.sum() / packed.loss_mask.sum()).backward()
        logprobs[start + 1 : stop] = kept.detach()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    by_name = by_names_on_disk(gradients, folder / "gradients")
    return Expected(weights, logprobs, {name: tensor for name, tensor in by_name.items() if "correction_bias" not in name}, packed)


def compute(config: Config, packed: PackedBatch, output: Path) -> None:
    """One rank: weights out again, log-probabilities, gradients and their norm."""
    policy = Policy(config, total_updates=1)
    weights = dict(policy.hugging_face_tensors())
    logprobs, _ = policy.engine.logprobs(packed)
    policy.engine.forward_backward(build_supervised_batch(packed), supervised_objective)
    gather_sharded_gradients(policy.engine)
    gradients = dict(hugging_face_gradients(policy.engine.chunks, policy.weight_map, policy.engine.layout))
    norm, _, _ = policy.optimizer.step()
    after = dict(policy.hugging_face_tensors())
    if is_main_rank():
        save_file(weights, output / "weights.safetensors")
        save_file(after, output / "after.safetensors")
        torch.save((logprobs, gradients, norm), output / "results.pt")


@pytest.mark.parametrize("case", CASES)
def test_weights_logprobs_and_gradients_in_every_layout(tmp_path: Path, case: str) -> None:
    family, sizes, layouts = CASES[case]
    model = write_tiny_model(tmp_path / "model", family, **sizes)
    config = tiny_config(tmp_path / "model", kind="sft")
    expected = expected_of(model, config, tmp_path)
    for layout in layouts:
        changed, num_ranks = with_layout(config, parse_layout(layout))
        run_local_ranks(compute, (changed, expected.packed, tmp_path), num_ranks, 120)
        weights = load_file(tmp_path / "weights.safetensors")
        assert weights.keys() == expected.weights.keys(), layout
        for name, tensor in expected.weights.items():
            assert torch.equal(weights[name], tensor), (layout, name)
        logprobs, gradients, norm = torch.load(tmp_path / "results.pt")
        assert (logprobs - expected.logprobs).abs().max() <= BOUND, layout
        assert gradients.keys() == expected.gradients.keys(), layout
        for name, gradient in expected.gradients.items():
            assert (gradients[name] - gradient).norm() <= BOUND * gradient.norm(), (layout, name)
        total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
        assert abs(norm - total) <= BOUND * total, layout
        # the optimizer reaches every tensor but the router's constant bias
        after = load_file(tmp_path / "after.safetensors")
        for name, tensor in expected.weights.items():
            assert torch.equal(after[name], tensor) == (name not in gradients or not gradients[name].any()), (layout, name)


def test_the_routers_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "deepseek_v3")
    config = tiny_config(tmp_path / "model", kind="sft", model={"path": str(tmp_path / "model"), "dtype": "bfloat16"})
    expected = expected_of(model, config, tmp_path)
    changed, num_ranks = with_layout(config, parse_layout("pp=2,ep=2,dp=2"))
    run_local_ranks(compute, (changed, expected.packed, tmp_path), num_ranks, 120)
    weights = load_file(tmp_path / "weights.safetensors")
    for name, tensor in expected.weights.items():
        assert torch.equal(weights[name], tensor if "correction_bias" in name else tensor.bfloat16()), name
    logprobs, _, _ = torch.load(tmp_path / "results.pt")
    assert (logprobs - expected.logprobs).abs().mean() < 0.05


def swap_parts(rule: Rule, first: str, second: str) -> Rule:
    """Exchange two words in the names of a rule's tensors."""
    words = {first: second, second: first}
    parts = [".".join(words.get(word, word) for word in part.name.split(".")) for part in rule.hugging_face]
    return replace(rule, hugging_face=tuple(replace(part, name=name) for part, name in zip(rule.hugging_face, parts, strict=True)))


def swap_query_groups(parameter: Parameter, shard: Shard) -> Shard:
    if "linear_qkv.weight" not in parameter.megatron:
        return shard
    slices = list(shard.slices)
    slices[0], slices[3] = slices[3], slices[0]
    return replace(shard, slices=tuple(slices))


def swap_two_experts(parameter: Parameter) -> Parameter:
    if parameter.expert not in (0, 1) or "linear_fc1" not in parameter.megatron:
        return parameter
    old, new = f"experts.{parameter.expert}.", f"experts.{1 - parameter.expert}."
    return replace(parameter, hugging_face=tuple(name.replace(old, new) for name in parameter.hugging_face))


def wrong_map(monkeypatch: pytest.MonkeyPatch, family: str, mistake: str) -> None:
    """Make one mistake in the map of a family."""
    original, shard_of, make_parameter = mapping.FAMILIES[family], mapping.shard_of, mapping._parameter
    match mistake:
        case "two heads swapped":
            monkeypatch.setattr(mapping, "shard_of", lambda p, *args: swap_query_groups(p, shard_of(p, *args)))
        case "two experts swapped":
            monkeypatch.setattr(mapping, "_parameter", lambda *args: swap_two_experts(make_parameter(*args)))
        case _:
            words = mistake.split(" for ")
            mutated = Family(lambda a: tuple(swap_parts(rule, *words) for rule in original.rules(a)), original.left_out)
            monkeypatch.setitem(mapping.FAMILIES, family, mutated)


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        ("qwen3_moe", "gate_proj for up_proj"),
        ("qwen3_moe", "q_norm for k_norm"),
        ("qwen3_moe", "two heads swapped"),
        ("mixtral", "w1 for w3"),
        ("mixtral", "k_proj for v_proj"),
        ("mixtral", "two experts swapped"),
    ],
)
def test_a_wrong_map_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mistake: str) -> None:
    """A map that is wrong in the same way both ways still round-trips; transformers' log-probabilities give it away."""
    model = write_tiny_model(tmp_path / "model", family)
    config = tiny_config(tmp_path / "model", kind="sft")
    expected = expected_of(model, config, tmp_path)
    wrong_map(monkeypatch, family, mistake)
    run_local_ranks(compute, (config, expected.packed, tmp_path), 1, 60)
    logprobs, _, _ = torch.load(tmp_path / "results.pt")
    assert (logprobs - expected.logprobs).abs().max() > 100 * BOUND
