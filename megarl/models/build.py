"""Architecture and layout to megatron-core model chunks, and the modules of each of their layers.

A layer has grouped-query or latent attention, one MLP or experts, local modules or Transformer Engine's.
"""

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megarl.config.schema import ModelConfig, RoleConfig
from megarl.errors import ConfigError
from megarl.families.base.architecture import Architecture, padded_vocabulary_size
from megarl.models.latent_attention import LatentAttentionModule, ScaledRotaryEmbedding
from megarl.models.norms import AllHeadsNormAttention, OutputNormLayer
from megarl.models.rope import rotary_frequencies
from megarl.models.transformer_config import transformer_config
from megarl.parallel.attention import PackedAttention
from megarl.parallel.layout import Layout


class ConstantBiasRouter(TopKRouter):
    """DeepSeek-V3's router, whose correction bias stays what the checkpoint says.

    megatron-core's ``moe_router_enable_expert_bias`` moves the bias after each step to balance the experts' load, which is a
    pretraining method (docs/decisions): here the bias is a constant of the model.
    """

    expert_bias: torch.Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.expert_bias  # None, as the config leaves the moving bias off
        self.register_buffer("expert_bias", torch.zeros(self.config.num_moe_experts, dtype=torch.float32))


def stage_spec(
    architecture: Architecture,
    config: TransformerConfig,
    with_transformer_engine: bool,
    core_attention: type,
    pp_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Return the layers of one model chunk, each dense or with experts as the model says, and the norm behind the last layer.

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
    options: dict[str, object] = {
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


class CausalLM(GPTModel):
    """A GPTModel whose last stage returns hidden states: logits are made later, for response tokens only, in chunks."""

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: Any, output_layer_weight_key: str, first_stage_word_emb_key: str, metadata: object = None
    ) -> None:
        """Save the last stage's copy of tied embeddings as a replica of the first's (upstream reads a global group here)."""
        if not self.post_process or self.pre_process:
            return
        del sharded_state_dict[output_layer_weight_key]
        dp_cp_group = self.pg_collection.dp_cp
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, dp_cp_group.rank()),
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=dp_cp_group,
        )

    def output_weight(self) -> Tensor:
        """Return this rank's rows of the output layer, [padded vocabulary / tp, hidden size] (last stage only)."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


class ValueModel(CausalLM):
    """A GPTModel whose last stage has a value head in the place of the output layer: one number for each token."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        if self.post_process:
            # under the output layer's name, which megatron-core looks for when it saves
            self.output_layer = torch.nn.Linear(self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype)


def use_transformer_engine(implementation: str) -> bool:
    """Resolve ``model.transformer_impl``.

    Raises:
        ConfigError: Transformer Engine is asked for and missing.
    """
    available = torch.cuda.is_available() and find_spec("transformer_engine") is not None
    if implementation == "transformer_engine" and not available:
        raise ConfigError("model.transformer_impl transformer_engine: it is not installed or there is no CUDA; use auto or local")
    return available and implementation != "local"


def build_model_chunks(
    architecture: Architecture,
    model: ModelConfig,
    role: RoleConfig,
    layout: Layout,
    seed: int,
    model_class: type[CausalLM] = CausalLM,
) -> list[CausalLM]:
    """Build this rank's model chunks (one, or vpp of them), with weights still undefined; none on a rank outside the role."""
    if not layout.is_member:
        return []
    groups = layout.groups
    model_parallel_cuda_manual_seed(
        seed, tp_rank=layout.tp_rank, ep_rank=groups.ep.rank(), etp_rank=groups.expt_tp.rank(), force_reset_rng=True
    )
    frequencies, attention_factor = rotary_frequencies(architecture)
    with_transformer_engine = use_transformer_engine(model.transformer_impl)
    if model.attention_impl == "transformer_engine" and not with_transformer_engine:
        raise ConfigError(
            "model.attention_impl transformer_engine: Transformer Engine is not installed or there is no CUDA; use megarl"
        )
    config = transformer_config(architecture, model, role, attention_factor, with_transformer_engine)
    chunks = []
    for stage in range(role.parallel.vpp):
        chunk = _build_chunk(architecture, config, model, role, layout, stage, with_transformer_engine, model_class)
        _set_rotary_frequencies(chunk, frequencies, attention_factor)
        chunks.append(chunk.cuda())
    return chunks


def build_model_on_meta(architecture: Architecture, model: ModelConfig, layout: Layout) -> CausalLM:
    """Build the whole model on one rank, with megatron-core's own layers and no storage: for names, shapes, checkpoint keys."""
    model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    role = RoleConfig()
    config = transformer_config(architecture, model, role, attention_factor=1.0, with_transformer_engine=False)
    config.use_cpu_initialization = True  # the other way allocates on the GPU, which it names
    with torch.device("meta"):
        return _build_chunk(architecture, config, model, role, layout, 0, False)


def _build_chunk(
    architecture: Architecture,
    config: TransformerConfig,
    model: ModelConfig,
    role: RoleConfig,
    layout: Layout,
    stage: int,
    with_transformer_engine: bool,
    model_class: type[CausalLM] = CausalLM,
) -> CausalLM:
    vpp, last = role.parallel.vpp, role.parallel.pp - 1
    vp_stage = stage if vpp > 1 else None
    chunk = model_class(
        config=config,
        transformer_layer_spec=stage_spec(
            architecture, config, with_transformer_engine, _core_attention(model), layout.pp_rank, vp_stage
        ),
        vocab_size=padded_vocabulary_size(architecture, model.vocabulary_pad_multiple, role.parallel.tp),
        max_sequence_length=architecture.max_positions,
        pre_process=layout.pp_rank == 0 and stage == 0,
        post_process=layout.pp_rank == last and stage == vpp - 1,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )
    # local norms ignore params_dtype, and the distributed optimizer saves mixed types under wrong parameters
    for parameter in chunk.parameters():
        parameter.data = parameter.data.to(config.params_dtype)
    return chunk


def _core_attention(model: ModelConfig) -> type:
    if model.attention_impl == "megarl":
        return PackedAttention
    from megarl.parallel.transformer_engine_attention import TransformerEngineAttention  # fails without Transformer Engine

    return TransformerEngineAttention


def _set_rotary_frequencies(chunk: CausalLM, frequencies: Tensor, attention_factor: float) -> None:
    for module in chunk.modules():
        if isinstance(module, RotaryEmbedding):
            module.inv_freq = frequencies.to(module.inv_freq.device)
        if isinstance(module, ScaledRotaryEmbedding):
            module.attention_factor = attention_factor
