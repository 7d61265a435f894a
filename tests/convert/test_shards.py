"""The shards of engines: what is in them, against ``slow_layouts``; what verify, inspect and the other tools make of them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from megarl.families.registry import read_architecture
from tools import SMALL_FILES, assert_same, make_model, refusal, tensors_of, tool

sys.path.insert(0, str(Path(__file__).parent.parent / "reshard"))
from slow_layouts import EngineSizes, engine_rank

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, Tensor]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 2},  # tied embeddings and, at tp 4, key-value heads that two ranks share
    "qwen3": {},
    "mistral": {},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {},
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": []},
    "deepseek_v3": {},
}
# Names of vLLM's state dict that stand for one module; its loader keeps the first by name.
SHARED_MODULES = [
    (".self_attn.", ".self_attn.mla_attn.", ("q_a_layernorm", "q_b_proj", "q_proj", "kv_a_layernorm", "kv_b_proj", "o_proj")),
    (".self_attn.", ".self_attn.mla_attn.", ("fused_qkv_a_proj", "kv_a_proj_with_mqa")),
    (".mlp.", ".mlp.experts.", ("gate.",)),
    (".mlp.shared_experts.", ".mlp.experts._shared_experts._layer.", ("",)),
]


def expected_shards(model: Path, sizes: EngineSizes) -> list[Tensors]:
    """For each rank what its engine's state dict is."""
    a, tensors = read_architecture(model), tensors_of(model)
    ranks = [engine_rank(tensors, a, sizes, rank) for rank in range(sizes.ranks)]
    if a.tied_embeddings:
        ranks = [{"lm_head.weight": held.pop("model.embed_tokens.weight")} | held for held in ranks]
    if sizes.engine == "sglang":
        return ranks
    attention = "mla_attn.mla_attn" if a.mla else "attn"
    scales = {
        f"model.layers.{layer}.self_attn.{attention}._{kind}_scale": torch.tensor(1.0)
        for layer in range(a.num_layers)
        for kind in ("q", "k", "v", "prob")
    }
    return [{first_name(name, is_latent=a.mla is not None): tensor for name, tensor in held.items()} | scales for held in ranks]


def first_name(name: str, *, is_latent: bool) -> str:
    names = [name]
    for module, other, parts in SHARED_MODULES:
        before, _, after = name.partition(module)
        if after.startswith(parts) and (is_latent or "mla" not in other):
            names.append(before + other + after)
    return min(names)


def shards_of(folder: Path, rank: int) -> Tensors:
    return {name: t for file in folder.glob(f"model-rank-{rank}-part-*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("llama", [(2, 1)]),
        ("mistral", [(2, 1)]),
        ("qwen3", [(4, 1)]),
        ("phi3", [(4, 1)]),
        ("olmo2", [(2, 1)]),
        ("qwen2", [(1, 1), (2, 1), (4, 1)]),
        ("mixtral", [(4, 1), (2, 2)]),
        ("qwen3_moe", [(1, 1), (2, 2)]),
        ("deepseek_v3", [(2, 1), (4, 4)]),
    ],
)
def test_every_rank_gets_its_part(
    tmp_path: Path, capsys: Capture, engine: str, family: str, layouts: list[tuple[int, int]]
) -> None:
    model = make_model(tmp_path / "model", family, **MODELS[family])
    for tp, ep in layouts:
        shards = tmp_path / f"tp{tp}"
        assert tool("to_engine_shards", model, shards, "--engine", engine, "--tp", tp, "--ep", ep, *SMALL_FILES) == 0
        for rank, expected in enumerate(expected_shards(model, EngineSizes(engine=engine, tp=tp, ep=ep))):
            assert_same(shards_of(shards, rank), expected)
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert json.loads((shards / name).read_text()) == json.loads((model / name).read_text())
        capsys.readouterr()
        assert tool("verify", model, shards) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"B {shards}: shards of {engine}, tp {tp}, ep {ep}, {len(tensors_of(model))} tensors" in lines[1]
        assert lines[0].split()[-1] == lines[1].split()[-1]


def test_latents_of_which_the_query_has_none(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "deepseek_v3", q_lora_rank=None)
    for engine, tp, ep in (("vllm", 2, 1), ("sglang", 4, 2)):
        shards = tmp_path / engine
        assert tool("to_engine_shards", model, shards, "--engine", engine, "--tp", tp, "--ep", ep) == 0
        for rank, expected in enumerate(expected_shards(model, EngineSizes(engine=engine, tp=tp, ep=ep))):
            assert_same(shards_of(shards, rank), expected)


def test_any_source(tmp_path: Path) -> None:
    """A Megatron checkpoint and other shards give what the model gives."""
    model = make_model(tmp_path / "model", "qwen2")
    assert tool("hf_to_megatron", model, tmp_path / "megatron") == 0
    assert tool("to_engine_shards", model, tmp_path / "other", "--engine", "sglang", "--tp", 4) == 0
    for source in ("megatron", "other"):
        shards = tmp_path / f"of_{source}"
        assert tool("to_engine_shards", tmp_path / source, shards, "--engine", "vllm", "--tp", 2) == 0
        for rank, expected in enumerate(expected_shards(model, EngineSizes(engine="vllm", tp=2))):
            assert_same(shards_of(shards, rank), expected)
        assert tool("verify", shards, tmp_path / "megatron") == 0


def test_shards_are_cast(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "deepseek_v3")
    assert tool("to_engine_shards", model, tmp_path / "out", "--engine", "vllm", "--tp", 2, "--dtype", "bfloat16") == 0
    (first, _) = expected_shards(model, EngineSizes(engine="vllm", tp=2))
    kept = [name for name in first if name.endswith(("e_score_correction_bias", "_scale"))]
    assert len(kept) == 3 + 4 * 4
    assert_same(shards_of(tmp_path / "out", 0), {name: t if name in kept else t.bfloat16() for name, t in first.items()})
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert tool("verify", model, tmp_path / "out") == 1
    assert tool("verify", model, tmp_path / "out", "--cast") == 0


def test_copies_of_tied_embeddings_are_ignored(tmp_path: Path, capsys: Capture) -> None:
    model = make_model(tmp_path / "model", "qwen2")
    tensors = tensors_of(model)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    assert tool("to_engine_shards", model, tmp_path / "out", "--engine", "vllm", "--tp", 1) == 0
    capsys.readouterr()
    assert tool("verify", model, tmp_path / "out") == 0
    assert "not compared, as the model does not take them: lm_head.weight" in capsys.readouterr().out


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``shards`` of two ranks, which share key-value heads with nobody."""
    folder = tmp_path_factory.mktemp("good")
    make_model(folder / "model", "qwen3_moe", **MODELS["qwen3_moe"])
    assert tool("to_engine_shards", folder / "model", folder / "shards", "--engine", "vllm", "--tp", 2) == 0
    return folder


def change_a_row(tensors: Tensors) -> str:
    tensors["lm_head.weight"][7, 5] += 1
    return "lm_head.weight: 1 elements differ, by up to 1; first at [103, 5]: "  # of 192 padded rows rank 1 begins at 96


def swap_heads(tensors: Tensors) -> str:
    query = tensors["model.layers.2.self_attn.qkv_proj.weight"][:64].view(4, 16, 64)
    query[[1, 2]] = query[[2, 1]]
    return "model.layers.2.self_attn.q_proj.weight: 2048 elements differ, by up to "


def swap_experts(tensors: Tensors) -> str:
    w2 = tensors["model.layers.1.mlp.experts.routed_experts.w2_weight"]
    w2[[0, 2]] = w2[[2, 0]]
    return "model.layers.1.mlp.experts.2.down_proj.weight: 1024 elements differ, by up to "


def change_a_copy(tensors: Tensors) -> str:
    tensors["model.norm.weight"].view(torch.int32)[-1] ^= 1
    return "model.norm.weight: rank 1 has another copy of it in model.norm.weight than rank 0"


def write_into_the_padding(tensors: Tensors) -> str:
    tensors["lm_head.weight"][36, 63] = 1e-30
    return "lm_head.weight: rank 1 has other values than 0 in rows 35:96, which belong to no tensor"


def change_a_constant(tensors: Tensors) -> str:
    tensors["model.layers.3.self_attn.attn._v_scale"].fill_(0.5)
    return "model.layers.3.self_attn.attn._v_scale: rank 1 has other values than 1 in rows 0:1, which belong to no tensor"


@pytest.mark.parametrize(
    "change", [change_a_row, swap_heads, swap_experts, change_a_copy, write_into_the_padding, change_a_constant]
)
def test_verify_finds_what_differs(good: Path, tmp_path: Path, capsys: Capture, change: Callable[[Tensors], str]) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(good / "shards", shards)
    file = shards / "model-rank-1-part-0.safetensors"
    tensors = load_file(file)
    expected = change(tensors)
    save_file(tensors, file)
    for sides in ((good / "model", shards), (shards, good / "model")):
        capsys.readouterr()
        assert tool("verify", *sides) == 1
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if line.startswith(expected)], out
    assert tool("verify", shards, shards) == (1 if "rank 1" in expected else 0)


def test_inspect(good: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert tool("inspect", good / "shards", "--tensors") == 0
    shown = capsys.readouterr().out
    ranks = [shards_of(good / "shards", rank) for rank in range(2)]
    elements = sum(tensor.numel() for held in ranks for tensor in held.values())
    assert f"{good / 'shards'}: shards of vllm, tp 2, ep 1\nfamily qwen3_moe, " in shown
    assert f"weights: {sum(map(len, ranks))} tensors of float32, {elements:,} elements" in shown
    assert "  rank 1 model.layers.0.mlp.experts.routed_experts.w13_weight [4, 32, 64] float32\n" in shown
    assert "model-rank-1-part-0.safetensors\n" in shown


@pytest.mark.parametrize(
    ("family", "sizes", "options", "words"),
    [
        ("llama", {}, ("vllm", 3), "vllm tp 3 does not divide the model's 8 attention heads"),
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 98}, ("sglang", 4), "4 ranks do not divide the 98 rows or col"),
        ("llama", {}, ("vllm", 2, "--ep", 2), "vllm ep 2: the model has no experts (llama); use ep 1"),
        ("mixtral", {}, ("vllm", 1, "--ep", 2), "vllm ep 2 with tp 1: vLLM tells shards apart by tp rank only"),
        ("mixtral", {"tie_word_embeddings": True}, ("sglang", 1), "sglang does not tie the embeddings of mixtral"),
        ("qwen3_moe", {}, ("sglang", 1), "sglang gives every layer of qwen3_moe experts"),
    ],
)
def test_layouts_that_no_engine_loads(
    tmp_path: Path, capfd: Capture, family: str, sizes: dict[str, Any], options: tuple[object, ...], words: str
) -> None:
    model = make_model(tmp_path / "model", family, **sizes)
    error = refusal(capfd, "to_engine_shards", model, tmp_path / "out", "--engine", options[0], "--tp", *options[1:])
    assert error.startswith(f"configuration error: {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def unknown_family(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    return "model_type 'gpt2' is not supported"


def other_model(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    return f"{model}: weights do not fit config.json; missing: model.layers.4.input_layernorm.weight"


def mixed_types(model: Path) -> str:
    tensors = tensors_of(model)
    tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].half()
    save_file(tensors, model / "model.safetensors")
    return (
        f"{model}: model.layers.2.self_attn.v_proj.weight is torch.float32 and model.layers.2.self_attn.k_proj.weight is "
        "torch.float16, but the engine keeps them in one tensor; give --dtype"
    )


@pytest.mark.parametrize("damage", [unknown_family, other_model, mixed_types])
def test_models_that_are_wrong(tmp_path: Path, capfd: Capture, good: Path, damage: Callable[[Path], str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(good / "model", model)
    expected = damage(model)
    assert expected in refusal(capfd, "to_engine_shards", model, tmp_path / "out", "--engine", "vllm", "--tp", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def truncated(shards: Path) -> str:
    file = shards / "model-rank-1-part-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file} is truncated or corrupt"


def no_rank(shards: Path) -> str:
    (shards / "model-rank-1-part-0.safetensors").unlink()
    return "does not fit engine_shards.json; missing: lm_head.weight"


def other_shape(shards: Path) -> str:
    file = shards / "model-rank-0-part-0.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:3].clone()}, file)
    return "does not fit engine_shards.json; mis-shaped: model.norm.weight is [3], not [64]; convert again"


def no_json(shards: Path) -> str:
    (shards / "engine_shards.json").write_text("{")
    return f"{shards / 'engine_shards.json'} is truncated or corrupt ("


def lost_rows(shards: Path) -> str:
    file = shards / "engine_shards.json"
    values = json.loads(file.read_text())
    values["parameters"]["lm_head.weight"]["blocks"].pop()
    file.write_text(json.dumps(values))
    return f"{file} is truncated or corrupt (it has not all of lm_head.weight); convert again"


@pytest.mark.parametrize("damage", [truncated, no_rank, other_shape, no_json, lost_rows])
def test_shards_that_are_damaged(good: Path, tmp_path: Path, capfd: Capture, damage: Callable[[Path], str]) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(good / "shards", shards)
    expected = damage(shards)
    assert expected in refusal(capfd, "verify", good / "model", shards)
    assert expected in refusal(capfd, "inspect", shards)


def test_other_conversions_take_no_shards(good: Path, tmp_path: Path, capfd: Capture) -> None:
    shards = good / "shards"
    assert refusal(capfd, "hf_to_megatron", shards, tmp_path / "out") == (
        f"error: {shards} holds an engine's shards; give a Hugging Face model"
    )
    assert refusal(capfd, "megatron_to_hf", shards, tmp_path / "out") == (
        f"error: {shards} holds an engine's shards; give a Megatron checkpoint"
    )
    expected = f"error: {good} exists and is not an empty folder; choose another output or remove it"
    assert refusal(capfd, "to_engine_shards", good / "model", good, "--engine", "vllm", "--tp", 1) == expected
