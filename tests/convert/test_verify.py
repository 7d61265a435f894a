"""verify.py finds every kind of mistake that a weight map can make, and says where."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.families.base.weight_rules import Kind
from megarl.weights import mapping, shards
from tools import make_model, tensors_of, tool

Tensors = dict[str, Tensor]
LAYER = "model.layers.2."


def swap_heads(tensors: Tensors) -> str:
    name = LAYER + "self_attn.q_proj.weight"
    heads = tensors[name].view(8, -1, 64)
    heads[[1, 2]] = heads[[2, 1]]
    return name


def swap_gate_and_up(tensors: Tensors) -> str:
    gate, up = (f"{LAYER}mlp.experts.1.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    return gate


def swap_experts(tensors: Tensors) -> str:
    first, second = (f"{LAYER}mlp.experts.{expert}.down_proj.weight" for expert in (0, 2))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return second


def lose_a_row(tensors: Tensors) -> str:
    tensors["model.embed_tokens.weight"][17] = 0
    return "model.embed_tokens.weight"


def flip_the_last_bit(tensors: Tensors) -> str:
    tensors["model.norm.weight"].view(torch.int32)[-1] ^= 1
    return "model.norm.weight"


def swap_the_zeros(tensors: Tensors) -> str:
    tensors["model.norm.weight"][3] = -0.0
    return "model.norm.weight"


def leave_out(tensors: Tensors) -> str:
    del tensors["model.norm.weight"]
    return "model.norm.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``megatron``; the final norm has a zero."""
    folder = tmp_path_factory.mktemp("converted")
    make_model(folder / "model", "qwen3_moe")
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.norm.weight"][3] = 0.0
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    assert tool("hf_to_megatron", folder / "model", folder / "megatron") == 0
    return folder


@pytest.mark.parametrize(
    "change", [swap_heads, swap_gate_and_up, swap_experts, lose_a_row, flip_the_last_bit, swap_the_zeros, leave_out]
)
def test_differences_are_found(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tensors], str]
) -> None:
    original = tensors_of(converted / "model")
    tensors = {name: tensor.clone() for name, tensor in original.items()}
    name = change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    other = converted / "model" if change is leave_out else converted / "megatron"
    capsys.readouterr()
    assert tool("verify", tmp_path, other) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(name))
    digests = [line.split()[-1] for line in out.splitlines()[:2]]
    assert digests[0] != digests[1]
    if change is leave_out:
        assert line == f"{name}: only in {other}"
        return
    differs = tensors[name].view(torch.int32) != original[name].view(torch.int32)
    first = [int(index) for index in differs.nonzero()[0]]
    gap = float((tensors[name].double() - original[name].double()).abs().max())
    assert line.startswith(f"{name}: {int(differs.sum())} elements differ, by up to {gap:.3g}; first at {first}: ")


def broken_qkv(shard: shards.Shard) -> shards.Shard:
    """Two heads' keys exchanged."""
    slices = list(shard.slices)
    slices[1], slices[4] = slices[4], slices[1]
    return shards.Shard(tuple(slices), shard.dim, shard.padding)


def broken_gate_up(shard: shards.Shard) -> shards.Shard:
    return shards.Shard(shard.slices[::-1], shard.dim, shard.padding)


def broken_rows(shard: shards.Shard) -> shards.Shard:
    """The last row of the tensor twice, the first never."""
    first = shard.slices[0]
    last = shards.Slice(first.name, first.dim, first.stop - 1, first.stop)
    return shards.Shard((last, shards.Slice(first.name, first.dim, first.start + 1, first.stop)), shard.dim, shard.padding)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [(Kind.QKV, broken_qkv), (Kind.GATE_UP, broken_gate_up), (Kind.VOCABULARY, broken_rows)],
)
def test_a_wrong_weight_map_is_found(
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    broken: Callable[[shards.Shard], shards.Shard],
) -> None:
    """A checkpoint that was made with one mistake in the map does not pass with the right map, nor the other way round."""
    right = mapping.shard_of

    def wrong(parameter: shards.Parameter, *sizes: object) -> shards.Shard:
        shard = right(parameter, *sizes)
        return broken(shard) if parameter.kind is kind else shard

    monkeypatch.setattr(mapping, "shard_of", wrong)
    assert tool("hf_to_megatron", converted / "model", tmp_path / "wrong") == 0
    assert tool("verify", converted / "model", converted / "megatron") == 1
    monkeypatch.undo()
    assert tool("verify", converted / "model", tmp_path / "wrong") == 1


def test_unlike_types_and_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = torch.tensor([1.0, float("nan"), float("inf")])
    values = torch.tensor([[1.0, 2.0], [3.0, 1.00001]])
    sides = [{"same": same, "type": values, "shape": values}, {"same": same, "type": values.bfloat16(), "shape": values[:1]}]
    for letter, tensors in zip("ab", sides, strict=True):
        (tmp_path / letter).mkdir()
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / letter / "model.safetensors")
    assert tool("verify", tmp_path / "a", tmp_path / "b") == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "shape: shape [2, 2] against [1, 2]",
        "type: dtype torch.float32 against torch.bfloat16",
        "2 tensors differ",
    ]
    assert tool("verify", tmp_path / "a", tmp_path / "b", "--cast") == 1
    assert capsys.readouterr().out.splitlines()[3:] == ["1 tensors differ"]
    assert tool("verify", tmp_path / "b", tmp_path / "a", "--cast") == 1  # the lost digits do not come back
    assert "type: 1 elements differ" in capsys.readouterr().out
