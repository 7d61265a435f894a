"""Damaged and hostile checkpoints: named in one line before anything is trained, and nothing of them is executed."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megarl.cli.parity import parse_layout, with_layout
from megarl.config.schema import Config
from megarl.errors import CheckpointError
from megarl.families.registry import read_architecture
from megarl.parallel.launch import run_local_ranks
from megarl.train.roles import Policy, is_main_rank
from megarl.weights.checkpoint import (
    CheckpointWriter,
    check_checkpoint,
    check_checkpoint_together,
    load_policy,
    read_data_state,
    whole_checkpoints,
)
from megarl.weights.distributed_checkpoint import DistributedCheckpoint
from megarl.weights.manifest import RunState, read_manifest
from megarl.weights.mapping import WeightMap, build_weight_map
from tiny import tiny_config, write_tiny_model

PAGE = 4096


def save(config: Config, folder: Path) -> None:
    policy = Policy(config, total_updates=1)
    for asynchronous, step in ((False, 1), (True, 2)):
        writer = CheckpointWriter(folder, policy.weight_map, keep=2, asynchronous=asynchronous)
        state = RunState(step=step, weight_version=step, data={"position": 7})
        writer.save(policy.sharded_state(), state, {"groups": ["ü" * PAGE]} if is_main_rank() else None)
        writer.close()


def restore(config: Config, checkpoint: Path) -> None:
    policy = Policy(config, total_updates=1)
    state = check_checkpoint_together(checkpoint, policy.weight_map).state
    read_data_state(checkpoint, state)
    policy.load_state(load_policy(checkpoint, policy.sharded_state(is_loading=True)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``checkpoints`` of two ranks, one of them written in the background."""
    folder = tmp_path_factory.mktemp("saved")
    write_tiny_model(folder / "model", "qwen2")
    config, num_ranks = with_layout(tiny_config(folder / "model"), parse_layout("tp=2"))
    run_local_ranks(save, (config, folder / "checkpoints"), num_ranks, 120)
    return folder


@pytest.fixture(scope="module")
def weight_map(saved: Path) -> WeightMap:
    return build_weight_map(read_architecture(saved / "model"), 1, with_transformer_engine=False)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of one."""
    return Path(shutil.copytree(saved / "checkpoints" / "step_00000001", tmp_path / "step_00000001"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    """The last whole page of the file that holds anything, or the whole of a smaller file."""
    data = path.read_bytes()
    starts = [start for start in range(0, max(1, len(data) - PAGE), PAGE) if any(data[start : start + PAGE])]
    size = min(PAGE, len(data) - starts[-1])
    path.write_bytes(data[: starts[-1]] + bytes(size) + data[starts[-1] + size :])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "bit flip": flip_bit,
    "zero page": zero_page,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", [1, 2])
def test_every_damage_of_every_file_is_named(saved: Path, weight_map: WeightMap, tmp_path: Path, step: int, damage: str) -> None:
    whole = saved / "checkpoints" / f"step_{step:08d}"
    check_checkpoint(whole, weight_map)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert {path.name for path in names} >= {"manifest.json", "outstanding.json", ".metadata", "common.pt", "metadata.json"}
    assert sum(path.suffix == ".distcp" for path in names) >= 3  # of both ranks
    for number, name in enumerate(names):
        copy = Path(shutil.copytree(whole, tmp_path / str(number) / whole.name))
        DAMAGES[damage](copy / name)
        with pytest.raises(CheckpointError) as error:
            check_checkpoint(copy, weight_map)
        line = str(error.value)
        assert str(copy / name) in line or (name.name == "manifest.json" and damage == "deleted"), line
        assert len(line.replace(str(copy), "")) < 200 and line.isprintable()


def test_ranks_share_the_reading_and_all_raise(saved: Path, checkpoint: Path) -> None:
    files = read_manifest(checkpoint).files
    for name in files:
        if name.endswith(".distcp"):
            damaged = checkpoint / name
            flip_bit(damaged)
            with pytest.raises(CheckpointError, match=f"{damaged} is damaged"):
                run_local_ranks(restore, (tiny_config(saved / "model"), checkpoint), 2, 60)
            flip_bit(damaged)


def with_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest's values and give it the digest that belongs to them."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values["digest"] = "0" * 32
    text = json.dumps(values, indent=2)
    path.write_text(text.replace("0" * 32, xxhash.xxh3_128_hexdigest(text.encode()), 1))


def write(text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: with_manifest(folder, change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write("{}"), "has no format"),
        (write("[1]"), "has no format"),
        (write("null"), "has no format"),
        (write(""), "not valid JSON"),
        (write("[" * 100_000), "not valid JSON"),
        (write('{"format": ' + "9" * 5000 + "}"), "not valid JSON"),
        (write(b'{"format": "\xff"}'), "is not UTF-8 text"),
        (write('{"format": 1}'), "has format 1, and this MegaRL reads 2 and 3"),
        (write('{"format": {}}'), "has format {}"),
        (changed(lambda values: values["state"].pop("step")), "state.step is missing"),
        (changed(lambda values: values["state"].update(newer=1)), "state.newer is unknown to this MegaRL"),
        (changed(lambda values: values.update(newer=1)), "newer is unknown to this MegaRL"),
        (changed(lambda values: values["state"].update(step="4")), "state.step is '4'"),
        (changed(lambda values: values["state"].update(step=-1)), "state.step is -1"),
        (changed(lambda values: values["state"].update(step=True)), "state.step is True"),
        (changed(lambda values: values["state"].update(step=1.5)), "state.step is 1.5"),
        (changed(lambda values: values["state"].update(step=10**30)), "state.step is 1"),
        (changed(lambda values: values["state"].update(data=[])), "state.data is list"),
        (changed(lambda values: values["state"].update(distributed_optimizer={"policy": "yes"})), "distributed_optimizer.policy"),
        (changed(lambda values: values["files"].update({"../../x": values["files"]["policy/.metadata"]})), "no file of the"),
        (changed(lambda values: values.update(files={"policy/.metadata": {"bytes": -1, "xxh3_128": "0" * 32}})), "bytes is -1"),
        (changed(lambda values: values.update(model_digest="another")), "is a checkpoint of another model"),
    ],
)
def test_malformed_manifests(checkpoint: Path, weight_map: WeightMap, damage: Callable[[Path], Any], words: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(checkpoint, weight_map)
    line = str(error.value)
    assert words in line and str(checkpoint) in line, line
    assert len(line.replace(str(checkpoint), "")) < 250 and line.isprintable()


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "null", '{"a": ' + "9" * 5000 + "}"])
def test_malformed_groups(saved: Path, checkpoint: Path, text: str) -> None:
    (checkpoint / "outstanding.json").write_text(text)
    with_manifest(checkpoint, lambda values: values["files"].pop("outstanding.json"))
    with pytest.raises(CheckpointError, match=r"outstanding\.json"):
        run_local_ranks(restore, (tiny_config(saved / "model"), checkpoint), 1, 60)


def test_checkpoints_without_digests_are_read(saved: Path, checkpoint: Path) -> None:
    values = json.loads((checkpoint / "manifest.json").read_text())
    del values["digest"]
    old = values | {"format": 2, "files": {name: entry["bytes"] for name, entry in values["files"].items()}}
    (checkpoint / "manifest.json").write_text(json.dumps(old))
    assert not read_manifest(checkpoint).has_digests
    run_local_ranks(restore, (tiny_config(saved / "model"), checkpoint), 2, 60)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def poison_metadata(policy: Path, payload: Payload) -> Callable[[], Any]:
    path = policy / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = payload
    path.write_bytes(pickle.dumps(metadata))
    return lambda: pickle.loads(path.read_bytes())


def poison_common(policy: Path, payload: Payload) -> Callable[[], Any]:
    torch.save({"scheduler": payload}, policy / "common.pt")
    return lambda: torch.load(policy / "common.pt", weights_only=False)


def poison_chunks(policy: Path, payload: Payload, kind: type) -> Callable[[], Any]:
    """Replace the archives of all tensors, or of all objects, by one at the end of their files."""
    metadata = pickle.loads((policy / ".metadata").read_bytes())
    stream = io.BytesIO()
    torch.save([payload], stream)
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata) == (kind is BytesStorageMetadata):
            file = policy / place.relative_path
            place.offset, place.length = file.stat().st_size, stream.tell()
            file.write_bytes(file.read_bytes() + stream.getvalue())
    (policy / ".metadata").write_bytes(pickle.dumps(metadata))
    return lambda: torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


POISONS: dict[str, Callable[[Path, Payload], Callable[[], Any]]] = {
    ".metadata": poison_metadata,
    "common.pt": poison_common,
    "tensors": lambda policy, payload: poison_chunks(policy, payload, torch.Tensor),
    "objects": lambda policy, payload: poison_chunks(policy, payload, BytesStorageMetadata),
}


@pytest.mark.parametrize("place", POISONS)
def test_no_payload_is_executed(saved: Path, checkpoint: Path, tmp_path: Path, place: str) -> None:
    """The manifest fits the changed files, so that the reader itself is asked, and not the digests."""
    mark = tmp_path / "mark"
    plain_load = POISONS[place](checkpoint / "policy", Payload(mark))
    plain_load()
    assert mark.exists()  # it does fire
    mark.unlink()
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    entries = {name: path.read_bytes() for name, path in files.items() if path.name != "manifest.json"}
    digests = {name: {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)} for name, data in entries.items()}
    with_manifest(checkpoint, lambda values: values.update(files=digests))
    try:
        run_local_ranks(restore, (tiny_config(saved / "model"), checkpoint), 2, 60)
    except CheckpointError as error:
        assert str(checkpoint) in str(error) and str(error).isprintable()
    else:
        assert place == "objects"  # modules' extra state is not read at all
    if place == "objects":
        folder = DistributedCheckpoint(checkpoint / "policy")
        with pytest.raises(CheckpointError, match="corrupt"):
            folder.read_object(next(iter(folder._objects)))
    assert not mark.exists()


def test_names_that_are_no_steps_are_no_checkpoints(checkpoint: Path) -> None:
    for name in ("step_00000009.copy", "step_x", "step_9"):
        shutil.copytree(checkpoint, checkpoint.parent / name)
    assert whole_checkpoints(checkpoint.parent) == [checkpoint]
