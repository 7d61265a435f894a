"""The weight map by itself: every element of every tensor has its place, and a wrong table or folder is refused by name."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.config.schema import Config
from megarl.errors import WeightsError
from megarl.families.base.weight_blocks import layer_part, layer_rule
from megarl.families.base.weight_rules import Kind, Layers, Rule
from megarl.families.registry import MODEL_TYPES, family_of, read_architecture
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy
from megarl.weights import mapping
from megarl.weights.files.sources import SafetensorsSource
from megarl.weights.mapping import WeightMap, build_weight_map
from tiny import tiny_config, write_tiny_model


def map_of(folder: Path, *, with_transformer_engine: bool = False) -> WeightMap:
    return build_weight_map(read_architecture(folder), 4, with_transformer_engine)


@pytest.mark.parametrize("with_transformer_engine", [False, True])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_element_has_one_place(tmp_path: Path, family: str, with_transformer_engine: bool) -> None:
    write_tiny_model(tmp_path, family)
    weight_map = map_of(tmp_path, with_transformer_engine=with_transformer_engine)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert weight_map.hugging_face_shapes() == stored
    for tp in (1, 2, 4):
        uses = {name: torch.zeros(shape, dtype=torch.int) for name, shape in stored.items()}
        for name, parameter in weight_map.parameters.items():
            if parameter.is_copy:
                continue
            for tp_rank in range(tp if weight_map.is_tensor_parallel(name) else 1):
                for piece in weight_map.shard(name, tp_rank, tp).slices:
                    uses[piece.name].narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
        for name, count in uses.items():
            assert (count == 1).all(), (tp, name)
        rows = [weight_map.shard_shape("embedding.word_embeddings.weight", rank, tp)[0] for rank in range(tp)]
        assert len(set(rows)) == 1 and sum(rows) % (4 * tp) == 0 and sum(rows) >= 131


def test_worked_example(tmp_path: Path) -> None:
    """2 of 4 tensor parallel ranks' places, written out: 8 heads and 4 key-value groups of width 16, 8 experts of width 32."""
    write_tiny_model(tmp_path / "qwen3", "qwen3")
    shard = map_of(tmp_path / "qwen3").shard("decoder.layers.3.self_attention.linear_qkv.weight", 1, 4)
    attention = "model.layers.3.self_attn."
    assert [(piece.name.removeprefix(attention), piece.start, piece.stop) for piece in shard.slices] == [
        ("q_proj.weight", 32, 64),
        ("k_proj.weight", 16, 32),
        ("v_proj.weight", 16, 32),
    ]
    write_tiny_model(tmp_path / "deepseek_v3", "deepseek_v3")
    weight_map = map_of(tmp_path / "deepseek_v3")
    parameter = weight_map.parameters["decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight"]
    assert (parameter.layer, parameter.expert, parameter.kind) == (2, 5, Kind.GATE_UP)
    shard = weight_map.shard(parameter.megatron, 1, 2)
    assert [(piece.name, piece.start, piece.stop) for piece in shard.slices] == [
        ("model.layers.2.mlp.experts.5.gate_proj.weight", 16, 32),
        ("model.layers.2.mlp.experts.5.up_proj.weight", 16, 32),
    ]
    assert not weight_map.is_tensor_parallel("decoder.layers.2.mlp.router.expert_bias")
    assert "decoder.layers.0.mlp.linear_fc1.weight" in weight_map.parameters, "the first layer is dense"
    assert "decoder.layers.0.mlp.router.weight" not in weight_map.parameters
    with_te = map_of(tmp_path / "deepseek_v3", with_transformer_engine=True).parameters
    assert with_te["decoder.layers.2.mlp.experts.linear_fc1.weight5"].hugging_face == parameter.hugging_face


def change_table(monkeypatch: pytest.MonkeyPatch, family: str, *, drop: str = "", add: tuple[Rule, ...] = ()) -> None:
    family_class = type(family_of(family))
    rules_of = family_class.weight_rules
    monkeypatch.setattr(
        family_class,
        "weight_rules",
        lambda self, model: (*(rule for rule in rules_of(self, model) if rule.megatron != drop), *add),
    )


DOWN = layer_part("mlp.experts.{expert}.down_proj.weight", 64, 32)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            layer_rule("mlp.other.{expert}.weight", Kind.ROW, DOWN, layers=Layers.MOE),
            "mapped twice: model.layers.0.mlp.experts.0.down_proj.weight, model.layers.0.mlp.experts.1.down_proj.weight, ",
        ),
        (
            layer_rule("mlp.router.weight", Kind.REPLICATED, layer_part("mlp.new.weight", 6, 64), layers=Layers.MOE),
            "mapped twice: decoder.layers.0.mlp.router.weight, decoder.layers.2.mlp.router.weight, decoder.layers.3.mlp.router",
        ),
        (
            replace(layer_rule("copy.weight", Kind.REPLICATED, layer_part("nowhere.weight", 6)), is_copy=True),
            "copies of nothing: model.layers.0.nowhere.weight, ",
        ),
    ],
)
def test_a_tensor_mapped_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule, expected: str) -> None:
    write_tiny_model(tmp_path, "qwen3_moe")
    change_table(monkeypatch, "qwen3_moe", add=(rule,))
    with pytest.raises(WeightsError, match="the weight table of family qwen3_moe is wrong") as error:
        map_of(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def build_policy(config: Config) -> None:
    Policy(config, total_updates=1)


EXPERT_BIAS = layer_rule("mlp.router.other_bias", Kind.REPLICATED, layer_part("mlp.gate.other_bias", 8), layers=Layers.MOE)


@pytest.mark.parametrize(
    ("drop", "add", "expected"),
    [
        ("decoder.layers.{layer}.mlp.router.weight", (), "not in the map: decoder.layers.1.mlp.router.weight, decoder.layers.2"),
        ("", (EXPERT_BIAS,), "not in the model: decoder.layers.1.mlp.router.other_bias, decoder.layers.2"),
    ],
)
def test_a_table_that_is_not_the_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: str, add: tuple[Rule, ...], expected: str
) -> None:
    write_tiny_model(tmp_path, "deepseek_v3")
    change_table(monkeypatch, "deepseek_v3", drop=drop, add=add)
    config = tiny_config(tmp_path, model={"path": str(tmp_path), "init": "random"})
    with pytest.raises(WeightsError, match="Megatron's model and the weight map of family deepseek_v3 differ") as error:
        run_local_ranks(build_policy, (config,), 1, 60)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_row_too_few_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "llama")
    shard_of = mapping.shard_of

    def without_last_row(parameter: mapping.Parameter, *args: object) -> mapping.Shard:
        shard = shard_of(parameter, *args)  # type: ignore[arg-type]
        last = shard.slices[-1]
        return replace(shard, slices=(*shard.slices[:-1], replace(last, stop=last.stop - 1)))

    monkeypatch.setattr(mapping, "shard_of", without_last_row)
    with pytest.raises(WeightsError, match=r"embedding\.word_embeddings\.weight is \[131, 64\], the weight map says \[130, 64\]"):
        run_local_ranks(build_policy, (tiny_config(tmp_path),), 1, 60)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("missing", "missing: model.layers.2.mlp.experts.5.up_proj.weight, model.layers.2.mlp.gate.e_score_correction_bias"),
        ("extra", "extra: model.layers.0.mlp.experts.0.up_proj.weight, model.layers.2.mlp.experts.8.up_proj.weight"),
        ("shape", "mis-shaped: model.layers.2.mlp.experts.5.up_proj.weight is [31, 64], config.json says [32, 64]"),
    ],
)
def test_wrong_expert_tensors_are_listed(tmp_path: Path, change: str, expected: str) -> None:
    write_tiny_model(tmp_path, "deepseek_v3")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    up = "model.layers.2.mlp.experts.5.up_proj.weight"
    match change:
        case "missing":
            del tensors[up], tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
        case "extra":
            tensors |= {"model.layers.2.mlp.experts.8.up_proj.weight": torch.zeros(1)}
            tensors |= {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(1)}
        case _:
            tensors[up] = tensors[up][:-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        SafetensorsSource(tmp_path, map_of(tmp_path))
    assert expected in str(error.value)


def test_layers_for_multi_token_prediction_are_left_out_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_model(tmp_path, "deepseek_v3", num_mtp_layers=1)
    file = tmp_path / "model.safetensors"
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(1), "model.layers.4.enorm.weight": torch.zeros(1)}
    save_file(load_file(file) | extra, file)
    with caplog.at_level(logging.WARNING):
        SafetensorsSource(tmp_path, map_of(tmp_path))
    (record,) = caplog.records
    assert "2 tensors are left out, layers for multi-token prediction, which are not trained: " in record.getMessage()
    save_file(load_file(file) | {"model.layers.5.enorm.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"extra: model\.layers\.5\.enorm\.weight"):
        SafetensorsSource(tmp_path, map_of(tmp_path))
