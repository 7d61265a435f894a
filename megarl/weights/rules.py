"""The words in which a family's weight table is written.

A rule says which Hugging Face tensors make up one Megatron parameter and how it is cut over tensor parallel ranks. From that
alone follow both directions: a rank's shard is a concatenation of slices of Hugging Face tensors (``Slice``), read when
loading and written when exporting.
"""

from dataclasses import dataclass
from enum import Enum

from megarl.models.architecture import Architecture


class Kind(Enum):
    """How the Hugging Face tensors become a Megatron parameter and which part a tensor parallel rank holds."""

    REPLICATED = "replicated"  # one tensor, the same on every rank
    ROW = "row"  # one tensor, cut along dim 1
    GATE_UP = "gate_up"  # gate and up, each cut along dim 0, rank r holds [gate_r; up_r]
    QKV = "qkv"  # q, k, v cut by key-value group, rank r holds [q_g; k_g; v_g] for each of its groups g
    VOCABULARY = "vocabulary"  # one tensor, padded with zero rows and cut along dim 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter.

    Attributes:
        megatron: its name with ``{layer}`` for the global layer number.
        hugging_face: names of its parts, ``{layer}`` likewise.
        kind: how they combine.
        transformer_engine: its name under the Transformer Engine spec, where that differs.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    kind: Kind
    transformer_engine: str | None = None

    @property
    def per_layer(self) -> bool:
        """True when the parameter exists once per layer."""
        return "{layer}" in self.megatron


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


@dataclass(frozen=True, slots=True)
class Parameter:
    """A rule applied to one layer: global Megatron name and Hugging Face names."""

    megatron: str
    hugging_face: tuple[str, ...]
    kind: Kind


def hugging_face_shape(name: str, architecture: Architecture) -> tuple[int, ...]:
    """Shape that the Hugging Face tensor ``name`` must have."""
    a = architecture
    sizes = {"q_proj": a.num_heads * a.head_dim, "k_proj": a.num_kv_heads * a.head_dim, "v_proj": a.num_kv_heads * a.head_dim}
    module = name.split(".")[-2]
    if module in sizes:
        return (sizes[module], a.hidden_size) if name.endswith(".weight") else (sizes[module],)
    return {
        "embed_tokens": (a.vocabulary_size, a.hidden_size),
        "lm_head": (a.vocabulary_size, a.hidden_size),
        "o_proj": (a.hidden_size, a.num_heads * a.head_dim),
        "gate_proj": (a.ffn_size, a.hidden_size),
        "up_proj": (a.ffn_size, a.hidden_size),
        "down_proj": (a.hidden_size, a.ffn_size),
        "q_norm": (a.head_dim,),
        "k_norm": (a.head_dim,),
    }.get(module, (a.hidden_size,))


def shard_of(parameter: Parameter, architecture: Architecture, padded_vocabulary: int, tp_rank: int, tp: int) -> Shard:
    """The part of ``parameter`` that tensor parallel rank ``tp_rank`` of ``tp`` holds."""
    names = parameter.hugging_face
    shapes = [hugging_face_shape(name, architecture) for name in names]

    def part(index: int, dim: int, pieces: int, piece: int) -> Slice:
        size = shapes[index][dim] // pieces
        return Slice(names[index], dim, piece * size, (piece + 1) * size)

    match parameter.kind:
        case Kind.REPLICATED:
            return Shard((part(0, 0, 1, 0),), 0)
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
