"""Model folders whose files disagree: what transformers takes is taken, the rest is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megarl.errors import ConfigError, MegaRLError, WeightsError
from megarl.families.registry import MODEL_TYPES, read_architecture
from megarl.weights.export import write_hugging_face_folder
from megarl.weights.files.convert import Options, hugging_face_to_megatron
from megarl.weights.files.safetensors_files import SafetensorsFolder
from megarl.weights.files.sources import SafetensorsSource
from megarl.weights.mapping import build_weight_map
from tiny import write_tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def source_of(folder: Path) -> SafetensorsSource:
    return SafetensorsSource(folder, build_weight_map(read_architecture(folder), 128, with_transformer_engine=False))


def read_all(folder: Path) -> None:
    """As one rank of a run does."""
    source = source_of(folder)
    weight_map = build_weight_map(read_architecture(folder), 128, with_transformer_engine=False)
    for name in weight_map.parameters:
        for piece in weight_map.shard(name, 0, 1).slices:
            source.read(piece)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as refused:
        read_all(folder)
    message = str(refused.value)
    assert len(message) <= 300 and message.isprintable()
    return message


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_tied_output_layer_that_differs_is_refused(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family, tie_word_embeddings=True)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    read_all(tmp_path)  # equal: fine

    def one_number(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD][-1, -1] += 0.01

    change(tmp_path, one_number)
    message = refusal(tmp_path)
    assert HEAD in message and EMBEDDING in message and "tie_word_embeddings" in message
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        hugging_face_to_megatron(tmp_path, tmp_path / "out", Options(None, 1 << 30), lambda done, total: None)


def test_an_untied_output_layer_that_is_missing_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    change(tmp_path, lambda tensors: tensors.__delitem__(HEAD))
    message = refusal(tmp_path)
    assert f"missing: {HEAD}" in message and "tie_word_embeddings is false" in message


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_tensors_name(tmp_path: Path, family: str, value: float) -> None:
    write_tiny_model(tmp_path, family)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("model.layers.2.") and "proj" in name]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[-1]] = tensors[names[-1]].to(torch.bfloat16)
        tensors[names[-1]].view(-1)[5] = value

    change(tmp_path, spoil)
    assert f": {names[-1]} holds NaN or infinite numbers" in refusal(tmp_path)
    with pytest.raises(WeightsError, match="holds NaN or infinite numbers"):
        hugging_face_to_megatron(tmp_path, tmp_path / "out", Options(torch.float32, 1 << 30), lambda done, total: None)


def shard(folder: Path) -> None:
    """Beside model.safetensors, an older model in two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, part in files.items():
        save_file({name: tensors[name] + 1 for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_of_an_index_and_a_single_file_neither_wins_in_silence(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    shard(tmp_path)
    message = refusal(tmp_path)
    assert "model.safetensors and model.safetensors.index.json" in message and "model-00001-of-00002.safetensors" in message
    (tmp_path / "model.safetensors").unlink()
    read_all(tmp_path)


def test_files_that_transformers_leaves_alone_are_left_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    expected = SafetensorsFolder(tmp_path).shapes
    for name in (
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "consolidated.00-of-01.safetensors",
        "optimizer.safetensors",
    ):
        save_file({"other": torch.zeros(3), EMBEDDING: torch.zeros(3)}, tmp_path / name)
    assert SafetensorsFolder(tmp_path).shapes == expected
    AutoModelForCausalLM.from_pretrained(tmp_path)  # and so does it
    (tmp_path / "model.safetensors").unlink()
    assert "only adapter_model.safetensors, consolidated.00-of-01.safetensors and 2 more" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "x\\u001b[2J.safetensors"}}',
        '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    write_tiny_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is not a safetensors index" in refusal(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000 + "]" * 100_000,
        "[]",
        "7",
        '{"a": 7}',
        '{"a": {}}',
        json.dumps({"a": ENTRY | {"shape": [-2, -2]}}),
        json.dumps({"a": ENTRY | {"shape": ["2", 2]}}),
        json.dumps({"a": ENTRY | {"shape": 4}}),
        json.dumps({"a": ENTRY | {"shape": [True, 4]}}),
        json.dumps({"a": ENTRY | {"data_offsets": [-16, 0]}}),
        json.dumps({"a": ENTRY | {"data_offsets": [0]}}),
        json.dumps({"a": ENTRY | {"data_offsets": [0, 10**30]}}),
        json.dumps({"a": ENTRY | {"dtype": ["F32"]}}),
        json.dumps({"a": ENTRY | {"dtype": "F32\x1b[2J"}}),
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 16]}}',
    ],
)
def test_a_header_that_is_none(tmp_path: Path, header: str) -> None:
    write_tiny_model(tmp_path, "llama")
    encoded = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
    assert "model.safetensors is truncated or corrupt" in refusal(tmp_path)


def test_quantized_weights_are_called_so_everywhere(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    def convert() -> None:
        hugging_face_to_megatron(tmp_path, tmp_path / "out", Options(None, 1 << 30), lambda done, total: None)

    change(tmp_path, quantize)
    for refused in (lambda: read_all(tmp_path), convert):
        with pytest.raises(WeightsError, match="quantized"):
            refused()
    change(tmp_path, lambda tensors: None, quantization_config={"quant_method": "fp8"})
    assert read_architecture(tmp_path).quantization == "fp8"
    with pytest.raises(ConfigError, match=r"quantized \(fp8\)"):
        convert()


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("dtype", "torch_dtype"), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exports_config_names_the_dtype_of_its_files(tmp_path: Path, keys: tuple[str, ...], dtype: torch.dtype) -> None:
    write_tiny_model(tmp_path / "model", "deepseek_v3")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")} | dict.fromkeys(
        keys, "float16"
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    typed = ((name, tensor if name.endswith("correction_bias") else tensor.to(dtype)) for name, tensor in tensors.items())
    write_hugging_face_folder(typed, tmp_path / "model", tmp_path / "model", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert {key: written[key] for key in ("dtype", "torch_dtype") if key in written} == dict.fromkeys(keys or ("dtype",), name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 10**12}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 4}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ({"num_attention_heads": 7}, "num_attention_heads"),
    ({"num_attention_heads": 6, "head_dim": 16}, "num_attention_heads 6 does not divide by num_key_value_heads 4"),
    ({"head_dim": 7}, "head"),
    ({"head_dim": 0}, "head_dim"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -10000.0}}, "rope_parameters.rope_theta"),
    ({"rope_parameters": {"rope_type": 7}}, "rope_parameters.rope_type"),
    ({"rope_parameters": []}, "rope_parameters"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rope_scaling.factor"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 10**10}, "vocab_size"),
    ({"max_position_embeddings": -5}, "max_position_embeddings"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"hidden_act": 7}, "hidden_act"),
    ({"initializer_range": "wide"}, "initializer_range"),
    ({"sliding_window": "long"}, "sliding_window"),
    ({"use_sliding_window": 3}, "use_sliding_window"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"torch_dtype": 16}, "torch_dtype"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": "x\x1b[2J" * 100}, "model_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
]


@pytest.mark.parametrize(("values", "named"), BAD_VALUES, ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_a_config_with_a_wrong_value_names_it(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    write_tiny_model(tmp_path, "llama")
    change(tmp_path, lambda tensors: None, **values)
    with pytest.raises(ConfigError) as refused:
        read_architecture(tmp_path)
    message = str(refused.value)
    assert named in message and "config.json" in message
    assert len(message) <= 300 and message.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' + "[" * 900 + "]" * 900 + "}",
        '{"vocab_size": ' + "9" * 5000 + "}",
        "null",
        "",
        '{"a": NaN}',
        "\ufeff{}",
    ],
)
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MegaRLError, match=r"config\.json is not valid JSON \(") as refused:
        read_architecture(tmp_path)
    assert len(str(refused.value)) <= 300 and str(refused.value).isprintable()
