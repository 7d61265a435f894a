"""Architecture and layout to megatron-core model chunks."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megarl.config.schema import ModelConfig, ParallelConfig, RoleConfig
from megarl.errors import ConfigError
from megarl.models.architecture import Architecture, padded_vocabulary_size
from megarl.models.rope import rotary_frequencies
from megarl.parallel.attention import PackedAttention
from megarl.parallel.layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTEXT_PARALLEL_NAMES = {"all_gather": "all_gather", "all_to_all": "a2a"}  # megatron-core's names
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class CausalLM(GPTModel):
    """A GPTModel whose last stage returns hidden states: logits are made later, for response tokens only, in chunks."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: Any, output_layer_weight_key: str, first_stage_word_emb_key: str, metadata: Any = None
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
        """[padded vocabulary / tp, hidden size], this rank's rows of the output layer (last stage only)."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def use_transformer_engine(implementation: str) -> bool:
    """Resolve ``model.transformer_impl``.

    Raises:
        ConfigError: Transformer Engine is asked for and missing.
    """
    available = torch.cuda.is_available() and find_spec("transformer_engine") is not None
    if implementation == "transformer_engine" and not available:
        raise ConfigError("model.transformer_impl transformer_engine: it is not installed or there is no CUDA; use auto or local")
    return available and implementation != "local"


def _layer_spec(architecture: Architecture, with_transformer_engine: bool) -> ModuleSpec:
    if with_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def transformer_config(
    architecture: Architecture, model: ModelConfig, role: RoleConfig, attention_factor: float
) -> TransformerConfig:
    """The megatron-core config of one role."""
    parallel: ParallelConfig = role.parallel
    dtype = DTYPES[model.dtype]
    interleaved = parallel.vpp > 1
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # the factor multiplies cos and sin of queries and keys alike, so it enters the logits squared
        softmax_scale=architecture.head_dim**-0.5 * attention_factor**2,
        init_method_std=architecture.initializer_range,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        cp_comm_type=CONTEXT_PARALLEL_NAMES[parallel.context_parallel_method],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # our losses carry their global normaliser, so gradients are summed, never averaged
        calculate_per_token_loss=True,
        # micro-batches are packed by tokens and differ in length
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, in dense models too
        # batched sends of the interleaved schedule mix up directions between two ranks (silently wrong gradients)
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        **RECOMPUTE[role.recompute],
    )


def build_model_chunks(
    architecture: Architecture, model: ModelConfig, role: RoleConfig, layout: Layout, seed: int
) -> list[CausalLM]:
    """This rank's model chunks (one, or vpp of them), with weights still undefined."""
    groups = layout.groups
    model_parallel_cuda_manual_seed(
        seed, tp_rank=layout.tp_rank, ep_rank=groups.ep.rank(), etp_rank=groups.expt_tp.rank(), force_reset_rng=True
    )
    frequencies, attention_factor = rotary_frequencies(architecture)
    config = transformer_config(architecture, model, role, attention_factor)
    spec = _layer_spec(architecture, use_transformer_engine(model.transformer_impl))
    vpp, last = role.parallel.vpp, role.parallel.pp - 1
    chunks = []
    for stage in range(vpp):
        chunk = CausalLM(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocabulary_size(architecture, model.vocabulary_pad_multiple, role.parallel.tp),
            max_sequence_length=architecture.max_positions,
            pre_process=layout.pp_rank == 0 and stage == 0,
            post_process=layout.pp_rank == last and stage == vpp - 1,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=stage if vpp > 1 else None,
        )
        chunk.rotary_pos_emb.inv_freq = frequencies.to(chunk.rotary_pos_emb.inv_freq.device)
        chunks.append(chunk.cuda())
    return chunks
