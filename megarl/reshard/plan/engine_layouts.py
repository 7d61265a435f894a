"""What each rank of a vLLM or SGLang engine holds, from the rules of the model's family (``families/base/engine_rules.py``)."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from megarl.errors import ConfigError
from megarl.families.base.architecture import Architecture
from megarl.families.base.engine_rules import Cut, EngineLayout, EngineRule, Group
from megarl.families.registry import family_of
from megarl.reshard.plan.shard_layout import BOX, RankSets, ShardLayout, Template, TensorTable

VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of both


def engine_shard_layout(architecture: Architecture, layout: EngineLayout, tensors: TensorTable) -> ShardLayout:
    """Return what every rank of the engines holds.

    Raises:
        ConfigError: the layout does not divide the model, or the engine has no such layout.
    """
    _check_layout(architecture, layout)
    return _EngineShardLayout(architecture, layout, tensors).build()


def _check_layout(architecture: Architecture, layout: EngineLayout) -> None:
    tp, ep = layout.tp, layout.ep
    if ep > 1 and architecture.moe is None:
        raise ConfigError(f"{layout.engine} ep {ep}: the model has no experts ({architecture.family}); use ep 1")
    if ep > 1 and architecture.num_experts % ep:
        raise ConfigError(f"{layout.engine} ep {ep} does not divide the model's {architecture.num_experts} experts")
    if layout.ranks_per_engine % tp:
        raise ConfigError(f"{layout.engine} ep {ep} is not a multiple of tp {tp}; choose ep = tp × data parallel size")
    if layout.ranks_per_engine % ep:
        raise ConfigError(f"{layout.engine} tp {tp} is not a multiple of ep {ep}; choose ep among the divisors of tp")
    if layout.traits.groups_are_whole and 1 < ep < tp:
        raise ConfigError(
            f"{layout.engine} ep {ep} with tp {tp}: its experts are distributed over all tp × data parallel ranks or cut over tp; "
            f"use ep 1 or a multiple of {tp}"
        )
    if architecture.num_heads % tp:
        raise ConfigError(f"{layout.engine} tp {tp} does not divide the model's {architecture.num_heads} attention heads")
    kv_heads = architecture.num_kv_heads
    if architecture.mla is None and kv_heads % tp and tp % kv_heads:
        raise ConfigError(f"{layout.engine} tp {tp} and the model's {kv_heads} key-value heads: neither divides the other")


class _EngineShardLayout:
    """Rank sets are, in this order: all ranks, the tp parts of attention, and the ranks of an engine; each over all engines."""

    def __init__(self, architecture: Architecture, layout: EngineLayout, tensors: TensorTable) -> None:
        self._architecture = architecture
        self._layout = layout
        self._tensors = tensors
        self._left = dict(tensors.numbers)
        self._names: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._templates: dict[tuple[object, ...], Template] = {}

    def build(self) -> ShardLayout:
        layout = self._layout
        boxes = [
            part
            for rule in family_of(self._architecture.family).engine_rules(self._architecture, layout)
            for layer in (range(self._architecture.num_layers) if "{layer}" in rule.name else (0,))
            for part in self._apply(rule, layer)
        ]
        assert not self._left, f"no rule for {sorted(self._left)[:5]}"
        ranks = np.arange(layout.replicas * layout.ranks_per_engine, dtype=np.int32).reshape(layout.replicas, -1)
        attention = ranks.reshape(-1, layout.tp)
        return ShardLayout(
            parameters=tuple(self._names),
            shapes=tuple(self._shapes),
            boxes=np.concatenate(boxes),
            rank_sets=RankSets.of([ranks, *attention.T, *ranks.T]),
            num_ranks=ranks.size,
            copy_names={},
        )

    def _apply(self, rule: EngineRule, layer: int) -> Iterator[np.ndarray]:
        """Return the boxes of one rule in one layer, none where the model lacks its tensors."""
        experts = range(self._architecture.num_experts) if rule.group is Group.EXPERTS else (0,)
        names = [[part.format(layer=layer, expert=expert) for part in rule.parts] for expert in experts]
        if not names or not all(name in self._left for group in names for name in group):
            return
        numbers = np.array([[self._left.pop(name) for name in group] for group in names])
        shapes = tuple(map(tuple, self._tensors.shapes[numbers[0]].tolist()))
        key = (rule.cut, rule.group, rule.fused, shapes, rule.name.endswith("bias"))
        if key not in self._templates:
            self._templates[key] = self._template(rule, names[0])
        template = self._templates[key]
        parameters = np.full(len(experts), len(self._names))
        self._names.append(rule.name.format(layer=layer))
        if rule.group is not Group.EXPERTS:
            self._shapes.append(template.shape)
            yield template.apply(numbers, parameters, np.zeros(1, dtype=np.int64))
            return
        per_rank = len(experts) // self._layout.ep
        self._shapes.append((per_rank, *template.shape))
        ep_ranks, slots = np.divmod(np.arange(len(experts)), per_rank)
        stacked = template.apply(numbers, parameters, ep_ranks * self._layout.expert_tp)
        stacked["local_row"] += np.repeat(slots * template.shape[0], len(template.boxes)).astype(np.int32)
        yield stacked

    def _parts(self, rule: EngineRule) -> tuple[int, int]:
        """Parts that the parameter is cut into, and the rank set of the first."""
        layout = self._layout
        if rule.cut is Cut.NONE:
            return 1, 0
        if rule.group is Group.ATTENTION:
            return layout.tp, 1
        return layout.expert_tp if rule.group is Group.EXPERTS else layout.ranks_per_engine, 1 + layout.tp

    def _template(self, rule: EngineRule, names: Sequence[str]) -> Template:
        parts, first = self._parts(rule)
        shapes = [self._tensors.shapes[self._tensors.numbers[name]].tolist() for name in names]
        projections = _projections(rule.fused, [rows for rows, _ in shapes])
        boxes, size = [], 0
        for part in range(parts):
            offset = 0
            for number, (tensor, row, rows) in enumerate(projections):
                columns = shapes[tensor][1]
                start, stop = self._cut(rule, number, names[tensor], columns if rule.cut is Cut.ROW else rows, part, parts)
                if rule.cut is Cut.ROW:
                    boxes.append((tensor, row, start, rows, stop - start, 0, 0, offset, first + part))
                elif stop > start:
                    boxes.append((tensor, row + start, 0, stop - start, columns, 0, offset, 0, first + part))
                offset += stop - start
            size = max(size, offset)
        if rule.cut is Cut.VOCABULARY:
            size = self._padded_vocabulary // parts
        shape = (shapes[0][0], size) if rule.cut is Cut.ROW else (size, shapes[0][1])
        is_vector = shapes[0][1] == 1 and rule.cut is not Cut.ROW
        return Template(np.array(boxes, dtype=BOX), (shape[0],) if is_vector else shape)

    def _cut(self, rule: EngineRule, number: int, name: str, size: int, part: int, parts: int) -> tuple[int, int]:
        """Return the rows (columns for ROW) of projection ``number``, which has ``size`` of them, that a part has."""
        match rule.cut:
            case Cut.NONE:
                return 0, size
            case Cut.COLUMN | Cut.ROW:
                return _range(name, size, part, parts)
            case Cut.HEADS:
                return self._heads(number, part, size)
            case Cut.VOCABULARY:
                return self._vocabulary(part, parts)

    def _heads(self, number: int, part: int, rows: int) -> tuple[int, int]:
        """Return the rows of query (number 0), key or value that a part has."""
        tp = self._layout.tp
        heads = self._architecture.num_heads if number == 0 else self._architecture.num_kv_heads
        if heads >= tp:
            return _range("heads", rows, part, tp)
        head = part // (tp // heads)
        return head * rows // heads, (head + 1) * rows // heads

    @property
    def _padded_vocabulary(self) -> int:
        return -(-self._architecture.vocabulary_size // VOCABULARY_PADDING) * VOCABULARY_PADDING

    def _vocabulary(self, part: int, parts: int) -> tuple[int, int]:
        rows = self._architecture.vocabulary_size
        start, stop = _range("the padded vocabulary", self._padded_vocabulary, part, parts)
        return min(start, rows), min(stop, rows)


def _projections(fused: tuple[int, ...], rows: list[int]) -> list[tuple[int, int, int]]:
    """Return tensor, first row and rows of each projection: those that one tensor holds, or one in each tensor."""
    if not fused:
        return [(tensor, 0, of_tensor) for tensor, of_tensor in enumerate(rows)]
    return [(0, stop - of_projection, of_projection) for stop, of_projection in zip(accumulate(fused), fused, strict=True)]


def _range(name: str, size: int, part: int, parts: int) -> tuple[int, int]:
    if size % parts:
        raise ConfigError(f"{parts} ranks do not divide the {size} rows or columns of {name}; choose another tp or ep")
    return part * size // parts, (part + 1) * size // parts
