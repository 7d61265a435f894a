"""Rules applied to a model: which slices of Hugging Face tensors each tensor parallel rank holds of each Megatron parameter."""

from dataclasses import dataclass
from itertools import accumulate

from megarl.families.base.architecture import Architecture
from megarl.families.base.weight_rules import Kind, Layers, Start


@dataclass(frozen=True, slots=True)
class Parameter:
    """A rule applied to one layer and one expert.

    Attributes:
        megatron: global Megatron name, with the global numbers of layer and expert.
        template: the same with ``{layer}`` and ``{expert}``, for a rank's own numbers.
        hugging_face: names of its parts.
        shapes: of its parts.
        kind: how they combine.
        layers: where the rule's parameters exist.
        layer: number of the layer; None outside the layers.
        expert: number of the expert; None for parameters that are not one expert's.
        start: of each part.
        is_copy: another parameter holds the same tensors.
        is_buffer: no gradient reaches it, and it is float32 whatever the type of the model.
        fused: rows of the projections that its one part holds after one another; empty where each projection is a part.
    """

    megatron: str
    template: str
    hugging_face: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind
    layers: Layers
    layer: int | None
    expert: int | None
    start: tuple[Start, ...]
    is_copy: bool = False
    is_buffer: bool = False
    fused: tuple[int, ...] = ()

    @property
    def projections(self) -> tuple["Slice", ...]:
        """The rows of each projection: whole tensors, or ranges of the one that holds them all."""
        if not self.fused:
            return tuple(Slice(name, 0, 0, shape[0]) for name, shape in zip(self.hugging_face, self.shapes, strict=True))
        stops = tuple(accumulate(self.fused))
        return tuple(Slice(self.hugging_face[0], 0, stop - rows, stop) for stop, rows in zip(stops, self.fused, strict=True))


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows (or columns) ``start:stop`` along ``dim`` of a Hugging Face tensor."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What one tensor parallel rank holds of one Megatron parameter.

    Attributes:
        slices: Hugging Face slices in order, concatenated along ``dim``.
        dim: of the concatenation.
        padding: zero rows after them.
    """

    slices: tuple[Slice, ...]
    dim: int
    padding: int = 0


def shard_of(parameter: Parameter, architecture: Architecture, padded_vocabulary: int, tp_rank: int, tp: int) -> Shard:
    """Return the part of ``parameter`` that rank ``tp_rank`` of ``tp`` holds (expert tensor parallel for experts)."""
    shapes, whole = parameter.shapes, parameter.projections

    def part(projection: Slice, parts: int, number: int) -> Slice:
        rows = (projection.stop - projection.start) // parts
        start = projection.start + number * rows
        return Slice(projection.name, 0, start, start + rows)

    match parameter.kind:
        case Kind.REPLICATED:
            return Shard(whole, 0)
        case Kind.COLUMN | Kind.GATE_UP:
            return Shard(tuple(part(projection, tp, tp_rank) for projection in whole), 0)
        case Kind.ROW:
            columns = shapes[0][1] // tp
            return Shard((Slice(whole[0].name, 1, tp_rank * columns, (tp_rank + 1) * columns),), 1)
        case Kind.QKV:
            groups = architecture.num_kv_heads
            local = range(tp_rank * groups // tp, (tp_rank + 1) * groups // tp)
            return Shard(tuple(part(projection, groups, group) for group in local for projection in whole), 0)
        case Kind.VOCABULARY:
            rows = padded_vocabulary // tp
            start = min(tp_rank * rows, shapes[0][0])
            stop = min((tp_rank + 1) * rows, shapes[0][0])
            return Shard((Slice(whole[0].name, 0, start, stop),), 0, padding=rows - (stop - start))
