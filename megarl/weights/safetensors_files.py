"""Safetensors files (https://huggingface.co/docs/safetensors): a folder of them read by rows, one of them written by pieces."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megarl.errors import WeightsError
from megarl.weights.stored_tensors import StoredTensor, as_bytes, read_rows

INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8  # of the header's length, a little-endian integer at the start of the file
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
DTYPES = {
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        read_rows(self.tensors[name], start, target)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{folder} has no *.safetensors file; model.init: random draws weights instead")
        return {name: tensor for file in files for name, tensor in read_header(file).items()}
    try:
        file_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is not a safetensors index ({error}); download the model again") from error
    headers = {}
    for file in sorted(set(file_of.values())):
        if not (folder / file).is_file():
            raise WeightsError(f"{folder / file} is named by the index and missing; download the model again")
        headers[file] = read_header(folder / file)
    for name, file in file_of.items():
        if name not in headers[file]:
            raise WeightsError(f"{folder / file} lacks {name}, which the index puts there; download the model again")
    return {name: headers[file][name] for name, file in file_of.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        WeightsError: it is truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = path.stat().st_size
            if not 0 < length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(path, LENGTH_BYTES + length, entry) for name, entry in header.items()}
        end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=LENGTH_BYTES + length)
        if end != size:
            raise ValueError(f"its header describes {end} bytes, the file has {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is truncated or corrupt ({error}); download the model again") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error
    return tensors


def _stored_tensor(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not supported")
    start, stop = entry["data_offsets"]
    tensor = StoredTensor(path, data + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if start < 0 or tensor.num_bytes != stop - start:
        raise ValueError(f"a tensor of {list(tensor.shape)} {entry['dtype']} cannot have {stop - start} bytes")
    return tensor


def write_safetensors(stream: BinaryIO, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], pieces: Iterable[Tensor]) -> None:
    """Write one file.

    Args:
        stream: opened for writing.
        tensors: name to shape and dtype.
        pieces: the contiguous CPU tensors whose bytes, one after the other, are those of the tensors in that order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
