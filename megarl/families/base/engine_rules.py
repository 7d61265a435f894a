"""The words in which a family says what each rank of a vLLM or SGLang engine holds, and the parts that families share.

Engines fuse and shard Hugging Face tensors. These are the parameters of vLLM 0.32.0 (model_executor/models, in the files named
after the families, layers/linear.py, layers/vocab_parallel_embedding.py, layers/fused_moe/) and SGLang 0.5.23 (srt/models and
srt/layers, the files of the same names, and srt/layers/moe/fused_moe_triton/layer.py), unquantized; tests/engines compares them
with what the engines' own loaders fill. They are those that both have when they load a checkpoint, before
``process_weights_after_loading`` (which absorbs kv_b_proj in vLLM and may reorder experts for a kernel) has run; SGLang's also
while a weight update is open. SGLang absorbs kv_b_proj in its model's ``post_load_weights``. It differs on CPU, where it pads sizes
that do not divide (srt/configs/update_config.py), and with the kernels flashinfer_cutlass, flashinfer_trtllm and triton_kernel for
experts, which keep gate and up projections in another order from the start.

An engine of ``tp`` and ``ep`` has max(tp, ep) ranks. Attention is cut over tp ranks; with ep above tp, ep / tp groups of tp ranks
serve different requests (data parallel attention). In the engines' own arguments:

- vLLM: --tensor-parallel-size tp; for ep above 1 also --enable-expert-parallel --data-parallel-size ep / tp.
- SGLang: --tp-size max(tp, ep) --ep-size ep; for ep above tp also --dp-size ep / tp --enable-dp-attention; for models with
  shared experts --disable-shared-experts-fusion.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from megarl.families.base.weight_blocks import EMBEDDING, HUGGING_FACE, LM_HEAD

EngineName = Literal["vllm", "sglang"]


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
        fused: rows of the projections that the one tensor of ``parts`` holds after one another; empty for one tensor each.
    """

    name: str
    parts: tuple[str, ...]
    cut: Cut
    group: Group = Group.ATTENTION
    fused: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """What is different in one engine, for every family.

    Attributes:
        dense_group: the ranks that SwiGLU and the output layer are cut over; SGLang's data parallel attention leaves them alone.
        experts_module: name of the module that stacks a layer's routed experts.
        latents: name of the projection that makes the latents of queries and of keys and values.
        cuts_tokens_of_experts: tokens of MoE layers are cut over the tp ranks when there are several groups of them, so that each
            rank has the whole of the shared experts (vLLM's ParallelConfig.use_sequence_parallel_moe).
        groups_are_whole: experts are distributed over whole groups of tp ranks, or not at all.
        has_scales: attention has the scales of a quantized cache also where there is none.
        wraps_modules: its state dict has the names of modules around parts of attention and experts, which checkpoints do not have.
        tells_shards_by_tp: a folder of shards has one file for each tp rank, whatever its experts.
    """

    dense_group: Group
    experts_module: str
    latents: str
    cuts_tokens_of_experts: bool
    groups_are_whole: bool
    has_scales: bool
    wraps_modules: bool
    tells_shards_by_tp: bool


TRAITS: dict[EngineName, EngineTraits] = {
    "vllm": EngineTraits(
        dense_group=Group.ATTENTION,
        experts_module="experts.routed_experts",
        latents="fused_qkv_a_proj",
        cuts_tokens_of_experts=True,
        groups_are_whole=True,
        has_scales=True,
        wraps_modules=True,
        tells_shards_by_tp=True,
    ),
    "sglang": EngineTraits(
        dense_group=Group.ENGINE,
        experts_module="experts",
        latents="fused_qkv_a_proj_with_mqa",
        cuts_tokens_of_experts=False,
        groups_are_whole=False,
        has_scales=False,
        wraps_modules=False,
        tells_shards_by_tp=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """Engines that are to get weights.

    Attributes:
        engine: whose parameters.
        tp: ranks that attention is cut over.
        ep: ranks that the experts are distributed over; 1 cuts every expert over the tp ranks instead.
        replicas: engines, all alike. Rank r of engine e is rank e · (ranks of an engine) + r.
    """

    engine: EngineName
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

    @property
    def traits(self) -> EngineTraits:
        """What is different in this engine."""
        return TRAITS[self.engine]

    @property
    def dense_group(self) -> Group:
        """The ranks that SwiGLU and the output layer are cut over."""
        return self.traits.dense_group

    @property
    def experts_module(self) -> str:
        """Name of the module that stacks a layer's routed experts."""
        return self.traits.experts_module


def layer_rule(name: str, cut: Cut, *parts: str, group: Group = Group.ATTENTION, fused: tuple[int, ...] = ()) -> EngineRule:
    """Return a rule for a parameter of each layer, names relative to it; without ``parts`` the tensor is named as the parameter."""
    return EngineRule(HUGGING_FACE + name, tuple(HUGGING_FACE + part for part in parts or (name,)), cut, group, fused)


def embedding() -> tuple[EngineRule, ...]:
    """Return the rule of the token embedding."""
    return (EngineRule(EMBEDDING, (EMBEDDING,), Cut.VOCABULARY),)


def norms(*names: str) -> tuple[EngineRule, ...]:
    """Return the rules of a layer's norms, which every rank has whole."""
    return tuple(layer_rule(f"{name}.weight", Cut.NONE) for name in names)


def attention(*kinds: str) -> tuple[EngineRule, ...]:
    """Return the rules of grouped-query attention.

    Args:
        kinds: of the query, key and value projections' tensors; ``weight``, and ``bias`` where they have one.
    """
    qkv = (
        layer_rule(f"self_attn.qkv_proj.{kind}", Cut.HEADS, *(f"self_attn.{part}_proj.{kind}" for part in "qkv")) for kind in kinds
    )
    return (*qkv, layer_rule("self_attn.o_proj.weight", Cut.ROW))


def swiglu(module: str, group: Group, cuts: tuple[Cut, Cut] = (Cut.COLUMN, Cut.ROW)) -> tuple[EngineRule, ...]:
    """Return the rules of one SwiGLU: gate and up projection in one, and the down projection."""
    return (
        layer_rule(f"{module}.gate_up_proj.weight", cuts[0], f"{module}.gate_proj.weight", f"{module}.up_proj.weight", group=group),
        layer_rule(f"{module}.down_proj.weight", cuts[1], group=group),
    )


def experts(module: str, expert: str, gate: str, up: str, down: str) -> tuple[EngineRule, ...]:
    """Return the rules of routed experts.

    Args:
        module: of the engine, relative to the layer.
        expert: prefix of one expert's tensors, with ``{expert}``.
        gate, up, down: its three projections.
    """
    return (
        layer_rule(f"{module}.w13_weight", Cut.COLUMN, f"{expert}.{gate}.weight", f"{expert}.{up}.weight", group=Group.EXPERTS),
        layer_rule(f"{module}.w2_weight", Cut.ROW, f"{expert}.{down}.weight", group=Group.EXPERTS),
    )


def output(engines: EngineLayout) -> tuple[EngineRule, ...]:
    """Return the rules of the final norm and of an output layer of its own."""
    return (
        EngineRule("model.norm.weight", ("model.norm.weight",), Cut.NONE),
        EngineRule(LM_HEAD, (LM_HEAD,), Cut.VOCABULARY, engines.dense_group),
    )


def dense_decoder(engines: EngineLayout, *kinds: str, more: tuple[EngineRule, ...] = ()) -> tuple[EngineRule, ...]:
    """Return the rules of a dense decoder that normalises its layers' inputs.

    Args:
        engines: that are to get the weights.
        kinds: as of ``attention``.
        more: of a layer, besides.
    """
    return (
        *embedding(),
        *norms("input_layernorm"),
        *attention(*kinds),
        *more,
        *norms("post_attention_layernorm"),
        *swiglu("mlp", engines.dense_group),
        *output(engines),
    )
