"""Routing replay: with forced experts the trainer computes what transformers does with routers that are forced to the same ones, in
many layouts; with the experts that its own routers choose it computes what it does without replay."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.cli.parity import gather_sharded_gradients, parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.types import NO_EXPERT, PackedBatch
from megarl.weights.transfer import hugging_face_gradients
from tiny import PROMPTS, tiny_config, write_tiny_model

BOUND = 1e-5
SEQUENCE = "sequence_parallel=true"
CASES = {  # layouts, and what is recomputed
    "qwen3_moe": [
        ("", "none"),
        (f"tp=2,etp=1,ep=2,{SEQUENCE},max_tokens_per_micro_batch=30", "none"),
        ("pp=2,vpp=2,ep=2,dp=2", "full"),
        ("cp=2,ep=2,pp=2,num_layers_in_first_pipeline_stage=1", "none"),
    ],
    "mixtral": [(f"tp=2,cp=2,context_parallel_method=all_to_all,{SEQUENCE}", "selective"), ("pp=2", "full")],
    "deepseek_v3": [("", "full"), (f"tp=2,pp=2,ep=2,dp=2,{SEQUENCE}", "none")],
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers computes; gradients by their names on disk."""

    logprobs: Tensor
    own_logprobs: Tensor
    gradients: dict[str, Tensor]


def expert_weights(model: PreTrainedModel, logits: Tensor, experts: Tensor) -> Tensor:
    """The weights of the given experts as each family's paper computes them, in the type of the logits."""
    config = model.config
    if config.model_type == "deepseek_v3":
        scores = logits.sigmoid().gather(1, experts)
        return config.routed_scaling_factor * scores / scores.sum(1, keepdim=True)
    scores = logits.softmax(-1).gather(1, experts)
    return scores / scores.sum(1, keepdim=True)


def force_experts(model: PreTrainedModel) -> Callable[[Tensor], None]:
    """Let the routers follow the experts [tokens, layers, top_k] that the returned function is given for the next sequence."""
    forced: list[Tensor] = []

    def hook(number: int) -> Callable[..., Any]:
        def force(module: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, own = output
            wanted = forced[-1][:, number].long()
            experts = torch.where(wanted == NO_EXPERT, own, wanted)
            return logits, expert_weights(model, logits, experts), experts

        return force

    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for number, router in enumerate(routers):
        router.register_forward_hook(hook(number))
    return forced.append


def own_experts(model: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """int16 [num_tokens, layers, top_k], what the model's routers choose."""
    chosen: list[list[Tensor]] = []
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(lambda module, arguments, output: chosen[-1].append(output[2])) for router in routers]
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        chosen.append([])
        model(packed.token_ids[None, start:stop])
    for one in hooks:
        one.remove()
    return torch.cat([torch.stack(layers, dim=1) for layers in chosen]).to(torch.int16)


def random_experts(model: PreTrainedModel, num_tokens: int, num_layers: int) -> Tensor:
    """int16 [num_tokens, layers, top_k], different ones in any order; one in five rows is unknown."""
    generator = torch.Generator().manual_seed(3)
    num_experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    order = torch.rand(num_tokens, num_layers, num_experts, generator=generator).argsort(-1)[..., :top_k]
    is_known = torch.rand(num_tokens, num_layers, 1, generator=generator) < 0.8
    return torch.where(is_known, order, NO_EXPERT).to(torch.int16)


def logprobs_of(model: PreTrainedModel, packed: PackedBatch, start: int, stop: int) -> Tensor:
    """[tokens - 1] log-probabilities of the tokens of one sequence behind its first."""
    tokens = packed.token_ids[start:stop]
    return model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def expected_of(model: PreTrainedModel, packed: PackedBatch, folder: Path) -> Expected:
    """Log-probabilities and the gradient of their mean, one unpacked sequence at a time, in float64."""
    logprobs, own = torch.zeros(2, packed.token_ids.numel(), dtype=torch.float64)
    sequences = list(zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True))
    with torch.no_grad():
        for start, stop in sequences:
            own[start + 1 : stop] = logprobs_of(model, packed, start, stop)
    force = force_experts(model)
    for start, stop in sequences:
        force(packed.routed_experts[start:stop])
        rows = logprobs_of(model, packed, start, stop)
        logprobs[start + 1 : stop] = rows.detach()
        kept = torch.where(packed.loss_mask[start + 1 : stop], rows, 0.0)
        (-kept.sum() / packed.loss_mask.sum()).backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    gradients.save_pretrained(folder / "gradients")
    by_name = load_file(folder / "gradients" / "model.safetensors")  # transformers fuses experts in memory, and not on disk
    by_name = {name: tensor for name, tensor in by_name.items() if "correction_bias" not in name}
    return Expected(logprobs * packed.loss_mask, own * packed.loss_mask, by_name)


def compute(config: Config, packed: PackedBatch, own: Tensor, output: Path) -> None:
    """One rank: log-probabilities and gradients with forced experts, log-probabilities with the model's own ones and without."""
    policy = Policy(config, total_updates=1)
    scores = [
        policy.engine.forward_only(replace(packed, routed_experts=experts))[0]
        for experts in (packed.routed_experts, own, own[:, :0, :0])
    ]
    policy.engine.forward_backward(build_supervised_batch(packed), supervised_objective)
    gather_sharded_gradients(policy.engine)
    gradients = dict(hugging_face_gradients(policy.engine.chunks, policy.weight_map, policy.engine.layout))
    if is_main_rank():
        torch.save((scores, gradients), output / "results.pt")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", CASES)
def test_forced_experts_in_many_layouts(tmp_path: Path, family: str) -> None:
    model = write_tiny_model(tmp_path / "model", family)
    config = tiny_config(
        tmp_path / "model", kind="rl", rollout={"routing_replay": True, "samples_per_prompt": 3, "max_new_tokens": 17}
    )
    packed = synthetic_batch(PROMPTS, config)
    model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    model = model.double()
    own = own_experts(model, packed)
    packed = replace(packed, routed_experts=random_experts(model, *own.shape[:2]))
    expected = expected_of(model, packed, tmp_path)
    assert (expected.logprobs - expected.own_logprobs).abs().max() > 0.1  # it matters which experts see a token
    for layout, recompute in CASES[family]:
        changed, num_ranks = with_layout(config, parse_layout(layout))
        changed = changed.model_copy(update={"policy": changed.policy.model_copy(update={"recompute": recompute})})
        run_local_ranks(compute, (changed, packed, own, tmp_path), num_ranks, 120)
        (forced, replayed, plain), gradients = torch.load(tmp_path / "results.pt")
        assert (forced - expected.logprobs).abs().max() <= BOUND, layout
        assert (plain - expected.own_logprobs).abs().max() <= BOUND, layout
        assert (replayed - plain).abs().max() <= 1e-6, layout
        assert gradients.keys() == expected.gradients.keys(), layout
        for name, gradient in expected.gradients.items():
            assert (gradients[name] - gradient).norm() <= BOUND * gradient.norm(), (layout, name)
