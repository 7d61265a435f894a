"""A trained model as a Hugging Face folder."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import WeightsError
from megarl.weights.distributed_checkpoint import MEGATRON_MARKER
from megarl.weights.files.safetensors_files import INDEX, write_safetensors
from megarl.weights.files.shard_folder import SHARD_MAP

SHARD_BYTES = 4 * 2**30
CARRIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # config, generation config, tokenizer files, chat template
LEFT_BEHIND = (INDEX, MEGATRON_MARKER, SHARD_MAP)
OF_THE_MODEL = ("config.json", "generation_config.json")  # of the files that stand beside a tokenizer's
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)


def write_hugging_face_folder(
    tensors: Iterable[tuple[str, Tensor]], source: Path, tokenizer: Path, output: Path, *, with_value_head: bool = False
) -> None:
    """Write safetensors shards with index, and the config and tokenizer files of the source model.

    The folder appears under its name only when it is whole; one that stood there is replaced.

    Args:
        tensors: Hugging Face names and full tensors; at most one shard of them is held in memory.
        source: folder whose config is carried over, with the dtype of the tensors in it.
        tokenizer: folder whose tokenizer files are carried over.
        output: the folder to write.
        with_value_head: the tensors are a critic's, and the folder is one of transformers' ...ForSequenceClassification.

    Raises:
        WeightsError: it cannot be written, for example because the disk is full.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        copy_side_files(source, tokenizer, partial)
        if with_value_head:
            _describe_value_head(partial / "config.json")
        set_dtype(partial, _write_shards(tensors, partial))
        if output.is_symlink():
            output.unlink()  # where it leads is not this run's
        shutil.rmtree(output, ignore_errors=True)
        os.replace(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WeightsError(f"cannot write the Hugging Face folder {output}: {error}") from error


def copy_side_files(config: Path, tokenizer: Path, output: Path) -> None:
    """Carry config, tokenizer files and chat templates over.

    Args:
        config: folder whose config.json and generation_config.json are taken.
        tokenizer: folder whose tokenizer files are taken, and none that only ``config`` has.
        output: the folder to write to.
    """
    is_one_folder = config.resolve() == tokenizer.resolve()
    for path in _carried(config):
        if is_one_folder or path.name not in TOKENIZER_FILES:
            shutil.copyfile(path, output / path.name)
    if not is_one_folder:
        for path in _carried(tokenizer):
            if path.name not in OF_THE_MODEL:
                shutil.copyfile(path, output / path.name)
    for path in (tokenizer / "additional_chat_templates").glob("*.jinja"):
        (output / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, output / path.parent.name / path.name)


def _carried(folder: Path) -> list[Path]:
    return [
        path for path in folder.iterdir() if path.is_file() and path.suffix in CARRIED_SUFFIXES and path.name not in LEFT_BEHIND
    ]


def set_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Have config.json name the dtype of the weights, under the key that it has: transformers 4 and 5 have each their own."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and any(config.get(key) != name for key in keys):
        path.write_text(json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n", encoding="utf-8")


def _describe_value_head(config: Path) -> None:
    """Make a language model's config that of the same model with one label, which transformers takes from the number of names."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["architectures"] = [
        re.sub(r"For\w+$", "ForSequenceClassification", architecture) for architecture in values.get("architectures") or ()
    ]
    values |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    config.write_text(json.dumps(values, indent=2), encoding="utf-8")


def shard_name(number: int, count: int) -> str:
    """Name of safetensors file ``number`` (from 1) of ``count``, as transformers gives them."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: list[list[str]], total_bytes: int) -> None:
    """Write the index of the folder's safetensors files, unless there is one file only.

    Args:
        folder: of the files.
        files: names of the tensors in each file.
        total_bytes: of all tensors.
    """
    if len(files) > 1:
        weight_map = {name: shard_name(number, len(files)) for number, names in enumerate(files, start=1) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> torch.dtype:
    """Write the files and the index; returns the dtype of the first tensor, which is that of all but some buffers."""
    files: list[list[str]] = []
    total_bytes = 0
    dtype = torch.float32
    for shard in _shards(tensors):
        dtype = dtype if files else next(iter(shard.values())).dtype
        files.append(list(shard))
        # not safetensors' own save_file, whose files only their owner can read, whatever the umask says
        with (folder / f"shard-{len(files)}").open("wb") as stream:
            write_safetensors(stream, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in shard.items()}, shard.values())
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    for number in range(1, len(files) + 1):
        os.replace(folder / f"shard-{number}", folder / shard_name(number, len(files)))
    write_index(folder, files, total_bytes)
    return dtype


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
