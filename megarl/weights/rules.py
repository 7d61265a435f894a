"""The words in which a family's weight table is written.

A rule says which Hugging Face tensors make up one Megatron parameter and how it is cut over tensor parallel ranks. From that
alone follow both directions: a rank's shard is a concatenation of slices of Hugging Face tensors (``Slice``), read when
loading and written when exporting.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megarl.models.architecture import Architecture


class Kind(Enum):
    """How the Hugging Face tensors become a Megatron parameter and which part a tensor parallel rank holds."""

    REPLICATED = "replicated"  # one tensor, the same on every rank
    COLUMN = "column"  # one tensor, cut along dim 0 (Megatron's ColumnParallelLinear)
    ROW = "row"  # one tensor, cut along dim 1 (RowParallelLinear)
    GATE_UP = "gate_up"  # gate and up, each cut along dim 0, rank r holds [gate_r; up_r]
    QKV = "qkv"  # q, k, v cut by key-value group, rank r holds [q_g; k_g; v_g] for each of its groups g
    VOCABULARY = "vocabulary"  # one tensor, padded with zero rows and cut along dim 0


class Layers(Enum):
    """Where a rule's parameter exists."""

    ALL = "all"  # in every transformer layer
    DENSE = "dense"  # in layers with one MLP
    MOE = "moe"  # in layers with experts
    BEFORE = "before"  # once, ahead of the layers: on the first pipeline stage
    AFTER = "after"  # once, behind the layers: on the last pipeline stage


class Start(Enum):
    """What a model with random weights starts from."""

    NORMAL = "normal"  # with the config's initializer_range
    SMALL = "small"  # normal, standard deviation 1 / (columns + 1)
    ZEROS = "zeros"
    ONES = "ones"


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor.

    Attributes:
        name: with ``{layer}`` and ``{expert}`` for the numbers of layer and expert.
        shape: of the whole tensor.
        start: value in a model with random weights.
    """

    name: str
    shape: tuple[int, ...]
    start: Start = Start.NORMAL


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter.

    Attributes:
        megatron: its name with ``{layer}`` and ``{expert}`` for the global numbers of layer and expert.
        hugging_face: its parts.
        kind: how they combine. Parameters with ``{expert}`` are cut over expert tensor parallel ranks instead.
        layers: where it exists.
        transformer_engine: its name under the Transformer Engine spec, where that differs.
        is_copy: another parameter holds the same tensors (tied embeddings), and exports take them from there.
        is_buffer: no gradient reaches it, and it is float32 whatever the type of the model.
    """

    megatron: str
    hugging_face: tuple[Part, ...]
    kind: Kind
    layers: Layers = Layers.ALL
    transformer_engine: str | None = None
    is_copy: bool = False
    is_buffer: bool = False

    @property
    def per_expert(self) -> bool:
        """True when the parameter exists once per routed expert."""
        return "{expert}" in self.megatron or any("{expert}" in part.name for part in self.hugging_face)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors that a family's checkpoints may hold and that no Megatron parameter takes.

    Attributes:
        pattern: regular expression of their whole names.
        notice: what to tell the user about them; None where they hold nothing of the model's own.
    """

    pattern: re.Pattern[str]
    notice: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One model family: the table of its parameters and of the tensors it leaves out, as functions of the model's sizes."""

    rules: Callable[[Architecture], tuple[Rule, ...]]
    left_out: Callable[[Architecture], tuple[LeftOut, ...]]


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
    """The part of ``parameter`` that tensor parallel rank ``tp_rank`` of ``tp`` holds (expert tensor parallel for experts)."""
    names, shapes = parameter.hugging_face, parameter.shapes

    def part(index: int, dim: int, pieces: int, piece: int) -> Slice:
        size = shapes[index][dim] // pieces
        return Slice(names[index], dim, piece * size, (piece + 1) * size)

    match parameter.kind:
        case Kind.REPLICATED:
            return Shard((part(0, 0, 1, 0),), 0)
        case Kind.COLUMN:
            return Shard((part(0, 0, tp, tp_rank),), 0)
        case Kind.ROW:
            return Shard((part(0, 1, tp, tp_rank),), 1)
        case Kind.GATE_UP:
            return Shard((part(0, 0, tp, tp_rank), part(1, 0, tp, tp_rank)), 0)
        case Kind.QKV:
            groups = architecture.num_kv_heads
            local = range(tp_rank * groups // tp, (tp_rank + 1) * groups // tp)
            return Shard(tuple(part(index, 0, groups, group) for group in local for index in range(3)), 0)
        case Kind.VOCABULARY:
            rows = padded_vocabulary // tp
            start = min(tp_rank * rows, shapes[0][0])
            stop = min((tp_rank + 1) * rows, shapes[0][0])
            return Shard((Slice(names[0], 0, start, stop),), 0, padding=rows - (stop - start))
