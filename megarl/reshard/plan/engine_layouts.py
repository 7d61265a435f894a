"""What each rank of a vLLM or SGLang engine holds: their fused and sharded parameters in terms of Hugging Face tensors.

Those of vLLM 0.32.0 (model_executor/models/{llama,qwen2,qwen3,qwen3_moe,mixtral,deepseek_v2}.py, layers/linear.py,
layers/vocab_parallel_embedding.py, layers/fused_moe/) and SGLang 0.5.23 (srt/models and srt/layers, the files of the same
names, and srt/layers/moe/fused_moe_triton/layer.py), unquantized; tests/engines compares them with what the engines' own loaders
fill. The parameters are those that both have when they load a checkpoint, before ``process_weights_after_loading`` (which absorbs
kv_b_proj in vLLM and may reorder experts for a kernel) has run; SGLang's also while a weight update is open. SGLang absorbs
kv_b_proj in its model's ``post_load_weights``. It differs on CPU, where it pads sizes that do not divide (srt/configs/
update_config.py), and with the kernels flashinfer_cutlass, flashinfer_trtllm and triton_kernel for experts, which keep gate and up
projections in another order from the start.

An engine of ``tp`` and ``ep`` has max(tp, ep) ranks. Attention is cut over tp ranks; with ep above tp, ep / tp groups of tp ranks
serve different requests (data parallel attention). In the engines' own arguments:

- vLLM: --tensor-parallel-size tp; for ep above 1 also --enable-expert-parallel --data-parallel-size ep / tp.
- SGLang: --tp-size max(tp, ep) --ep-size ep; for ep above tp also --dp-size ep / tp --enable-dp-attention; for models with
  shared experts --disable-shared-experts-fusion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from megarl.errors import ConfigError
from megarl.models.architecture import Architecture
from megarl.reshard.plan.shard_layout import BOX, RankSets, ShardLayout, Template, TensorTable

VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of both


class Cut(Enum):
    """How Hugging Face tensors make up a parameter; several are put together along dim 0."""

    NONE = "none"  # the same on every rank
    COLUMN = "column"  # each tensor cut along dim 0 (MergedColumnParallelLinear)
    ROW = "row"  # one tensor cut along dim 1 (RowParallelLinear)
    HEADS = "heads"  # q, k, v cut by heads; with fewer key-value heads than ranks, ranks share one (QKVParallelLinear)
    VOCABULARY = "vocabulary"  # one tensor padded to a multiple of 64 and cut along dim 0 (VocabParallelEmbedding)


class Group(Enum):
    """The ranks that a parameter is cut over."""

    ATTENTION = "attention"  # the tp ranks
    ENGINE = "engine"  # all ranks of the engine
    EXPERTS = "experts"  # a rank holds num_experts / ep experts, each cut over (ranks / ep) ranks


@dataclass(frozen=True, slots=True)
class EngineRule:
    """One parameter of an engine.

    Attributes:
        name: with ``{layer}``.
        parts: Hugging Face tensors with ``{layer}`` and, for experts, ``{expert}``: one parameter stacks all experts of a rank.
        cut: how it is cut.
        group: over which ranks.
    """

    name: str
    parts: tuple[str, ...]
    cut: Cut
    group: Group = Group.ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """Engines that are to get weights.

    Attributes:
        engine: whose parameters.
        tp: ranks that attention is cut over.
        ep: ranks that the experts are distributed over; 1 cuts every expert over the tp ranks instead.
        replicas: engines, all alike. Rank r of engine e is rank e · (ranks of an engine) + r.
    """

    engine: Literal["vllm", "sglang"]
    tp: int
    ep: int = 1
    replicas: int = 1

    @property
    def ranks_per_engine(self) -> int:
        """Ranks of one engine."""
        return max(self.tp, self.ep)

    @property
    def expert_tp(self) -> int:
        """Ranks that one expert is cut over."""
        return self.ranks_per_engine // self.ep


def engine_rules(layout: EngineLayout) -> tuple[EngineRule, ...]:
    """The parameters of all families in order; a rule holds where the model has all its parts and no earlier rule took one."""
    sglang = layout.engine == "sglang"
    dense = Group.ENGINE if sglang else Group.ATTENTION
    # vLLM cuts the tokens of MoE layers over the tp ranks when there are several groups of them
    # (ParallelConfig.use_sequence_parallel_moe), so that each rank has the whole of the shared experts
    sequence_parallel_moe = not sglang and layout.ep > layout.tp > 1
    shared = Cut.NONE, Cut.NONE
    if not sequence_parallel_moe:
        shared = Cut.COLUMN, Cut.ROW
    experts = "experts" if sglang else "experts.routed_experts"
    latent = "fused_qkv_a_proj_with_mqa" if sglang else "fused_qkv_a_proj"
    return (
        EngineRule("model.embed_tokens.weight", ("model.embed_tokens.weight",), Cut.VOCABULARY),
        _layer("input_layernorm.weight", Cut.NONE),
        *(
            _layer(f"self_attn.qkv_proj.{kind}", Cut.HEADS, *(f"self_attn.{part}_proj.{kind}" for part in "qkv"))
            for kind in ("weight", "bias")
        ),
        _layer("self_attn.q_norm.weight", Cut.NONE),
        _layer("self_attn.k_norm.weight", Cut.NONE),
        _layer(f"self_attn.{latent}.weight", Cut.NONE, "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        _layer("self_attn.kv_a_proj_with_mqa.weight", Cut.NONE),
        _layer("self_attn.q_a_layernorm.weight", Cut.NONE),
        _layer("self_attn.q_b_proj.weight", Cut.COLUMN),
        _layer("self_attn.q_proj.weight", Cut.COLUMN),
        _layer("self_attn.kv_a_layernorm.weight", Cut.NONE),
        _layer("self_attn.kv_b_proj.weight", Cut.COLUMN),
        _layer("self_attn.o_proj.weight", Cut.ROW),
        _layer("post_attention_layernorm.weight", Cut.NONE),
        _layer("mlp.gate_up_proj.weight", Cut.COLUMN, "mlp.gate_proj.weight", "mlp.up_proj.weight", group=dense),
        _layer("mlp.down_proj.weight", Cut.ROW, group=dense),
        _layer("mlp.gate.weight", Cut.NONE),
        _layer("mlp.gate.e_score_correction_bias", Cut.NONE),
        _layer(
            "mlp.shared_experts.gate_up_proj.weight",
            shared[0],
            "mlp.shared_experts.gate_proj.weight",
            "mlp.shared_experts.up_proj.weight",
            group=dense,
        ),
        _layer("mlp.shared_experts.down_proj.weight", shared[1], group=dense),
        *_experts(f"mlp.{experts}", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
        _layer("block_sparse_moe.gate.weight", Cut.NONE),
        *_experts(f"block_sparse_moe.{experts}", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        EngineRule("model.norm.weight", ("model.norm.weight",), Cut.NONE),
        EngineRule("lm_head.weight", ("lm_head.weight",), Cut.VOCABULARY, dense),
    )


def _layer(name: str, cut: Cut, *parts: str, group: Group = Group.ATTENTION) -> EngineRule:
    prefix = "model.layers.{layer}."
    return EngineRule(prefix + name, tuple(prefix + part for part in parts or (name,)), cut, group)


def _experts(module: str, expert: str, gate: str, up: str, down: str) -> tuple[EngineRule, EngineRule]:
    return (
        _layer(f"{module}.w13_weight", Cut.COLUMN, f"{expert}.{gate}.weight", f"{expert}.{up}.weight", group=Group.EXPERTS),
        _layer(f"{module}.w2_weight", Cut.ROW, f"{expert}.{down}.weight", group=Group.EXPERTS),
    )


def engine_shard_layout(architecture: Architecture, layout: EngineLayout, tensors: TensorTable) -> ShardLayout:
    """What every rank of the engines holds.

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
    if layout.engine == "vllm" and 1 < ep < tp:
        raise ConfigError(
            f"vllm ep {ep} with tp {tp}: its experts are distributed over all tp × data parallel ranks or cut over tp; "
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
            for rule in engine_rules(layout)
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
        """The boxes of one rule in one layer, none where the model lacks its tensors."""
        experts = range(self._architecture.num_experts) if rule.group is Group.EXPERTS else (0,)
        names = [[part.format(layer=layer, expert=expert) for part in rule.parts] for expert in experts]
        if not names or not all(name in self._left for group in names for name in group):
            return
        numbers = np.array([[self._left.pop(name) for name in group] for group in names])
        key = (rule.cut, rule.group, tuple(map(tuple, self._tensors.shapes[numbers[0]].tolist())), rule.name.endswith("bias"))
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
        cut = {
            Cut.NONE: lambda index, part: (0, shapes[index][0]),
            Cut.COLUMN: lambda index, part: _range(names[index], shapes[index][0], part, parts),
            Cut.ROW: lambda index, part: _range(names[index], shapes[index][1], part, parts),
            Cut.HEADS: lambda index, part: self._heads(index, part, shapes[index][0]),
            Cut.VOCABULARY: lambda index, part: self._vocabulary(part, parts),
        }[rule.cut]
        boxes, size = [], 0
        for part in range(parts):
            offset = 0
            for index, (rows, columns) in enumerate(shapes):
                start, stop = cut(index, part)
                if rule.cut is Cut.ROW:
                    boxes.append((index, 0, start, rows, stop - start, 0, 0, offset, first + part))
                elif stop > start:
                    boxes.append((index, start, 0, stop - start, columns, 0, offset, 0, first + part))
                offset += stop - start
            size = max(size, offset)
        if rule.cut is Cut.VOCABULARY:
            size = self._padded_vocabulary // parts
        shape = (shapes[0][0], size) if rule.cut is Cut.ROW else (size, shapes[0][1])
        is_vector = shapes[0][1] == 1 and rule.cut is not Cut.ROW
        return Template(np.array(boxes, dtype=BOX), (shape[0],) if is_vector else shape)

    def _heads(self, index: int, part: int, rows: int) -> tuple[int, int]:
        """Rows of query (index 0), key or value that a part has."""
        tp = self._layout.tp
        heads = self._architecture.num_heads if index == 0 else self._architecture.num_kv_heads
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


def _range(name: str, size: int, part: int, parts: int) -> tuple[int, int]:
    if size % parts:
        raise ConfigError(f"{parts} ranks do not divide the {size} rows or columns of {name}; choose another tp or ep")
    return part * size // parts, (part + 1) * size // parts
