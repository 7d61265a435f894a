"""Shard layouts: which rank holds which part of which Hugging Face tensor, and where in its own parameters.

Source and destination of a transfer, Megatron or engine, speak of Hugging Face tensors, so that neither needs to know the other.
Everything is a matrix: a vector is one column, and a parameter of three dimensions (fused experts) is seen as [product of
the leading ones, last one].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megarl.errors import ConfigError
from megarl.families.base.weight_rules import Kind, Layers
from megarl.parallel.axis_sizes import AxisSizes
from megarl.weights.mapping import WeightMap
from megarl.weights.shards import Parameter

BOX = np.dtype(
    [
        ("tensor", np.int32),
        ("row", np.int32),  # first row and column in the tensor, and how many
        ("column", np.int32),
        ("rows", np.int32),
        ("columns", np.int32),
        ("parameter", np.int32),
        ("local_row", np.int32),  # first row and column in the parameter
        ("local_column", np.int32),
        ("rank_set", np.int32),
    ]
)


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The Hugging Face tensors that are moved.

    Attributes:
        numbers: tensor name to its number, which indexes the other two.
        shapes: [tensors, 2], rows and columns.
        element_sizes: [tensors], bytes of one element.
    """

    numbers: dict[str, int]
    shapes: NDArray[np.int64]
    element_sizes: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return int((self.shapes.prod(axis=1) * self.element_sizes).sum())


def tensor_table(weight_map: WeightMap, element_size: int) -> TensorTable:
    """Number all weights of a model.

    Args:
        element_size: bytes of an element of the model's type; buffers are float32.
    """
    parameters = [parameter for parameter in weight_map.parameters.values() if not parameter.is_copy]
    return _table(parameters, [4 if parameter.is_buffer else element_size for parameter in parameters])


def optimizer_table(weight_map: WeightMap) -> TensorTable:
    """Number what has optimizer state: all but buffers, in float32. One plan serves both of Adam's moments and the main weights."""
    parameters = [parameter for parameter in weight_map.parameters.values() if not (parameter.is_copy or parameter.is_buffer)]
    return _table(parameters, [4] * len(parameters))


def _table(parameters: list[Parameter], element_sizes: list[int]) -> TensorTable:
    names = [name for parameter in parameters for name in parameter.hugging_face]
    shapes = [as_matrix(shape) for parameter in parameters for shape in parameter.shapes]
    sizes = [size for parameter, size in zip(parameters, element_sizes, strict=True) for _ in parameter.shapes]
    return TensorTable(
        numbers={name: number for number, name in enumerate(names)},
        shapes=np.array(shapes, dtype=np.int64),
        element_sizes=np.array(sizes, dtype=np.int64),
    )


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a parameter seen as a matrix."""
    return (shape[0], 1) if len(shape) == 1 else (int(np.prod(shape[:-1])), shape[-1])


@dataclass(frozen=True, slots=True)
class RankSets:
    """Sets of ranks, each rank of a set holding the same boxes.

    Attributes:
        ranks: the sets, one after another.
        starts: [sets + 1], where each begins.
    """

    ranks: NDArray[np.int32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, sets: Iterable[NDArray[np.int32]]) -> "RankSets":
        """Build the sets from one array for each."""
        arrays = [np.asarray(ranks, dtype=np.int32).ravel() for ranks in sets]
        return cls(np.concatenate(arrays), np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[sets], ranks in each."""
        return np.diff(self.starts)

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        return self.ranks[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which rank holds which part of which tensor, at one end of a transfer.

    Attributes:
        parameters: names by number. Megatron's are global: layers and experts are counted over the whole model.
        shapes: of a rank's own part by number, the same on every rank that has the parameter.
        boxes: of type BOX, for each rank set what every one of its ranks holds. Boxes of one tensor do not overlap.
        rank_sets: numbered by the boxes.
        num_ranks: that it is over.
        copy_names: for parameters that some ranks have under another name: number to (that name, those ranks). With tied
            embeddings the last pipeline stage has the embedding as its output layer.
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    boxes: NDArray[np.void]
    rank_sets: RankSets
    num_ranks: int
    copy_names: dict[int, tuple[str, frozenset[int]]]

    def parameter_name(self, parameter: int, rank: int) -> str:
        """Return the name under which ``rank`` has a parameter."""
        name, ranks = self.copy_names.get(parameter, ("", frozenset()))
        return name if rank in ranks else self.parameters[parameter]

    def in_world(self, ranks: range, world_size: int) -> "ShardLayout":
        """Place the same layout on some ranks of a world, of which the others have nothing."""
        first = ranks.start
        copy_names = {number: (name, frozenset(first + rank for rank in own)) for number, (name, own) in self.copy_names.items()}
        rank_sets = RankSets(self.rank_sets.ranks + np.int32(first), self.rank_sets.starts)
        return replace(self, rank_sets=rank_sets, num_ranks=world_size, copy_names=copy_names)


@dataclass(frozen=True, slots=True)
class Template:
    """The boxes of one parameter that many others share but for the tensors.

    Attributes:
        boxes: of type BOX; ``tensor`` is the index among the parameter's tensors, ``rank_set`` counts from the parameter's first.
        shape: of a rank's own part.
    """

    boxes: NDArray[np.void]
    shape: tuple[int, ...]

    def apply(
        self, tensors: NDArray[np.integer], parameters: NDArray[np.integer], first_rank_sets: NDArray[np.integer]
    ) -> NDArray[np.void]:
        """Return the boxes of n parameters.

        Args:
            tensors: [n, tensors of a parameter], their numbers.
            parameters: [n], numbers.
            first_rank_sets: [n], the rank set of shard 0.
        """
        boxes = np.tile(self.boxes, (len(parameters), 1))
        boxes["tensor"] = tensors[:, self.boxes["tensor"]]
        boxes["parameter"] = parameters[:, None]
        boxes["rank_set"] += first_rank_sets[:, None].astype(np.int32)
        return boxes.ravel()


def megatron_shard_layout(weight_map: WeightMap, sizes: AxisSizes, tensors: TensorTable) -> ShardLayout:
    """Return what every rank of a Megatron layout holds.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    return _MegatronShardLayout(weight_map, sizes, tensors).build()


class _MegatronShardLayout:
    """Rank sets are, in this order: the stages (pp), the parts of a stage (pp · tp), the parts of its experts (pp · ep · etp) and,
    with tied embeddings, the parts of the embedding on the first and the last stage (tp)."""

    def __init__(self, weight_map: WeightMap, sizes: AxisSizes, tensors: TensorTable) -> None:
        self._map = weight_map
        self._sizes = sizes
        self._tensors = tensors
        self._stages = sizes.pipeline_rank_of_layers(weight_map.architecture.num_layers)
        self._cut_start = sizes.pp
        self._expert_start = self._cut_start + sizes.pp * sizes.tp
        self._tied_start = self._expert_start + sizes.pp * sizes.ep * sizes.etp
        self._copies = {p.hugging_face: p.megatron for p in weight_map.parameters.values() if p.is_copy and sizes.pp > 1}

    def build(self) -> ShardLayout:
        self._check_experts()
        moved = self._tensors.numbers
        parameters = [p for p in self._map.parameters.values() if not p.is_copy and p.hugging_face[0] in moved]
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, p in enumerate(parameters):
            alike.setdefault((p.kind, p.shapes, p.expert is not None), []).append(number)
        boxes: list[NDArray[np.void]] = []
        shapes: list[tuple[int, ...]] = [()] * len(parameters)
        for numbers in alike.values():
            group = [parameters[number] for number in numbers]
            template = self._template(group[0])
            names = [[self._tensors.numbers[name] for name in p.hugging_face] for p in group]
            first_sets = np.array([self._first_rank_set(p) for p in group])
            boxes.append(template.apply(np.array(names), np.array(numbers), first_sets))
            for number in numbers:
                shapes[number] = template.shape
        return ShardLayout(
            parameters=tuple(p.megatron for p in parameters),
            shapes=tuple(shapes),
            boxes=np.concatenate(boxes),
            rank_sets=self._rank_sets(),
            num_ranks=self._sizes.world_size,
            copy_names={
                number: (self._copies[p.hugging_face], frozenset(self._sizes.dense_ranks()[-1].ravel().tolist()))
                for number, p in enumerate(parameters)
                if p.hugging_face in self._copies
            },
        )

    def _check_experts(self) -> None:
        num_experts = self._map.architecture.num_experts
        if num_experts % self._sizes.ep:
            raise ConfigError(f"ep {self._sizes.ep} does not divide the model's {num_experts} experts")

    def _parts(self, parameter: Parameter) -> int:
        if parameter.kind is Kind.REPLICATED:
            return 1
        return self._sizes.etp if parameter.expert is not None else self._sizes.tp

    def _template(self, parameter: Parameter) -> Template:
        parts = self._parts(parameter)
        boxes = np.array(
            [box for part in range(parts) for box in self._part_boxes(parameter, part, parts)],
            dtype=BOX,
        )
        self._check_division(parameter, parts, boxes)
        return Template(boxes, self._map.shard_shape(parameter.megatron, 0, parts))

    def _check_division(self, parameter: Parameter, parts: int, boxes: NDArray[np.void]) -> None:
        """Check that all of every tensor is held, and as much by each part, but for a vocabulary's padding, which comes last."""
        for index, shape in enumerate(parameter.shapes):
            own = boxes[boxes["tensor"] == index]
            shares = np.bincount(own["rank_set"], own["rows"].astype(np.int64) * own["columns"], minlength=parts)
            if shares.sum() != np.prod(shape) or (parameter.kind is not Kind.VOCABULARY and len(set(shares.tolist())) > 1):
                size = "etp" if parameter.expert is not None else "tp"
                heads = f" ({self._map.architecture.num_kv_heads} key-value heads)" if parameter.kind is Kind.QKV else ""
                raise ConfigError(f"{size} {parts} does not divide {parameter.hugging_face[index]} of shape {list(shape)}{heads}")

    def _part_boxes(self, parameter: Parameter, part: int, parts: int) -> list[tuple[int, ...]]:
        shard = self._map.shard(parameter.megatron, part, parts)
        boxes: list[tuple[int, ...]] = []
        offset = 0
        for part_slice in shard.slices:
            index = parameter.hugging_face.index(part_slice.name)
            rows, columns = as_matrix(parameter.shapes[index])
            length = part_slice.stop - part_slice.start
            if length and part_slice.dim == 0:
                boxes.append((index, part_slice.start, 0, length, columns, 0, offset, 0, part))
            elif length:
                boxes.append((index, 0, part_slice.start, rows, length, 0, 0, offset, part))
            offset += length
        return boxes

    def _first_rank_set(self, parameter: Parameter) -> int:
        """Return the rank set of part 0; those of the other parts follow."""
        sizes = self._sizes
        if parameter.hugging_face in self._copies:
            return self._tied_start
        if parameter.layer is not None:
            stage = self._stages[parameter.layer]
        else:
            stage = 0 if parameter.layers is Layers.BEFORE else sizes.pp - 1
        if parameter.kind is Kind.REPLICATED:
            return stage
        if parameter.expert is None:
            return self._cut_start + stage * sizes.tp
        ep_rank = parameter.expert // (self._map.architecture.num_experts // sizes.ep)
        return self._expert_start + (stage * sizes.ep + ep_rank) * sizes.etp

    def _rank_sets(self) -> RankSets:
        sizes = self._sizes
        dense, expert = sizes.dense_ranks(), sizes.expert_ranks()
        cut = [dense[stage, :, :, part] for stage in range(sizes.pp) for part in range(sizes.tp)]
        experts = np.moveaxis(expert, 1, 3).reshape(-1, sizes.expert_dp)
        tied = [dense[[0, -1], :, :, part] for part in range(sizes.tp)] if self._copies else []
        return RankSets.of([*dense, *cut, *experts, *tied])
