"""Every family in many layouts: weights go in and out bit for bit, and the log-probability and entropy of every next token are
those of transformers' own model, which knows nothing of the weight map."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from layout_cases import SEQUENCE, WORLDS
from megarl.cli.parity import parse_layout, with_layout
from megarl.config.checks import check
from megarl.config.schema import Config
from megarl.data.packing import pack_examples
from megarl.data.template import SFTExample
from megarl.families.base.weight_rules import Rule
from megarl.families.registry import MODEL_TYPES, family_of, read_architecture
from megarl.models.transformer_config import DTYPES
from megarl.parallel.launch import run_local_ranks
from megarl.parallel.layout import Layout
from megarl.train.roles import Reference, is_main_rank
from megarl.types import PackedBatch
from megarl.weights import mapping
from megarl.weights.mapping import build_weight_map
from megarl.weights.shards import Parameter, Shard
from megarl.weights.transfer import hugging_face_tensors
from tiny import VOCABULARY_SIZE, tiny_config, write_tiny_model

BOUND = 1e-5
DATA = {"train": {"type": "reasoning_gym", "task": "chain_sum"}}  # what the checks want to find; not read
LENGTHS = [2, 1, 5, 46, 7, 29, 11, 13, 17]


def all_tokens() -> PackedBatch:
    """Sequences of unequal lengths that hold each token of the vocabulary once; all but first ones are targets."""
    assert sum(LENGTHS) == VOCABULARY_SIZE
    tokens = torch.randperm(VOCABULARY_SIZE, generator=torch.Generator().manual_seed(1))
    sequences = [tuple(part.tolist()) for part in tokens.split(LENGTHS)]
    return pack_examples([SFTExample(row_id="", token_ids=sequence, num_prompt_tokens=1) for sequence in sequences])


@torch.no_grad()
def transformers_scores(model: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """float64 [2, tokens], log-probabilities and entropies, one unpacked sequence at a time; 0 at first tokens."""
    model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    model = model.double()
    scores = torch.zeros(2, packed.token_ids.numel(), dtype=torch.float64)
    for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        tokens = packed.token_ids[start:stop]
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        scores[0, start + 1 : stop] = logprobs.gather(1, tokens[1:, None])[:, 0]
        scores[1, start + 1 : stop] = -(logprobs.exp() * logprobs).sum(-1)
    return scores


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one layout: every exported tensor that is not as in the file, and the largest gap of any score."""

    different: list[str]
    gap: float


def differences(exported: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bytes on both sides."""

    def is_same(name: str) -> bool:
        first, second = exported.get(name), original.get(name)
        if first is None or second is None or first.dtype != second.dtype:
            return False
        return torch.equal(first.view(torch.uint8), second.view(torch.uint8))

    return [name for name in sorted(exported.keys() | original.keys()) if not is_same(name)]


def run_layout(config: Config, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor], Layout]:
    """One rank: the model without optimizer, its float64 scores, and on rank 0 the exported weights."""
    engine = Reference(config).engine
    scores = torch.stack(engine.forward_only(packed)).double()
    weight_map = build_weight_map(
        read_architecture(config.model.path), config.model.vocabulary_pad_multiple, with_transformer_engine=False
    )
    return scores, dict(hugging_face_tensors(engine.chunks, weight_map, engine.layout, DTYPES[config.model.dtype])), engine.layout


def end_groups(layout: Layout) -> None:
    """End the layout's process groups, whose threads and connections would pile up."""
    dist.barrier()
    for group in set(vars(layout.groups).values()) - {None, dist.group.WORLD}:
        dist.destroy_process_group(group)
    vars(layout.groups).clear()
    gc.collect()


def run_layouts(config: Config, layouts: list[str], packed: PackedBatch, expected: Tensor, output: Path) -> None:
    """One rank through one layout after another; rank 0 saves the outcomes."""
    original = load_file(config.model.path / "model.safetensors")
    outcomes = {}
    for text in layouts:
        changed, _ = with_layout(config, parse_layout(text))
        try:
            check(changed, dist.get_world_size())
            scores, exported, layout = run_layout(changed, packed)
        except Exception as error:
            error.add_note(f"in layout {text!r}")
            raise
        if is_main_rank():
            outcomes[text] = Outcome(differences(exported, original), float((scores - expected).abs().max()))
        end_groups(layout)
    if is_main_rank():
        torch.save(outcomes, output)


def outcomes_of(model: PreTrainedModel, folder: Path, layouts: list[str], num_ranks: int) -> dict[str, Outcome]:
    """Of the model in ``folder``, in one world."""
    packed = all_tokens()
    config = tiny_config(folder, kind="sft", sft={"max_tokens": max(LENGTHS)}, data=DATA)
    run_local_ranks(
        run_layouts, (config, layouts, packed, transformers_scores(model, packed), folder / "outcomes.pt"), num_ranks, 120
    )
    outcomes: dict[str, Outcome] = torch.load(folder / "outcomes.pt", weights_only=False)
    return outcomes


@pytest.mark.parametrize("name", WORLDS)
def test_weights_and_logprobs_in_every_layout(tmp_path: Path, name: str) -> None:
    world = WORLDS[name]
    model = write_tiny_model(tmp_path, world.family, **world.sizes)
    outcomes = outcomes_of(model, tmp_path, world.layouts, world.num_ranks)
    assert list(outcomes) == world.layouts
    wrong = {layout: outcome for layout, outcome in outcomes.items() if outcome.different or not outcome.gap <= BOUND}
    assert not wrong


def test_every_family_has_twenty_layouts() -> None:
    counts = dict.fromkeys(MODEL_TYPES, 0)
    for world in WORLDS.values():
        assert len(set(world.layouts)) == len(world.layouts)
        counts[world.family] += len(world.layouts)
    assert min(counts.values()) >= 20, counts


def save_layout(config: Config, packed: PackedBatch, output: Path) -> None:
    scores, exported, _ = run_layout(config, packed)
    if is_main_rank():
        torch.save((scores, exported), output)


def test_the_routers_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    packed = all_tokens()
    expected = transformers_scores(write_tiny_model(tmp_path, "deepseek_v3"), packed)
    config = tiny_config(tmp_path, kind="sft", model={"path": str(tmp_path), "dtype": "bfloat16"})
    changed, num_ranks = with_layout(config, parse_layout("pp=2,ep=2,dp=2"))
    run_local_ranks(save_layout, (changed, packed, tmp_path / "layout.pt"), num_ranks, 120)
    scores, exported = torch.load(tmp_path / "layout.pt")
    original = load_file(tmp_path / "model.safetensors")
    rounded = {name: tensor if "correction_bias" in name else tensor.bfloat16() for name, tensor in original.items()}
    assert not differences(exported, rounded)
    assert (scores - expected).abs().mean() < 0.05


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
    shard_of, make_parameter = mapping.shard_of, mapping._parameter
    match mistake:
        case "two heads swapped":
            monkeypatch.setattr(mapping, "shard_of", lambda p, *args: swap_query_groups(p, shard_of(p, *args)))
        case "two experts swapped":
            monkeypatch.setattr(mapping, "_parameter", lambda *args: swap_two_experts(make_parameter(*args)))
        case _:
            words = mistake.split(" for ")
            family_class = type(family_of(family))
            rules_of = family_class.weight_rules
            swapped = lambda self, model: tuple(swap_parts(rule, *words) for rule in rules_of(self, model))  # noqa: E731
            monkeypatch.setattr(family_class, "weight_rules", swapped)


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
    model = write_tiny_model(tmp_path, family)
    wrong_map(monkeypatch, family, mistake)
    for layout, outcome in outcomes_of(model, tmp_path, ["", f"tp=2,{SEQUENCE}"], 2).items():
        assert not outcome.different and outcome.gap > 100 * BOUND, layout
