"""Input that is damaged, wrong or hostile is refused in one line, and never executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import SMALL_FILES, make_model, refusal, tool

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and, in several files, ``megatron`` and ``again``."""
    folder = tmp_path_factory.mktemp("good")
    make_model(folder / "model", "llama")
    assert tool("hf_to_megatron", folder / "model", folder / "megatron", *SMALL_FILES) == 0
    assert tool("megatron_to_hf", folder / "megatron", folder / "again", *SMALL_FILES) == 0
    return folder


def change_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def truncated(model: Path) -> str:
    file = sorted(model.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file} is truncated or corrupt (its header describes "


def no_header(model: Path) -> str:
    file = sorted(model.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 100)
    return f"{file} is truncated or corrupt (a header of "


def missing_shard(model: Path) -> str:
    file = sorted(model.glob("*.safetensors"))[0]
    file.unlink()
    return f"{file} is named by the index and missing"


def wrong_index(model: Path) -> str:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{model / files[0]} lacks model.norm.weight, which the index puts there"


def wrong_size(model: Path) -> str:
    change_config(model, intermediate_size=80)
    return "weights do not fit config.json; mis-shaped: "


def more_layers(model: Path) -> str:
    change_config(model, num_hidden_layers=5)
    return f"{model}: weights do not fit config.json; missing: model.layers.4.input_layernorm.weight"


def no_json(model: Path) -> str:
    (model / "config.json").write_text("{")
    return f"{model / 'config.json'} is not valid JSON"


def unknown_family(model: Path) -> str:
    change_config(model, model_type="gpt2")
    return f"{model / 'config.json'}: model_type 'gpt2' is not supported"


def mixed_types(model: Path) -> str:
    file = next(file for file in model.glob("*.safetensors") if "model.layers.2.mlp.up_proj.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, file)
    return f"{model}: model.layers.0.mlp.gate_proj.weight is torch.float32 and model.layers.2.mlp.up_proj.weight is torch.bfloat16"


@pytest.mark.parametrize(
    "damage",
    [truncated, no_header, missing_shard, wrong_index, wrong_size, more_layers, no_json, unknown_family, mixed_types],
)
def test_hugging_face_folder(good: Path, tmp_path: Path, capfd: Capture, damage: Callable[[Path], str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(good / "again", model)
    expected = damage(model)
    assert expected in refusal(capfd, "hf_to_megatron", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Exploit:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self._path,))


def shorten(checkpoint: Path) -> str:
    file = checkpoint / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file} has "


def lose_a_file(checkpoint: Path) -> str:
    (checkpoint / "__0_2.distcp").unlink()
    return f"{checkpoint / '__0_2.distcp'} is missing"


def unfinished(checkpoint: Path) -> str:
    (checkpoint / "metadata.json").unlink()
    return f"{checkpoint} holds no *.safetensors and no finished Megatron checkpoint"


def hostile_metadata(checkpoint: Path) -> str:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Exploit(checkpoint / "executed")))
    return f"{checkpoint / '.metadata'} is not the metadata of a checkpoint (it asks for pathlib.Path.touch"


def hostile_tensors(checkpoint: Path) -> str:
    """Every archive of the file becomes one that runs code when it is unpickled without care."""
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # our own
    for place in metadata.storage_data.values():
        if place.relative_path == "__0_1.distcp":
            place.offset = 0
            torch.save(Exploit(checkpoint / "executed"), checkpoint / "__0_1.distcp")
            place.length = (checkpoint / "__0_1.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return f"{checkpoint / '__0_1.distcp'} is truncated or corrupt at 0 ("


def another_config(checkpoint: Path) -> str:
    change_config(checkpoint, num_hidden_layers=3)
    return f"{checkpoint} does not fit config.json; decoder.layers."


def no_config(checkpoint: Path) -> str:
    (checkpoint / "config.json").unlink()
    return f"{checkpoint} has no config.json; give the folder of a Hugging Face model; name the folder of the model's"


def hostile_attribute(checkpoint: Path) -> str:
    """The call that Python 3.11.0 to 3.11.3 write for members of enums, on something else."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Attribute(Path, "touch")))
    return (
        f"{checkpoint / '.metadata'} is not the metadata of a checkpoint (it asks for the attribute touch of <class 'pathlib.Path'>"
    )


class Attribute:
    """Pickled as a call of getattr."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, self.arguments


class OldPickler(pickle.Pickler):
    """Members of enums as Python 3.11.0 to 3.11.3 write them."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_another_python(good: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    shutil.copytree(good / "megatron", checkpoint)
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # our own
    with (checkpoint / ".metadata").open("wb") as file:
        OldPickler(file).dump(metadata)
    assert b"getattr" in (checkpoint / ".metadata").read_bytes()
    assert tool("verify", good / "model", checkpoint) == 0


DAMAGES = [shorten, lose_a_file, unfinished, hostile_metadata, hostile_attribute, hostile_tensors, another_config, no_config]


@pytest.mark.parametrize("damage", DAMAGES)
def test_megatron_checkpoint(good: Path, tmp_path: Path, capfd: Capture, damage: Callable[[Path], str]) -> None:
    checkpoint = tmp_path / "megatron"
    shutil.copytree(good / "megatron", checkpoint)
    expected = damage(checkpoint)
    assert expected in refusal(capfd, "megatron_to_hf", checkpoint, tmp_path / "out")
    assert expected in refusal(capfd, "verify", good / "model", checkpoint)
    assert not (tmp_path / "out").exists() and not (checkpoint / "executed").exists()


def test_common_state_is_never_opened(good: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    shutil.copytree(good / "megatron", checkpoint)
    torch.save(Exploit(checkpoint / "executed"), checkpoint / "common.pt")
    assert tool("megatron_to_hf", checkpoint, tmp_path / "out") == 0
    assert tool("inspect", checkpoint) == 0
    assert not (checkpoint / "executed").exists()


@pytest.mark.parametrize("name", ["verify", "inspect"])
def test_no_model(tmp_path: Path, capfd: Capture, name: str) -> None:
    missing = tmp_path / "missing"
    assert refusal(capfd, name, *([missing] * (2 if name == "verify" else 1))) == (
        f"error: {missing} is not a folder; give the folder of a model or a checkpoint"
    )


def test_output_that_is_not_empty(good: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "notes.txt").touch()
    expected = f"error: {tmp_path} exists and is not an empty folder; choose another output or remove it"
    assert refusal(capfd, "hf_to_megatron", good / "model", tmp_path) == expected
    assert refusal(capfd, "megatron_to_hf", good / "megatron", tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
