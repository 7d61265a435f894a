"""Malformed model folders and tokenizers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from table import Case, Templates, config_in, copy, edited, sft_config_in

DEEP = "[" * 100_000 + "]" * 100_000
Damage = Callable[[Path], object]


def _model(label: str, damage: Damage, *names: str | tuple[str, ...], kind: str = "sft", **changes: Any) -> Case:
    """A run on a damaged copy of the model."""

    def make(folder: Path, templates: Templates) -> list[str]:
        model = copy(templates.model, folder / "model")
        damage(model)
        maker = config_in if kind == "rl" else sft_config_in
        return ["train", maker(folder, templates, **({"model": {"path": str(model)}, "evaluation": {}} | changes))]

    return Case(f"model: {label}", make, names)


def _config(label: str, *names: str | tuple[str, ...], kind: str = "sft", **values: Any) -> Case:
    """Other values in config.json."""
    return _model(label, lambda model: edited(model / "config.json", **values), *names, kind=kind)


def _file(label: str, name: str, content: str | bytes, *names: str | tuple[str, ...], kind: str = "sft", **changes: Any) -> Case:
    """Another content of a file of the folder."""

    def damage(model: Path) -> None:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return _model(label, damage, *names, kind=kind, **changes)


def _template(label: str, template: str, *names: str | tuple[str, ...]) -> Case:
    """A chat template, in a run that uses it."""

    def damage(model: Path) -> None:
        edited(model / "tokenizer_config.json", chat_template=template)
        (model / "chat_template.jinja").unlink(missing_ok=True)

    return _model(label, damage, *names, kind="rl", data=_CHAT)


def _tokenizer(label: str, change: Callable[[dict[str, Any]], object], *names: str | tuple[str, ...]) -> Case:
    """A change of tokenizer.json."""

    def damage(model: Path) -> None:
        data = json.loads((model / "tokenizer.json").read_text())
        change(data)
        (model / "tokenizer.json").write_text(json.dumps(data))

    return _model(label, damage, *names, kind="rl")


_CHAT = {
    "template": "chat",
    "train": {"type": "reasoning_gym", "task": "chain_sum", "size": 4, "options": {"max_terms": 2, "max_digits": 1}},
}


def _header(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of model.safetensors, and leave the tensors."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in sorted(header.items()) if name != "__metadata__")


def _tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _index(weight_map: object) -> Damage:
    def damage(model: Path) -> None:
        index = {"metadata": {}, "weight_map": weight_map}
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _set_norm(value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    return lambda model: _tensors(model, change)


def _as_folder(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def _loop(name: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(name)

    return damage


SHARDS = ("model.norm.weight", "model.embed_tokens.weight")

CASES = [
    _model("config.json missing", lambda model: (model / "config.json").unlink(), "config.json"),
    _model("config.json a folder", _as_folder("config.json"), "config.json"),
    _model("config.json a link to itself", _loop("config.json"), "config.json"),
    _file("config.json empty", "config.json", "", "config.json"),
    _file("config.json a list", "config.json", "[]", "config.json"),
    _file("config.json null", "config.json", "null", "config.json"),
    _file("config.json not UTF-8", "config.json", b'{"a": "\xff"}', "config.json"),
    _file("config.json 100,000 nested", "config.json", DEEP, "config.json"),
    _file("config.json number of 5,000 digits", "config.json", '{"hidden_size": ' + "9" * 5000 + "}", "config.json"),
    _config("model_type unknown", "model_type", "gpt17", model_type="gpt17"),
    _config("model_type a number", "model_type", model_type=3),
    _config("model_type of 5,000 characters", "model_type", model_type="m" * 5000),
    _config("model_type missing", "model_type", model_type=None),
    _config("hidden size 10^12", "hidden_size", hidden_size=10**12),
    _config("hidden size 0", "hidden_size", hidden_size=0),
    _config("hidden size negative", "hidden_size", hidden_size=-64),
    _config("hidden size a text", "hidden_size", hidden_size="64"),
    _config("hidden size a half", "hidden_size", hidden_size=64.5),
    _config("hidden size missing", "hidden_size", hidden_size=None),
    _config("hidden size of another model", ("hidden_size", "[258, 64]", "config.json"), hidden_size=128),
    _config("one layer too many", ("layers.4", "num_hidden_layers"), num_hidden_layers=5),
    _config("a million layers", "num_hidden_layers", num_hidden_layers=10**6),
    _config("no layers", "num_hidden_layers", num_hidden_layers=0),
    _config("one layer too few", ("layers.3", "num_hidden_layers"), num_hidden_layers=3, layer_types=["full_attention"] * 3),
    _config("heads that do not divide", ("num_attention_heads", "heads"), num_attention_heads=7),
    _config("key heads that do not divide", "num_key_value_heads", num_key_value_heads=3),
    _config("heads a flag", "num_attention_heads", num_attention_heads=True),
    _config("rms_norm_eps a text", "rms_norm_eps", rms_norm_eps="small"),
    _config("rms_norm_eps negative", "rms_norm_eps", rms_norm_eps=-1.0),
    _config(
        "rope_theta negative", "rope", kind="rl", rope_theta=-1.0, rope_parameters={"rope_type": "default", "rope_theta": -1.0}
    ),
    _config("rope_theta a text", "rope", rope_theta="big", rope_parameters={"rope_type": "default", "rope_theta": "big"}),
    _config("rope_scaling of an unknown type", "rope", rope_scaling={"rope_type": "spiral", "factor": 2.0}, rope_parameters=None),
    _config("rope_scaling a list", "rope", rope_scaling=[1], rope_parameters=None),
    _config("hidden_act unknown", "hidden_act", hidden_act="swoosh"),
    _config("vocabulary smaller than the tokenizer's", "vocab", vocab_size=100),
    _config("vocabulary of 10^12", "vocab_size", vocab_size=10**12),
    _config("tie_word_embeddings a text", "tie_word_embeddings", tie_word_embeddings="perhaps"),
    _config("max_position_embeddings 0", "max_position_embeddings", max_position_embeddings=0),
    _model("no weights", lambda model: (model / "model.safetensors").unlink(), "safetensors"),
    _model("weights a folder", _as_folder("model.safetensors"), "model.safetensors"),
    _file("weights empty", "model.safetensors", b"", "model.safetensors"),
    _file("weights of 8 bytes", "model.safetensors", b"\xff" * 8, "model.safetensors"),
    _file("weights a pickle", "model.safetensors", b"\x80\x04K\x01." * 20, "model.safetensors"),
    _model("safetensors header 100,000 nested", lambda model: _header(model, lambda header: DEEP), "model.safetensors"),
    _model("safetensors header a list", lambda model: _header(model, lambda header: "[1]"), "model.safetensors"),
    _model(
        "safetensors header with a negative shape",
        lambda model: _header(model, lambda header: _first(header).update(shape=[-258, 64])),
        "model.safetensors",
    ),
    _model(
        "safetensors header with a shape of texts",
        lambda model: _header(model, lambda header: _first(header).update(shape=["a"])),
        "model.safetensors",
    ),
    _model(
        "safetensors header with an unknown type",
        lambda model: _header(model, lambda header: _first(header).update(dtype="F7")),
        "model.safetensors",
    ),
    _model(
        "safetensors header with offsets beyond the file",
        lambda model: _header(model, lambda header: _first(header).update(data_offsets=[0, 10**15])),
        "model.safetensors",
    ),
    _model(
        "safetensors header with offsets turned round",
        lambda model: _header(model, lambda header: _first(header).update(data_offsets=[100, 0])),
        "model.safetensors",
    ),
    _model(
        "safetensors header with a number as entry",
        lambda model: _header(model, lambda header: header.update({"model.norm.weight": 3})),
        "model.safetensors",
    ),
    _model("index that is no JSON", lambda model: (model / "model.safetensors.index.json").write_text("{"), "index.json"),
    _model("index a list", lambda model: (model / "model.safetensors.index.json").write_text("[]"), "index.json"),
    _model("index without a map", lambda model: (model / "model.safetensors.index.json").write_text("{}"), "index.json"),
    _model("index with a list as map", _index([1]), "index.json"),
    _model("index with a number as file", _index({"model.norm.weight": 3}), "index.json"),
    _model("index with a file elsewhere", _index({"model.norm.weight": "../../secret.safetensors"}), ("index.json", "secret")),
    _model("index with a missing file", _index(dict.fromkeys(SHARDS, "model-00007.safetensors")), "model-00007.safetensors"),
    _model(
        "a tensor missing",
        lambda model: _tensors(model, lambda tensors: tensors.pop("model.norm.weight")),
        "model.norm.weight",
    ),
    _model("a tensor too many", lambda model: _tensors(model, lambda tensors: tensors.update(surprise=torch.ones(2))), "surprise"),
    _model(
        "integers as weights",
        lambda model: _tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})),
        "model.norm.weight",
    ),
    _model("NaN in a weight", _set_norm(float("nan")), "model.norm.weight", kind="rl"),
    _model("NaN in a weight of SFT", _set_norm(float("nan")), "model.norm.weight"),
    _model("infinity in a weight", _set_norm(float("inf")), "model.norm.weight"),
    _model("no tokenizer", lambda model: [file.unlink() for file in model.glob("tokenizer*")], "tokenizer"),
    _file("tokenizer.json empty", "tokenizer.json", "", "tokenizer"),
    _file("tokenizer.json 100,000 nested", "tokenizer.json", DEEP, "tokenizer"),
    _file("tokenizer.json a list", "tokenizer.json", "[]", "tokenizer"),
    _file("tokenizer_config.json not JSON", "tokenizer_config.json", "{", "tokenizer"),
    _file("tokenizer_config.json a list", "tokenizer_config.json", "[]", "tokenizer"),
    _file("generation_config.json not JSON", "generation_config.json", "{", "generation_config.json"),
    _file("generation_config.json eos a text", "generation_config.json", '{"eos_token_id": "end"}', "generation_config.json"),
    _tokenizer("tokenizer without a vocabulary", lambda data: data["model"].update(vocab={}), "tokenizer"),
    _tokenizer("tokenizer of an unknown kind", lambda data: data["model"].update(type="Magic"), "tokenizer"),
    _tokenizer(
        "tokenizer whose ids repeat",
        lambda data: data["model"]["vocab"].update(dict.fromkeys(list(data["model"]["vocab"])[:9], 1)),
        "tokenizer",
    ),
    _template("chat template that does not parse", "{% for %}", "template"),
    _template("chat template that refuses", "{{ raise_exception('no chat today') }}", "template", "no chat today"),
    _template("chat template that refuses in 5,000 characters", "{{ raise_exception('no ' * 2000) }}", "template"),
    _template("chat template that refuses with control characters", "{{ raise_exception('a\x1b[31mb\nc') }}", "template"),
    _template("chat template that is empty", "", "template"),
    _template("chat template that gives nothing", "{# nothing #}", ("template", "prompt")),
    _template(
        "chat template that never ends",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "template",
    ),
    _template("chat template of 10^9 characters", "{{ 'x' * 10**9 }}", "template"),
    _template("chat template that divides by zero", "{{ 1 / 0 }}", "template"),
    _template("chat template that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template"),
    _template("chat template of 10^8 list items", "{{ (range(99999) | list) * 9999 }}", "template"),
    _template("chat template that reaches for the system", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
]
