"""What MegaRL needs to know of a model, read from its Hugging Face config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, PretrainedConfig

from megarl.config.model_facts import SUPPORTED_MODEL_TYPES
from megarl.errors import ConfigError, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """The experts of a model.

    Attributes:
        num_experts: routed experts of each MoE layer.
        top_k: experts that one token visits.
        ffn_size: width of one routed expert.
        shared_ffn_size: width of all shared experts together; 0 without any.
        is_moe_layer: for each layer, whether it has experts.
        score_function: of the router's logits.
        normalise_top_k: the chosen experts' scores are divided by their sum.
        num_groups: groups of experts that routing is limited by; None without a limit.
        top_k_groups: groups that one token visits.
        scaling_factor: multiplies the scores.
        correction_bias: a bias per expert is added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437, 2.1.2).
    """

    num_experts: int
    top_k: int
    ffn_size: int
    shared_ffn_size: int
    is_moe_layer: tuple[bool, ...]
    score_function: Literal["softmax", "sigmoid"]
    normalise_top_k: bool
    num_groups: int | None
    top_k_groups: int | None
    scaling_factor: float
    correction_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        q_lora_rank: width of the query latent; None when queries are projected directly.
        kv_lora_rank: width of the key-value latent.
        qk_nope_head_dim: part of a query or key head without rotation.
        qk_rope_head_dim: part with rotation; the key's is shared by all heads.
        v_head_dim: width of one value head.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and switches of a decoder-only model.

    Attributes:
        family: Hugging Face model_type.
        ffn_size: width of a dense layer's MLP.
        head_dim: width of one query head.
        moe: its experts; None in dense models.
        mla: its latent attention; None with grouped-query attention.
        vocabulary_size: rows of the Hugging Face embedding, without Megatron's padding.
        hf_config: the whole Hugging Face config, for RoPE and export.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_positions: int
    initializer_range: float
    moe: MixtureOfExperts | None
    mla: LatentAttention | None
    hf_config: PretrainedConfig

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; 0 in dense models."""
        return self.moe.num_experts if self.moe else 0

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a query head."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` has experts."""
        return self.moe is not None and self.moe.is_moe_layer[layer]


def read_architecture(path: Path) -> Architecture:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        ConfigError: it cannot be read, or the family is not supported.
    """
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers checks values in its own way, and a folder's JSON may be anything
        raise ConfigError(f"model.path {path}: config.json cannot be read ({one_line(error)})") from error
    if hf.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.path {path}: family {hf.model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    num_heads = hf.num_attention_heads
    mla = _latent_attention(hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // num_heads
    return Architecture(
        family=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_heads if mla else getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else head_dim,
        vocabulary_size=hf.vocab_size,
        norm_epsilon=hf.rms_norm_eps,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type in ("qwen3", "qwen3_moe"),
        tied_embeddings=bool(hf.tie_word_embeddings),
        max_positions=hf.max_position_embeddings,
        initializer_range=hf.initializer_range,
        moe=_mixture_of_experts(hf),
        mla=mla,
        hf_config=hf,
    )


def _latent_attention(hf: PretrainedConfig) -> LatentAttention | None:
    if hf.model_type != "deepseek_v3":
        return None
    return LatentAttention(
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_nope_head_dim=hf.qk_nope_head_dim,
        qk_rope_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
    )


def _mixture_of_experts(hf: PretrainedConfig) -> MixtureOfExperts | None:
    """The experts of the config, by family; None too when it leaves no layer to them."""
    layers = range(hf.num_hidden_layers)
    if hf.model_type == "mixtral":
        moe = _softmax_experts(hf, hf.num_local_experts, hf.intermediate_size, True, tuple(True for _ in layers))
    elif hf.model_type == "qwen3_moe":
        step, dense = hf.decoder_sparse_step, hf.mlp_only_layers
        is_moe_layer = tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)
        moe = _softmax_experts(hf, hf.num_experts, hf.moe_intermediate_size, bool(hf.norm_topk_prob), is_moe_layer)
    elif hf.model_type == "deepseek_v3":
        is_limited = (hf.n_group or 1) > (hf.topk_group or 1)
        moe = MixtureOfExperts(
            num_experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            ffn_size=hf.moe_intermediate_size,
            shared_ffn_size=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
            is_moe_layer=tuple(layer >= hf.first_k_dense_replace for layer in layers),
            score_function="sigmoid",
            normalise_top_k=bool(hf.norm_topk_prob),
            num_groups=hf.n_group if is_limited else None,
            top_k_groups=hf.topk_group if is_limited else None,
            scaling_factor=hf.routed_scaling_factor,
            correction_bias=True,
        )
    else:
        return None
    return moe if any(moe.is_moe_layer) else None


def _softmax_experts(
    hf: PretrainedConfig, num_experts: int, ffn_size: int, normalise: bool, is_moe_layer: tuple[bool, ...]
) -> MixtureOfExperts:
    return MixtureOfExperts(
        num_experts=num_experts,
        top_k=hf.num_experts_per_tok,
        ffn_size=ffn_size,
        shared_ffn_size=0,
        is_moe_layer=is_moe_layer,
        score_function="softmax",
        normalise_top_k=normalise,
        num_groups=None,
        top_k_groups=None,
        scaling_factor=1.0,
        correction_bias=False,
    )


def padded_vocabulary_size(architecture: Architecture, pad_multiple: int, tp: int) -> int:
    """Rows of the Megatron embedding: the vocabulary rounded up to a multiple of ``pad_multiple · tp``."""
    multiple = pad_multiple * tp
    return -(-architecture.vocabulary_size // multiple) * multiple
