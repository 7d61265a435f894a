"""What each rank must hold, written from the definitions with chunk and cat, one rank and one tensor at a time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.families.base.architecture import Architecture

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MegatronSizes:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    first: int | None = None
    last: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True, kw_only=True)
class EngineSizes:
    engine: str
    tp: int = 1
    ep: int = 1
    replicas: int = 1

    @property
    def ranks(self) -> int:
        return max(self.tp, self.ep)


def hugging_face_tensors(a: Architecture) -> Tensors:
    """Integers that say which tensor and which element of it they are."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocabulary_size, a.hidden_size)}
    for layer in range(a.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(a, layer).items()}
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocabulary_size, a.hidden_size)
    tensors, count = {}, 1
    for name, shape in shapes.items():
        tensors[name] = torch.arange(count, count + math.prod(shape)).reshape(shape)
        count += math.prod(shape)
    return tensors


def layer_shapes(a: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    h, q, kv = a.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norm_names(a), (h,))
    if a.mla:
        m = a.mla
        shapes["self_attn.kv_a_proj_with_mqa.weight"] = (m.kv_lora_rank + m.qk_rope_head_dim, h)
        shapes["self_attn.kv_a_layernorm.weight"] = (m.kv_lora_rank,)
        shapes["self_attn.kv_b_proj.weight"] = (a.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
        shapes["self_attn.o_proj.weight"] = (h, a.num_heads * m.v_head_dim)
        query = a.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        if m.q_lora_rank is None:
            shapes["self_attn.q_proj.weight"] = (query, h)
        else:
            shapes["self_attn.q_a_proj.weight"] = (m.q_lora_rank, h)
            shapes["self_attn.q_a_layernorm.weight"] = (m.q_lora_rank,)
            shapes["self_attn.q_b_proj.weight"] = (query, m.q_lora_rank)
    elif a.family == "phi3":
        shapes["self_attn.qkv_proj.weight"] = (q + 2 * kv, h)
        shapes["self_attn.o_proj.weight"] = (h, q)
    else:
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{name}_proj.weight"] = (rows, h)
            if a.qkv_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (h, q)
        if a.qk_norm:
            is_olmo = a.family == "olmo2"
            shapes["self_attn.q_norm.weight"] = (q if is_olmo else a.head_dim,)
            shapes["self_attn.k_norm.weight"] = (kv if is_olmo else a.head_dim,)
    if a.family == "phi3":
        return shapes | {"mlp.gate_up_proj.weight": (2 * a.ffn_size, h), "mlp.down_proj.weight": (h, a.ffn_size)}
    if not a.is_moe_layer(layer):
        return shapes | swiglu_shapes("mlp.", a.ffn_size, h)
    moe = a.moe
    mlp = "block_sparse_moe." if a.family == "mixtral" else "mlp."
    shapes[mlp + "gate.weight"] = (moe.num_experts, h)
    if a.family == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (moe.num_experts,)
        shapes |= swiglu_shapes("mlp.shared_experts.", moe.shared_ffn_size, h)
    for expert in range(moe.num_experts):
        shapes |= swiglu_shapes(f"{mlp}experts.{expert}.", moe.ffn_size, h, *expert_names(a))
    return shapes


def norm_names(a: Architecture) -> tuple[str, str]:
    """Of a layer's two norms on disk."""
    if a.family == "olmo2":
        return "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
    return "input_layernorm.weight", "post_attention_layernorm.weight"


def layer_source(tensors: Tensors, a: Architecture, layer: int) -> Tensors:
    """The tensors of one layer, names relative to it; each projection by itself."""
    source = {name.split(".", 3)[3]: t for name, t in tensors.items() if name.startswith(f"model.layers.{layer}.")}
    if a.family == "phi3":
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        query, key, value = source.pop("self_attn.qkv_proj.weight").split([q, kv, kv])
        gate, up = source.pop("mlp.gate_up_proj.weight").chunk(2)
        source |= {"self_attn.q_proj.weight": query, "self_attn.k_proj.weight": key, "self_attn.v_proj.weight": value}
        source |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    return source


def swiglu_shapes(
    prefix: str, ffn: int, hidden: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}{gate}.weight": (ffn, hidden),
        f"{prefix}{up}.weight": (ffn, hidden),
        f"{prefix}{down}.weight": (hidden, ffn),
    }


def expert_names(a: Architecture) -> tuple[str, str, str]:
    return ("w1", "w3", "w2") if a.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")


def part(tensor: Tensor, dim: int, index: int, parts: int) -> Tensor:
    chunks = tensor.chunk(parts, dim)
    assert len(chunks) == parts and all(chunk.shape == chunks[0].shape for chunk in chunks)
    return chunks[index]


def padded_part(tensor: Tensor, multiple: int, index: int, parts: int) -> Tensor:
    rows = math.ceil(tensor.size(0) / multiple) * multiple
    padding = torch.zeros(rows - tensor.size(0), tensor.size(1), dtype=tensor.dtype)
    return part(torch.cat([tensor, padding]), 0, index, parts)


def megatron_layers(num_layers: int, s: MegatronSizes, pp_rank: int) -> list[int]:
    """Chunks of layers in turn: rank 0's first chunk, rank 1's first chunk, …, rank 0's second chunk, …"""
    per_rank = {}
    if s.first is not None:
        per_rank[0] = s.first
    if s.last is not None:
        per_rank[s.pp - 1] = s.last
    others = [rank for rank in range(s.pp) if rank not in per_rank]
    for rank in others:
        per_rank[rank] = (num_layers - (s.first or 0) - (s.last or 0)) // len(others)
    layer, mine = 0, []
    for _ in range(s.vpp):
        for rank in range(s.pp):
            for _ in range(per_rank[rank] // s.vpp):
                mine += [layer] if rank == pp_rank else []
                layer += 1
    assert layer == num_layers
    return mine


def megatron_rank(tensors: Tensors, a: Architecture, s: MegatronSizes, rank: int, pad_multiple: int) -> Tensors:
    """Parameters of one rank by global name. Ranks count tp fastest, then cp, dp, pp; for experts etp, ep, expert dp, pp."""
    etp = s.etp or s.tp
    tp_rank, etp_rank, ep_rank = rank % s.tp, rank % etp, rank // etp % s.ep
    pp_rank = rank // (s.world_size // s.pp)
    held: Tensors = {}
    if pp_rank == 0:
        embedding = tensors["model.embed_tokens.weight"]
        held["embedding.word_embeddings.weight"] = padded_part(embedding, pad_multiple * s.tp, tp_rank, s.tp)
    for layer in megatron_layers(a.num_layers, s, pp_rank):
        source = layer_source(tensors, a, layer)
        attention = megatron_latent_attention(source, tp_rank, s.tp) if a.mla else megatron_attention(source, a, tp_rank, s.tp)
        mlp = (
            megatron_moe(source, a, tp_rank, s.tp, etp_rank, etp, ep_rank, s.ep)
            if a.is_moe_layer(layer)
            else megatron_mlp(source, "mlp.", "mlp.", tp_rank, s.tp)
        )
        mine = attention | mlp
        theirs = norm_names(a)
        ours = theirs if a.family == "olmo2" else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        mine |= {our: source[name] for our, name in zip(ours, theirs, strict=True)}
        held |= {f"decoder.layers.{layer}.{name}": tensor for name, tensor in mine.items()}
    if pp_rank == s.pp - 1:
        held["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not (a.tied_embeddings and s.pp == 1):
            head = tensors["model.embed_tokens.weight" if a.tied_embeddings else "lm_head.weight"]
            held["output_layer.weight"] = padded_part(head, pad_multiple * s.tp, tp_rank, s.tp)
    return held


def megatron_attention(source: Tensors, a: Architecture, tp_rank: int, tp: int) -> Tensors:
    held = {"self_attention.linear_proj.weight": part(source["self_attn.o_proj.weight"], 1, tp_rank, tp)}
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        groups = [source[f"self_attn.{name}_proj.{kind}"].chunk(a.num_kv_heads) for name in "qkv"]
        fused = torch.cat([torch.cat([q, k, v]) for q, k, v in zip(*groups, strict=True)])
        held[f"self_attention.linear_qkv.{kind}"] = part(fused, 0, tp_rank, tp)
    for name in "qk" if a.qk_norm else "":
        weight = source[f"self_attn.{name}_norm.weight"]
        held[f"self_attention.{name}_layernorm.weight"] = part(weight, 0, tp_rank, tp) if a.family == "olmo2" else weight
    return held


def megatron_latent_attention(source: Tensors, tp_rank: int, tp: int) -> Tensors:
    held = {
        "linear_proj.weight": part(source["self_attn.o_proj.weight"], 1, tp_rank, tp),
        "linear_kv_down_proj.weight": source["self_attn.kv_a_proj_with_mqa.weight"],
        "kv_layernorm.weight": source["self_attn.kv_a_layernorm.weight"],
        "linear_kv_up_proj.weight": part(source["self_attn.kv_b_proj.weight"], 0, tp_rank, tp),
    }
    if "self_attn.q_proj.weight" in source:
        held["linear_q_proj.weight"] = part(source["self_attn.q_proj.weight"], 0, tp_rank, tp)
    else:
        held["linear_q_down_proj.weight"] = source["self_attn.q_a_proj.weight"]
        held["q_layernorm.weight"] = source["self_attn.q_a_layernorm.weight"]
        held["linear_q_up_proj.weight"] = part(source["self_attn.q_b_proj.weight"], 0, tp_rank, tp)
    return {f"self_attention.{name}": tensor for name, tensor in held.items()}


def megatron_mlp(
    source: Tensors,
    theirs: str,
    ours: str,
    tp_rank: int,
    tp: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensors:
    gate, up, down = (source[f"{theirs}{name}.weight"] for name in names)
    return {
        f"{ours}linear_fc1.weight": torch.cat([part(gate, 0, tp_rank, tp), part(up, 0, tp_rank, tp)]),
        f"{ours}linear_fc2.weight": part(down, 1, tp_rank, tp),
    }


def megatron_moe(
    source: Tensors, a: Architecture, tp_rank: int, tp: int, etp_rank: int, etp: int, ep_rank: int, ep: int
) -> Tensors:
    mlp = "block_sparse_moe." if a.family == "mixtral" else "mlp."
    held = {"mlp.router.weight": source[f"{mlp}gate.weight"]}
    if a.family == "deepseek_v3":
        held["mlp.router.expert_bias"] = source["mlp.gate.e_score_correction_bias"]
        held |= megatron_mlp(source, "mlp.shared_experts.", "mlp.shared_experts.", tp_rank, tp)
    per_rank = a.moe.num_experts // ep
    for expert in range(ep_rank * per_rank, (ep_rank + 1) * per_rank):
        ours = f"mlp.experts.local_experts.{expert}."
        held |= megatron_mlp(source, f"{mlp}experts.{expert}.", ours, etp_rank, etp, expert_names(a))
    return held


def engine_rank(tensors: Tensors, a: Architecture, s: EngineSizes, rank: int) -> Tensors:
    """Parameters of one rank of the engines."""
    sglang, ranks = s.engine == "sglang", s.ranks
    own = rank % ranks
    tp_rank = own % s.tp
    dense_rank, dense = (own, ranks) if sglang else (tp_rank, s.tp)
    held = {
        "model.embed_tokens.weight": padded_part(tensors["model.embed_tokens.weight"], 64, tp_rank, s.tp),
        "model.norm.weight": tensors["model.norm.weight"],
    }
    if not a.tied_embeddings:
        held["lm_head.weight"] = padded_part(tensors["lm_head.weight"], 64, dense_rank, dense)
    for layer in range(a.num_layers):
        source = layer_source(tensors, a, layer)
        mine = engine_latent_attention(source, sglang, tp_rank, s.tp) if a.mla else engine_attention(source, a, tp_rank, s.tp)
        if a.is_moe_layer(layer):
            shared = (0, 1) if not sglang and s.ep > s.tp > 1 else (dense_rank, dense)
            mine |= engine_moe(source, a, s, own, shared)
        else:
            mine |= engine_mlp(source, "mlp.", dense_rank, dense)
        for name in norm_names(a):
            mine[name] = source[name]
        held |= {f"model.layers.{layer}.{name}": tensor for name, tensor in mine.items()}
    return held


def engine_attention(source: Tensors, a: Architecture, tp_rank: int, tp: int) -> Tensors:
    held = {"self_attn.o_proj.weight": part(source["self_attn.o_proj.weight"], 1, tp_rank, tp)}
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        query, key, value = (source[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        if a.num_kv_heads < tp:  # each rank's one head repeated for the ranks that share it
            key, value = (
                torch.cat([head for head in tensor.chunk(a.num_kv_heads) for _ in range(tp // a.num_kv_heads)])
                for tensor in (key, value)
            )
        held[f"self_attn.qkv_proj.{kind}"] = torch.cat([part(tensor, 0, tp_rank, tp) for tensor in (query, key, value)])
    if a.qk_norm:
        held |= {name: source[name] for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight")}
    return held


def engine_latent_attention(source: Tensors, sglang: bool, tp_rank: int, tp: int) -> Tensors:
    held = {"o_proj.weight": part(source["self_attn.o_proj.weight"], 1, tp_rank, tp)}
    held["kv_a_layernorm.weight"] = source["self_attn.kv_a_layernorm.weight"]
    held["kv_b_proj.weight"] = part(source["self_attn.kv_b_proj.weight"], 0, tp_rank, tp)
    latent = source["self_attn.kv_a_proj_with_mqa.weight"]
    if "self_attn.q_proj.weight" in source:
        held["q_proj.weight"] = part(source["self_attn.q_proj.weight"], 0, tp_rank, tp)
        held["kv_a_proj_with_mqa.weight"] = latent
    else:
        name = "fused_qkv_a_proj_with_mqa" if sglang else "fused_qkv_a_proj"
        held[f"{name}.weight"] = torch.cat([source["self_attn.q_a_proj.weight"], latent])
        held["q_a_layernorm.weight"] = source["self_attn.q_a_layernorm.weight"]
        held["q_b_proj.weight"] = part(source["self_attn.q_b_proj.weight"], 0, tp_rank, tp)
    return {f"self_attn.{name}": tensor for name, tensor in held.items()}


def engine_mlp(source: Tensors, prefix: str, rank: int, ranks: int) -> Tensors:
    gate, up, down = (source[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {
        f"{prefix}gate_up_proj.weight": torch.cat([part(gate, 0, rank, ranks), part(up, 0, rank, ranks)]),
        f"{prefix}down_proj.weight": part(down, 1, rank, ranks),
    }


def engine_moe(source: Tensors, a: Architecture, s: EngineSizes, own: int, shared: tuple[int, int]) -> Tensors:
    mlp = "block_sparse_moe." if a.family == "mixtral" else "mlp."
    held = {f"{mlp}gate.weight": source[f"{mlp}gate.weight"]}
    if a.family == "deepseek_v3":
        held["mlp.gate.e_score_correction_bias"] = source["mlp.gate.e_score_correction_bias"]
        held |= engine_mlp(source, "mlp.shared_experts.", *shared)
    per_rank, expert_tp = a.moe.num_experts // s.ep, s.ranks // s.ep
    w13, w2 = [], []
    for expert in range(own // expert_tp * per_rank, (own // expert_tp + 1) * per_rank):
        gate, up, down = (source[f"{mlp}experts.{expert}.{name}.weight"] for name in expert_names(a))
        w13.append(torch.cat([part(gate, 0, own % expert_tp, expert_tp), part(up, 0, own % expert_tp, expert_tp)]))
        w2.append(part(down, 1, own % expert_tp, expert_tp))
    module = f"{mlp}experts" if s.engine == "sglang" else f"{mlp}experts.routed_experts"
    return held | {f"{module}.w13_weight": torch.stack(w13), f"{module}.w2_weight": torch.stack(w2)}
