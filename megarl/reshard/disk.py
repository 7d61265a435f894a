"""Carries out a plan through a file system that both sides see, where no process group joins them or the receivers come later.

    weights_v12/
        rank_00000.safetensors      what source rank 0 sends, each part once however many ranks need it
        manifest.json               plan, files, and a digest of every tensor

A version is written under another name, the manifest last, and then renamed: a folder of this name is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megarl.errors import TransferError, WeightsError
from megarl.reshard.parcels import FlatPart
from megarl.reshard.plan import Copy, Message, Plan
from megarl.weights.safetensors_files import read_header, write_safetensors
from megarl.weights.stored_tensors import StoredTensor, as_bytes, read_rows

MANIFEST = "manifest.json"


def latest_version(folder: Path) -> int | None:
    """The highest version that is whole; None when there is none."""
    names = [re.fullmatch(r"weights_v(\d+)", path.name) for path in folder.glob("weights_v*")]
    return max((int(name[1]) for name in names if name), default=None)


def write_version(
    plan: Plan, source: Mapping[str, FlatPart], folder: Path, version: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write a version; collective over ``group`` (None is the world), whose rank r is source rank r.

    Args:
        source: this rank's parameters by name.

    Raises:
        TransferError: some rank could not write; the version does not exist then.
    """
    rank, whole = dist.get_rank(group), folder / f"weights_v{version}"
    partial = whole.with_name(whole.name + ".partial")
    digests, problem = {}, ""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        digests = _write_file(partial / _file_name(rank), plan, source, rank)
    except OSError as error:
        problem = f"rank {rank} cannot write {partial / _file_name(rank)}: {error.strerror}"
    gathered: list[tuple[dict[str, str], str]] = [({}, "")] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (digests, problem), group)
    problems = [text for _, text in gathered if text]
    if rank == 0 and not problems:
        problems = _publish(partial, whole, plan, [entry for entry, _ in gathered])
    outcome = [problems]
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[0]:
        raise TransferError(f"{outcome[0][0]}; free some space there or give another folder")
    return whole


@torch.no_grad()
def read_version(plan: Plan, rank: int, destination: Mapping[str, FlatPart], folder: Path, version: int) -> None:
    """Fill what destination rank ``rank`` needs; no other rank is involved.

    Args:
        destination: the rank's parameters by name, written in place.

    Raises:
        TransferError: the version is not whole, is of another plan, or has changed; the destination must not be used then.
    """
    whole = folder / f"weights_v{version}"
    manifest = _read_manifest(whole, plan)
    writers, files = plan.sender[_first_messages(plan)], {}
    for key, chunk, copy in _keyed(plan, np.flatnonzero(plan.receiver == rank), plan.for_receiver(rank)):
        name = _file_name(int(writers[chunk]))
        if name not in files:
            files[name] = _open(whole / name, manifest["files"][name]["bytes"])
        values = _read(files[name][key], manifest["files"][name]["digests"][key], f"{whole / name}: {copy.tensor} ({key})")
        destination[copy.destination_parameter].region(copy.destination).copy_(values)


def _first_messages(plan: Plan) -> NDArray[np.int64]:
    """[chunks], the first message that carries each chunk: its sender writes it."""
    return np.unique(plan.chunk, return_index=True)[1]


def _keyed(plan: Plan, numbers: Iterable[int], messages: Iterable[Message]) -> Iterator[tuple[str, int, Copy]]:
    """Each copy of some messages with its name in the file and its chunk."""
    for number, message in zip(numbers, messages, strict=True):
        chunk = int(plan.chunk[number])
        for index, copy in enumerate(message.copies):
            yield f"{chunk}.{index}", chunk, copy


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


@torch.no_grad()
def _write_file(path: Path, plan: Plan, source: Mapping[str, FlatPart], rank: int) -> dict[str, str]:
    """Write one rank's file and have it on the disk; returns the digest of each tensor."""
    numbers, first = np.flatnonzero(plan.sender == rank), _first_messages(plan)
    mine = [pair for pair in zip(numbers, plan.for_sender(rank), strict=True) if first[plan.chunk[pair[0]]] == pair[0]]
    parts = {
        key: source[copy.source_parameter].region(copy.source)
        for key, _, copy in _keyed(plan, [int(number) for number, _ in mine], [message for _, message in mine])
    }
    digests = {}

    def pieces() -> Iterator[Tensor]:
        for key, part in parts.items():
            values = part.contiguous().cpu()
            digests[key] = _digest(values)
            yield values

    with path.open("wb") as stream:
        write_safetensors(stream, {key: (tuple(part.shape), part.dtype) for key, part in parts.items()}, pieces())
        stream.flush()
        os.fsync(stream.fileno())
    return digests


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(as_bytes(values), digest_size=8).hexdigest()


def _plan_digest(plan: Plan) -> str:
    columns = (plan.pieces, plan.first_piece, plan.chunk, plan.sender, plan.receiver)
    return hashlib.blake2b(b"".join(column.tobytes() for column in columns), digest_size=8).hexdigest()


def _publish(partial: Path, whole: Path, plan: Plan, digests: list[dict[str, str]]) -> list[str]:
    """Write the manifest and give the folder its name; returns what went wrong."""
    try:
        sizes = [(partial / _file_name(rank)).stat().st_size for rank in range(len(digests))]
        files = {
            _file_name(rank): {"bytes": size, "digests": entry}
            for rank, (size, entry) in enumerate(zip(sizes, digests, strict=True))
        }
        with (partial / MANIFEST).open("w") as stream:
            json.dump({"plan": _plan_digest(plan), "files": files}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if whole.exists():  # written before, by a run that did not know
            shutil.rmtree(whole)
        os.replace(partial, whole)
    except OSError as error:
        return [f"cannot finish {whole}: {error.strerror}"]
    return []


def _read_manifest(whole: Path, plan: Plan) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((whole / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise TransferError(f"{whole} is no whole version of the weights ({error}); read one that has a {MANIFEST}") from error
    if manifest["plan"] != _plan_digest(plan):
        raise TransferError(
            f"{whole} was written by another reshard plan; both sides must have the same model, layouts and bucket size"
        )
    return manifest


def _open(path: Path, num_bytes: int) -> dict[str, StoredTensor]:
    size = path.stat().st_size if path.exists() else 0
    if size != num_bytes:
        raise TransferError(f"{path} has {size} bytes, its {MANIFEST} says {num_bytes}; write the version again")
    try:
        return read_header(path)
    except WeightsError as error:
        raise TransferError(f"{path} is corrupt; write the version again") from error


def _read(stored: StoredTensor, digest: str, what: str) -> Tensor:
    values = torch.empty(stored.shape, dtype=stored.dtype)
    read_rows(stored, 0, values, keep_cached=True)
    if _digest(values) != digest:
        raise TransferError(f"{what} is not what was written; write the version again")
    return values
