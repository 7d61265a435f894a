"""What MegaRL knows of a model: its sizes and what its layers compute, in the same words for every family."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarl.families.base.rope_scaling import rope_parameters, stated_original


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
        num_groups: groups of experts; 1 without groups.
        top_k_groups: groups that one token visits; as many as ``num_groups`` where routing is not limited.
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
    num_groups: int
    top_k_groups: int
    scaling_factor: float
    correction_bias: bool

    @property
    def num_layers(self) -> int:
        """Layers of the model, with experts or without."""
        return len(self.is_moe_layer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, counted from 0."""
        return tuple(layer for layer, is_moe in enumerate(self.is_moe_layer) if is_moe)


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
        path: the model folder.
        family: Hugging Face model_type.
        ffn_size: width of a dense layer's MLP.
        num_kv_heads: key-value heads; latent attention has one for each query head.
        head_dim: width of one query head.
        vocabulary_size: rows of the Hugging Face embedding, without Megatron's padding.
        norm_epsilon: of the RMS norms.
        qkv_bias: queries, keys and values have biases.
        qk_norm: RMSNorm on queries and keys, over each head by itself or over all heads together; None without.
        norms_outputs: a layer normalises what attention and MLP give, ahead of the residual, and not what they take.
        tied_embeddings: the output layer is the embedding.
        max_positions: longest sequence in tokens.
        initializer_range: standard deviation of random weights.
        sliding_window: tokens that the layers with a window see; None when every layer sees the whole sequence.
        moe: its experts; None in dense models.
        mla: its latent attention; None with grouped-query attention.
        config_json: the whole file, for what one family alone has.
    """

    path: Path
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
    qk_norm: Literal["head", "all_heads"] | None
    norms_outputs: bool
    tied_embeddings: bool
    max_positions: int
    initializer_range: float
    sliding_window: int | None
    moe: MixtureOfExperts | None
    mla: LatentAttention | None
    config_json: Mapping[str, Any]

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; 0 in dense models."""
        return self.moe.num_experts if self.moe else 0

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a query head."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary positions and their scaling; ``rope_type`` is ``default`` when there is none."""
        return rope_parameters(self.config_json)

    @property
    def rope_type(self) -> str:
        """Kind of rotary position scaling."""
        return str(self.rope_parameters["rope_type"])

    @property
    def original_positions(self) -> int | None:
        """Positions that the model was pretrained on, where config.json states them for a scaling."""
        return stated_original(self.config_json)

    @property
    def quantization(self) -> str | None:
        """Method of quantized weights; None for plain weights."""
        quantization = self.config_json.get("quantization_config")
        return str(quantization.get("quant_method", "unknown method")) if quantization else None

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer number ``layer`` has experts."""
        return self.moe is not None and self.moe.is_moe_layer[layer]


def padded_vocabulary_size(architecture: Architecture, pad_multiple: int, tp: int) -> int:
    """Rows of the Megatron embedding: the vocabulary rounded up to a multiple of ``pad_multiple · tp``."""
    multiple = pad_multiple * tp
    return -(-architecture.vocabulary_size // multiple) * multiple
