"""The words in which a family's weight table is written.

A rule says which Hugging Face tensors make up one Megatron parameter and how it is cut over tensor parallel ranks. From that
alone follow both directions: a rank's shard is a concatenation of slices of Hugging Face tensors (``weights/shards.py``), read when
loading and written when exporting.
"""

import re
from dataclasses import dataclass
from enum import Enum


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
        fused: rows of the projections that its one part holds after one another; empty where each projection is a part.
    """

    megatron: str
    hugging_face: tuple[Part, ...]
    kind: Kind
    layers: Layers = Layers.ALL
    transformer_engine: str | None = None
    is_copy: bool = False
    is_buffer: bool = False
    fused: tuple[int, ...] = ()

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
