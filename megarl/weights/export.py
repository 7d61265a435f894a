"""The policy as a Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megarl.errors import WeightsError

SHARD_BYTES = 4 * 2**30
CARRIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # config, generation config, tokenizer files, chat template


def write_hugging_face_folder(tensors: Iterable[tuple[str, Tensor]], source: Path, tokenizer: Path, output: Path) -> None:
    """Write safetensors shards with index, and the config and tokenizer files of the source model.

    The folder appears under its name only when it is whole; one that stood there is replaced.

    Args:
        tensors: Hugging Face names and full tensors; at most one shard of them is held in memory.
        source: folder whose config is carried over.
        tokenizer: folder whose tokenizer files are carried over.
        output: the folder to write.

    Raises:
        WeightsError: it cannot be written, for example because the disk is full.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _copy_side_files(tokenizer, partial)
        _copy_side_files(source, partial)
        _write_shards(tensors, partial)
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:  # safetensors wraps the full disk in an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        raise WeightsError(f"cannot write the Hugging Face folder {output}: {error}") from error


def _copy_side_files(source: Path, output: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix in CARRIED_SUFFIXES and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, output / path.name)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    files: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for shard in _shards(tensors):
        path = folder / f"shard-{len(files) + 1}"
        save_file(shard, path, metadata={"format": "pt"})
        files.append((path, list(shard)))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(files) == 1:
        os.replace(files[0][0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(path, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor.cpu().contiguous()
        num_bytes += tensor.nbytes
    yield shard
