"""Safetensors files (https://huggingface.co/docs/safetensors): a folder of them read by rows, one of them written by pieces."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megarl.errors import WeightsError, listed, one_line, quoted, shortened
from megarl.json_text import parse_json, read_json_object
from megarl.weights.files.stored_tensors import StoredTensor, as_bytes, read_stored_rows

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER = "adapter_config.json"
LENGTH_BYTES = 8  # of the header's length, a little-endian integer at the start of the file
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder.

    Raises:
        WeightsError: a file is missing, truncated or corrupt, or the index is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _stored_tensors(folder)
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill ``target`` with rows of the tensor ``name``, from row ``start`` on."""
        read_stored_rows(self.tensors[name], start, target)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the files that transformers takes: model.safetensors, or those that the index names."""
    index, single = folder / INDEX, folder / SINGLE_FILE
    if (folder / ADAPTER).exists():
        raise WeightsError(f"{folder} holds an adapter ({ADAPTER}); merge it into its model and give the merged folder")
    file_of = _read_index(index) if index.exists() else {}
    others = sorted(set(file_of.values()) - {SINGLE_FILE})
    if single.exists():
        if others:
            raise WeightsError(
                f"{folder} holds {SINGLE_FILE} and {INDEX}, which names other files ({shortened(others[0], 60)}); remove the one "
                "that is out of date"
            )
        return read_header(single)
    if not file_of:
        files = sorted(folder.glob("model-*.safetensors"))
        if not files:
            raise WeightsError(_no_weights(folder))
        return {name: tensor for file in files for name, tensor in read_header(file).items()}
    headers = {}
    for file in sorted(set(file_of.values())):
        if not (folder / file).is_file():
            raise WeightsError(f"{folder / file} is named by the index and missing; download the model again")
        headers[file] = read_header(folder / file)
    for name, file in file_of.items():
        if name not in headers[file]:
            raise WeightsError(f"{folder / file} lacks {name}, which the index puts there; download the model again")
    return {name: headers[file][name] for name, file in file_of.items()}


def _no_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors*"))
    if not found:
        return f"{folder} has no *.safetensors file; model.init: random draws weights instead"
    return (
        f"{folder} has neither {SINGLE_FILE} nor {INDEX}, only {shortened(listed(found, 2), 80)}; give the folder of a whole model"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Read which file holds each tensor."""
    try:
        file_of = read_json_object(index)["weight_map"]
        if not isinstance(file_of, dict):
            raise ValueError("its weight_map is no object")
        for name, file in file_of.items():
            if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
                raise ValueError(f"the file of {shortened(name, 60)} is {quoted(file)}, no file name")
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{index} is not a safetensors index ({shortened(str(error))}); download the model again") from error
    return dict(file_of)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of one file.

    Raises:
        WeightsError: it is truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = path.stat().st_size
            if not 0 < length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, LENGTH_BYTES + length, entry) for name, entry in header.items()}
        end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=LENGTH_BYTES + length)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shortened(str(error) if isinstance(error, ValueError) else one_line(error))
        raise WeightsError(f"{path} is truncated or corrupt ({reason}); download the model again") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    return tensors


def _stored_tensor(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    dtype, (start, stop), shape = entry["dtype"], entry["data_offsets"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise ValueError(f"dtype {quoted(dtype)} is not supported")
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"a tensor has shape {quoted(shape)} and data_offsets {quoted([start, stop])}")
    tensor = StoredTensor(path, data + start, tuple(shape), STORED_DTYPES[dtype])
    if tensor.num_bytes != stop - start:
        raise ValueError(f"a tensor of {list(tensor.shape)} {dtype} cannot have {stop - start} bytes")
    return tensor


def write_safetensors(stream: BinaryIO, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], pieces: Iterable[Tensor]) -> None:
    """Write one file.

    Args:
        stream: opened for writing.
        tensors: name to shape and dtype.
        pieces: the contiguous CPU tensors whose bytes, one after the other, are those of the tensors in that order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % LENGTH_BYTES)
    stream.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
    for piece in pieces:
        stream.write(as_bytes(piece))
