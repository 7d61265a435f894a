"""The modules of each transformer layer: grouped-query or latent attention, one MLP or experts, local or Transformer Engine."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megarl.families.base.architecture import Architecture
from megarl.models.latent_attention import LatentAttentionModule
from megarl.models.norms import AllHeadsNormAttention, OutputNormLayer
from megarl.models.router import ConstantBiasRouter


def stage_spec(
    architecture: Architecture,
    config: TransformerConfig,
    with_transformer_engine: bool,
    core_attention: type,
    pp_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, each dense or with experts as the model says, and the norm behind the last layer.

    Args:
        core_attention: class of the layers' attention between projections, e.g. PackedAttention.
    """
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    specs = {
        is_moe: _layer_spec(architecture, with_transformer_engine, core_attention, is_moe)
        for is_moe in {architecture.is_moe_layer(layer) for layer in layers}
    }
    return TransformerBlockSubmodules(
        layer_specs=[specs[architecture.is_moe_layer(layer)] for layer in layers], layer_norm=_norm(with_transformer_engine)
    )


def _norm(with_transformer_engine: bool) -> type:
    if not with_transformer_engine:
        return WrappedTorchNorm
    from megatron.core.extensions.transformer_engine import TENorm  # its import fails without Transformer Engine

    return TENorm


def _layer_spec(architecture: Architecture, with_transformer_engine: bool, core_attention: type, is_moe: bool) -> ModuleSpec:
    options: dict[str, Any] = {
        "num_experts": architecture.num_experts if is_moe else None,
        "qk_layernorm": architecture.qk_norm == "head",
        "multi_latent_attention": architecture.mla is not None,
    }
    if with_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(moe_grouped_gemm=is_moe, **options)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    attention = spec.submodules.self_attention
    attention.submodules.core_attention = core_attention
    if architecture.mla is not None:
        attention.module = LatentAttentionModule
        attention.submodules.q_layernorm = attention.submodules.kv_layernorm = _norm(with_transformer_engine)
    if is_moe and architecture.moe is not None and architecture.moe.correction_bias:
        spec.submodules.mlp.submodules.router = ConstantBiasRouter
    if architecture.qk_norm == "all_heads":
        attention.module = AllHeadsNormAttention
    if architecture.norms_outputs:
        _normalise_outputs(spec, with_transformer_engine)
    return spec


def _normalise_outputs(spec: ModuleSpec, with_transformer_engine: bool) -> None:
    """Take the norms from ahead of attention and MLP of a dense layer, and put others behind them."""
    spec.module, spec.params = OutputNormLayer, {"norm": _norm(with_transformer_engine)}
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
    if with_transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear  # as above

        spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        spec.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
