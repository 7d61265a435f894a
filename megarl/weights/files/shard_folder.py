"""A folder of an engine's shards, each rank's parameters in files of their own, read as whole Hugging Face tensors.

    engine_shards.json                          the engine, its layout, and what every parameter is made of
    model-rank-0-part-0.safetensors             parameters of rank 0, in one part or several
    config.json, tokenizer.json, …

The files are named, and the parameters called, as the ``sharded_state`` loaders of vLLM (model_executor/model_loader/
sharded_state_loader.py) and SGLang (srt/model_loader/loader.py) want them. Nothing here knows an engine: what its parameters
are made of is in engine_shards.json.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megarl.errors import WeightsError, listed, shortened
from megarl.json_text import parse_json
from megarl.weights.files.safetensors_files import read_header
from megarl.weights.files.stored_tensors import StoredTensor, read_into, windows

SHARD_MAP = "engine_shards.json"


def rank_file(rank: int, part: int | str) -> str:
    """Name of a file; part ``*`` stands for all of a rank."""
    return f"model-rank-{rank}-part-{part}.safetensors"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of a Hugging Face tensor that are whole rows of a parameter. A vector is one column.

    Attributes:
        tensor: its name.
        row: first row in the tensor.
        column: first column in the tensor.
        rows: how many.
        columns: how many; all that the parameter has.
        local_row: first row in the parameter.
        ranks: that hold it there.
    """

    tensor: str
    row: int
    column: int
    rows: int
    columns: int
    local_row: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardParameter:
    """A parameter that every rank has, seen as a matrix of its last dimension and all before.

    Attributes:
        shape: on each rank.
        fill: the value of rows that no block covers: padding of the vocabulary, or a constant of the engine.
        blocks: what it is made of.
    """

    shape: tuple[int, ...]
    fill: float
    blocks: tuple[Block, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return (math.prod(self.shape), 1) if len(self.shape) < 2 else (math.prod(self.shape[:-1]), self.shape[-1])

    def blocks_of(self, rank: int) -> list[Block]:
        """Return the blocks that a rank holds, by row."""
        return sorted((block for block in self.blocks if rank in block.ranks), key=lambda block: block.local_row)

    def filled(self, rank: int) -> Iterator[tuple[int, int]]:
        """Return the row ranges without a block on a rank."""
        covered = [(block.local_row, block.local_row + block.rows) for block in self.blocks_of(rank)]
        for (_, start), (stop, _) in pairwise([(0, 0), *covered, (self.matrix[0], 0)]):
            if start < stop:
                yield start, stop


@dataclass(frozen=True, slots=True)
class ShardMap:
    """What engine_shards.json says.

    Attributes:
        engine: whose parameters, such as vllm.
        tp: ranks that attention is cut over.
        ep: ranks that the experts are distributed over.
        tensors: shape of each Hugging Face tensor.
        parameters: by the engine's names.
    """

    engine: str
    tp: int
    ep: int
    tensors: dict[str, tuple[int, ...]]
    parameters: dict[str, ShardParameter]

    @property
    def num_ranks(self) -> int:
        """Ranks of one engine."""
        return max(self.tp, self.ep)

    @property
    def layout(self) -> str:
        """The layout in words."""
        return f"shards of {self.engine}, tp {self.tp}, ep {self.ep}"

    def write(self, folder: Path) -> None:
        """Write engine_shards.json; a block is a list of its attributes, in order."""
        parameters = {
            name: {"shape": p.shape, "fill": p.fill, "blocks": [list(asdict(block).values()) for block in p.blocks]}
            for name, p in self.parameters.items()
        }
        values = {"engine": self.engine, "tp": self.tp, "ep": self.ep, "tensors": self.tensors, "parameters": parameters}
        (folder / SHARD_MAP).write_text(json.dumps(values) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read engine_shards.json.

        Raises:
            WeightsError: it cannot be read or says something impossible.
        """
        path = folder / SHARD_MAP
        try:
            values = parse_json(path.read_bytes())
            parameters = {name: _parameter(entry) for name, entry in values["parameters"].items()}
            tensors = {name: tuple(map(int, shape)) for name, shape in values["tensors"].items()}
            shard_map = cls(str(values["engine"]), int(values["tp"]), int(values["ep"]), tensors, parameters)
            shard_map._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} is truncated or corrupt ({shortened(str(error))}); convert again") from error
        return shard_map

    def _check(self) -> None:
        """Check that the blocks of a parameter follow one another, and that the blocks of a tensor are all of it."""
        places: dict[str, set[tuple[int, int, int, int]]] = {name: set() for name in self.tensors}
        for name, parameter in self.parameters.items():
            rows, columns = parameter.matrix
            for block in parameter.blocks:
                places[block.tensor].add((block.row, block.column, block.rows, block.columns))
            for rank in range(self.num_ranks):
                blocks = parameter.blocks_of(rank)
                ends = [0, *(block.local_row + block.rows for block in blocks)]
                starts = [*(block.local_row for block in blocks), rows]
                if any(start < end for start, end in zip(starts, ends, strict=True)) or {b.columns for b in blocks} - {columns}:
                    raise ValueError(f"the blocks of {name} do not fit its shape {list(parameter.shape)}")
        for name, shape in self.tensors.items():
            if sum(rows * columns for _, _, rows, columns in places[name]) != math.prod(shape):
                raise ValueError(f"it has not all of {name}")


def _parameter(entry: dict[str, Any]) -> ShardParameter:
    blocks = []
    for tensor, *numbers, ranks in entry["blocks"]:
        row, column, rows, columns, local_row = map(int, numbers)
        blocks.append(Block(str(tensor), row, column, rows, columns, local_row, tuple(map(int, ranks))))
    return ShardParameter(tuple(map(int, entry["shape"])), float(entry["fill"]), tuple(blocks))


@dataclass(frozen=True, slots=True)
class _Holder:
    """A block on one rank."""

    rank: int
    parameter: str
    block: Block


class ShardFolder:
    """The whole Hugging Face tensors of an engine's shards.

    Raises:
        WeightsError: a file is missing, truncated or corrupt, or a parameter is missing, extra, mis-shaped or of several dtypes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard_map = ShardMap.read(folder)
        self.ranks = [_read_rank(folder, rank, self.shard_map) for rank in range(self.shard_map.num_ranks)]
        self.shapes = self.shard_map.tensors
        self.dtypes: dict[str, torch.dtype] = {}
        # for each tensor the places of its blocks; what several ranks hold is in one place
        self._places: dict[str, dict[tuple[int, int, int, int], list[_Holder]]] = {name: {} for name in self.shapes}
        for name, parameter in self.shard_map.parameters.items():
            if len({rank[name].dtype for rank in self.ranks}) > 1:
                raise WeightsError(f"{folder} has {name} in several dtypes; convert again")
            for block in parameter.blocks:
                holders = self._places[block.tensor].setdefault((block.row, block.column, block.rows, block.columns), [])
                holders.extend(_Holder(rank, name, block) for rank in block.ranks)
                self.dtypes[block.tensor] = self.ranks[0][name].dtype

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill ``target`` with rows of the tensor ``name``, from row ``start`` on."""
        matrix = target.view(target.shape[0], -1)
        stop = start + target.shape[0]
        for (row, column, rows, columns), holders in self._places[name].items():
            low, high = max(start, row), min(stop, row + rows)
            if low >= high:
                continue
            place = matrix[low - start : high - start, column : column + columns]
            if place.is_contiguous():
                self._read(holders[0], low - row, place)
            else:
                self._read(holders[0], low - row, values := torch.empty_like(place, memory_format=torch.contiguous_format))
                place.copy_(values)

    def inconsistencies(self) -> Iterator[tuple[str, str]]:
        """Name what differs between copies on several ranks, and rows of no tensor that do not have their own value, and why."""
        for tensor, places in self._places.items():
            for first, *others in places.values():
                for other in others:
                    if not self._same(first, other):
                        yield tensor, f"rank {other.rank} has another copy of it in {other.parameter} than rank {first.rank}"
        for name, parameter in self.shard_map.parameters.items():
            for rank, stored in enumerate(self.ranks):
                for start, stop in parameter.filled(rank):
                    if not self._is_filled(stored[name], parameter, start, stop):
                        rows = f"rows {start}:{stop}, which belong to no tensor"
                        yield name, f"rank {rank} has other values than {parameter.fill:g} in {rows}"

    def _read(self, holder: _Holder, start: int, target: Tensor) -> None:
        """Fill a contiguous matrix with rows of a block, from its row ``start`` on."""
        stored = self.ranks[holder.rank][holder.parameter]
        row_bytes = holder.block.columns * stored.dtype.itemsize
        read_into(stored.path, stored.offset + (holder.block.local_row + start) * row_bytes, target)

    def _same(self, first: _Holder, other: _Holder) -> bool:
        shape, dtype = (first.block.rows, first.block.columns), self.ranks[first.rank][first.parameter].dtype
        for start, stop in windows(shape, dtype):
            pieces = [torch.empty((stop - start, shape[1]), dtype=dtype) for _ in range(2)]
            for piece, holder in zip(pieces, (first, other), strict=True):
                self._read(holder, start, piece)
            if not torch.equal(*(piece.view(torch.uint8) for piece in pieces)):
                return False
        return True

    def _is_filled(self, stored: StoredTensor, parameter: ShardParameter, first: int, last: int) -> bool:
        columns = parameter.matrix[1]
        for start, stop in windows((last - first, columns), stored.dtype):
            values = torch.empty((stop - start, columns), dtype=stored.dtype)
            read_into(stored.path, stored.offset + (first + start) * columns * stored.dtype.itemsize, values)
            if not torch.equal(values.view(torch.uint8), torch.full_like(values, parameter.fill).view(torch.uint8)):
                return False
        return True


def _read_rank(folder: Path, rank: int, shard_map: ShardMap) -> dict[str, StoredTensor]:
    """Read the parameters of one rank, from the headers of its files."""
    stored: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob(rank_file(rank, "*"))):
        header = read_header(file)
        if twice := sorted(header.keys() & stored.keys()):
            raise WeightsError(f"{file} holds {listed(twice)}, which another file of rank {rank} holds too; convert again")
        stored |= header
    expected = shard_map.parameters
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}"
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing", sorted(expected.keys() - stored.keys())),
            ("extra", sorted(stored.keys() - expected.keys())),
            ("mis-shaped", wrong),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{folder / rank_file(rank, '*')} does not fit {SHARD_MAP}; {'; '.join(problems)}; convert again")
    return stored
