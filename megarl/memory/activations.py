"""Which tensors a layer and the head keep for the backward pass, and what they need beside them, in bytes of one rank.

Every function returns bytes by the name of the tensors, so that a statement can say what is large. Counted are megatron-core's
unfused local layers with torch's kernels, as they run on CPU; Transformer Engine's fused layers keep less. Tokens that visit
experts are taken to be shared out evenly.

    n tokens of a rank (a micro-batch's / cp)      h hidden size            f width of an MLP or an expert
    N tokens of all context parallel ranks         q, k, v heads · width    e bytes of an element
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megarl.config.schema import ParallelConfig
from megarl.families.base.architecture import Architecture, LatentAttention, MixtureOfExperts

Tensors = Mapping[str, float]  # name to bytes
FLOAT = 4  # bytes of a float32
INT = 8  # bytes of an int64
Recompute = Literal["none", "selective", "full"]


def total(tensors: Tensors) -> float:
    """Return the bytes of all tensors."""
    return sum(tensors.values())


def added(*parts: Tensors) -> dict[str, float]:
    """Bytes by name over several parts."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part)
    return dict(sums)


def scaled(tensors: Tensors, factor: float) -> dict[str, float]:
    """Return each tensor as often as ``factor`` says."""
    return {name: size * factor for name, size in tensors.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One transformer layer on one rank.

    Attributes:
        architecture: the model.
        parallel: the role's layout.
        tokens: n, of the micro-batch on this rank.
        element: e, bytes of an element of the model's type.
    """

    architecture: Architecture
    parallel: ParallelConfig
    tokens: int
    element: int

    @property
    def norm_tokens(self) -> float:
        """Tokens of norms and residuals: sequence parallelism shares them out over the tp ranks."""
        return self.tokens / (self.parallel.tp if self.parallel.sequence_parallel else 1)

    @property
    def all_tokens(self) -> int:
        """N, the tokens of all ranks."""
        return self.tokens * self.parallel.cp

    @property
    def hidden(self) -> float:
        """Bytes of one residual: n·h·e."""
        return self.norm_tokens * self.architecture.hidden_size * self.element

    @property
    def query_width(self) -> float:
        """q, the width of this rank's queries."""
        return self.architecture.num_heads * self.architecture.head_dim / self.parallel.tp

    @property
    def key_width(self) -> float:
        """k; latent attention has a key for every head."""
        return self.architecture.num_kv_heads * self.architecture.head_dim / self.parallel.tp

    @property
    def value_width(self) -> float:
        """v, the width of this rank's values."""
        mla = self.architecture.mla
        return self.architecture.num_kv_heads * (mla.v_head_dim if mla else self.architecture.head_dim) / self.parallel.tp

    @property
    def out_width(self) -> float:
        """Of the attention's output, all heads."""
        mla = self.architecture.mla
        return self.architecture.num_heads * (mla.v_head_dim if mla else self.architecture.head_dim) / self.parallel.tp

    @property
    def exchange_size(self) -> int:
        """Context parallel ranks that exchange tokens for heads; 1 where none do."""
        method = self.parallel.context_parallel_method
        return {"all_to_all": self.parallel.cp, "hybrid": self.parallel.ulysses_size or 1}.get(method, 1)


def norm(tokens: float, width: float, element: int) -> dict[str, float]:
    """Return what torch's RMSNorm keeps, its input in float32 (a bfloat16 one is copied) and the normalised input in float32, and
    its output, which the next projection keeps. Where layers normalise outputs, that one keeps the residual instead, as large."""
    return {
        "norm inputs": FLOAT * tokens * width,
        "normalised inputs": FLOAT * tokens * width,
        "norm outputs": element * tokens * width,
    }


def core_attention(shape: LayerShape) -> dict[str, float]:
    """List what attention keeps inside (``parallel/attention.py``): its output, log-sum-exp, and copies of its inputs.

    ``selective`` recomputation keeps none of it.
    """
    n, e = shape.tokens, shape.element
    heads = shape.architecture.num_heads / shape.parallel.tp
    kept = {"attention outputs": e * n * shape.out_width, "log-sum-exp": FLOAT * n * heads}
    if shape.parallel.cp == 1:
        kept["attention outputs"] = e * n * shape.query_width  # values are as wide as queries for the fused kernel
        if shape.value_width < shape.key_width:
            kept["padded values"] = e * n * shape.key_width
        return kept
    if shape.parallel.context_parallel_method == "all_gather":
        kept["gathered keys and values"] = e * shape.all_tokens * (shape.key_width + shape.value_width)
        kept["token order"] = INT * shape.all_tokens
    elif shape.exchange_size > 1:
        copies = max(1.0, shape.exchange_size * shape.parallel.tp / shape.architecture.num_kv_heads)
        kept["exchanged queries"] = e * n * shape.query_width
        kept["exchanged keys and values"] = e * n * (shape.key_width + shape.value_width) * copies
        kept["token order"] = 2 * INT * n * shape.exchange_size
        if shape.parallel.context_parallel_method == "all_to_all":
            kept["attention outputs"] = e * n * shape.query_width
            if shape.value_width < shape.key_width:
                kept["padded values"] = e * n * shape.key_width * copies
    return kept


def attention_inputs(shape: LayerShape, *, kept_by_core: bool) -> dict[str, float]:
    """Queries, keys and values as they enter attention, and what made them.

    Args:
        kept_by_core: attention itself keeps its inputs; with methods that copy them first it does not, but recomputation does.
    """
    n, e, mla = shape.tokens, shape.element, shape.architecture.mla
    copies = shape.parallel.cp > 1 and shape.parallel.context_parallel_method != "ring"
    kept: dict[str, float] = {"cos and sin": 4 * e * n * shape.architecture.rotary_dim}
    if not copies or kept_by_core or shape.parallel.context_parallel_method == "all_gather":
        kept["queries"] = e * n * shape.query_width
    if not copies or kept_by_core:
        kept["keys"] = e * n * shape.key_width
        # a value is a view of the whole projection
        kept["values"] = e * n * (shape.value_width if mla else shape.query_width + 2 * shape.key_width)
    if mla:
        kept = added(kept, _latents(shape, mla))
        if shape.parallel.cp == 1 and not kept_by_core:
            del kept["values"]  # what the kernel keeps are the padded ones
    elif shape.architecture.qk_norm:
        # their outputs are rotated and gone; in float32 the key that goes in is a view of the projection
        inputs = shape.query_width + (shape.key_width if e != FLOAT else 0)
        kept["query and key norms"] = FLOAT * n * (inputs + shape.query_width + shape.key_width)
    return kept


def _latents(shape: LayerShape, mla: LatentAttention) -> dict[str, float]:
    width = mla.kv_lora_rank + (mla.q_lora_rank or 0)
    return {f"latent {name}": size for name, size in norm(shape.norm_tokens, width, shape.element).items()}


def mlp(tokens: float, width: float, element: int) -> dict[str, float]:
    """SwiGLU in four kernels: the first projection's output [2f], silu, the linear half with an offset added, and their product."""
    return {"MLP": 5 * element * tokens * width}


def experts(shape: LayerShape, moe: MixtureOfExperts) -> dict[str, float]:
    """Router, tokens sorted by expert, and an MLP over them whose product is also kept times the router's probability."""
    e, parallel = shape.element, shape.parallel
    etp = parallel.etp or parallel.tp
    rows = shape.norm_tokens * moe.top_k * etp
    kept = {
        "router": (3 * FLOAT + INT) * shape.norm_tokens * moe.num_experts,
        "dispatched tokens": e * rows * shape.architecture.hidden_size + 2 * INT * rows,
        "experts": 6 * e * rows * moe.ffn_size / etp,
    }
    if moe.shared_ffn_size:
        kept |= mlp(shape.tokens, moe.shared_ffn_size / parallel.tp, e)
    return kept


def saved(shape: LayerShape, *, is_moe: bool, recompute: Recompute) -> dict[str, float]:
    """List what one layer keeps of one micro-batch until its backward pass."""
    if recompute == "full":
        return {"layer inputs": shape.hidden}
    parts = [scaled(norm(shape.norm_tokens, shape.architecture.hidden_size, shape.element), 2)]
    parts.append(attention_inputs(shape, kept_by_core=recompute == "selective"))
    if recompute == "none":
        parts.append(core_attention(shape))
    if shape.parallel.cp == 1 or shape.parallel.context_parallel_method != "ring" or recompute == "selective":
        parts.append({"joined attention outputs": shape.element * shape.tokens * shape.out_width})
    moe = shape.architecture.moe
    if is_moe and moe is not None:
        parts.append(experts(shape, moe))
    else:
        parts.append(mlp(shape.tokens, shape.architecture.ffn_size / shape.parallel.tp, shape.element))
    return added(*parts)


def working(shape: LayerShape, *, is_moe: bool, recompute: Recompute) -> float:
    """Bytes that a layer's backward pass holds at its peak beyond what was kept of it: recomputed tensors, gradients of activations
    and of one weight."""
    recomputed = 0.0
    if recompute == "full":
        recomputed = total(saved(shape, is_moe=is_moe, recompute="none"))
    moe = shape.architecture.moe
    width, rows, parts = float(shape.architecture.ffn_size), float(shape.tokens), shape.parallel.tp
    if is_moe and moe is not None:
        parts = shape.parallel.etp or shape.parallel.tp
        width, rows = float(moe.ffn_size), shape.norm_tokens * moe.top_k * parts / max(1, moe.num_experts // shape.parallel.ep)
    # the product is gone; its gradient and those of its two factors are there
    of_mlp = 2 * shape.element * rows * width / parts + shape.hidden
    return recomputed + max(of_mlp, _attention_working(shape, is_moe=is_moe, recompute=recompute))


def _attention_working(shape: LayerShape, *, is_moe: bool, recompute: Recompute) -> float:
    """Count the same for attention, less what the MLP behind it no longer keeps."""
    n, e = shape.tokens, shape.element
    key_value = shape.key_width + shape.value_width
    gone = total(saved(shape, is_moe=is_moe, recompute="none")) - total(core_attention(shape))
    gone -= total(attention_inputs(shape, kept_by_core=False)) + shape.hidden * 3
    gradients = 3 * e * n * shape.query_width + 2 * e * n * key_value + 2 * shape.hidden
    if shape.parallel.cp > 1:
        gradients += FLOAT * n * shape.query_width
        if shape.parallel.context_parallel_method == "all_gather":
            gradients += 2.5 * e * shape.all_tokens * key_value  # sums over chunks, one chunk's, and both put in order again
        elif shape.parallel.context_parallel_method != "all_to_all":
            gradients += (2 * e + 3 * FLOAT) * n * key_value  # keys, values and their gradients, here and on their way
    again = total(core_attention(shape)) if recompute == "selective" else 0.0
    return gradients + again - gone


def forward_only(shape: LayerShape, *, is_moe: bool) -> float:
    """Bytes of one layer without gradients: residuals, the normalised input, the norm's output, and the widest of what follows."""
    moe = shape.architecture.moe
    kept = 4 * shape.hidden
    if is_moe and moe is not None:
        etp = shape.parallel.etp or shape.parallel.tp
        rows = shape.norm_tokens * moe.top_k * etp
        one_expert = rows / max(1, moe.num_experts // shape.parallel.ep) * moe.ffn_size / etp
        return kept + shape.element * (2 * rows * shape.architecture.hidden_size + 5 * one_expert)
    of_mlp = 5 * shape.element * shape.tokens * shape.architecture.ffn_size / shape.parallel.tp
    of_attention = shape.element * shape.tokens * 4 * (shape.query_width + shape.key_width + shape.value_width)
    if shape.parallel.cp > 1 and shape.parallel.context_parallel_method == "all_gather":
        of_attention += 2 * shape.element * shape.all_tokens * (shape.key_width + shape.value_width)
    return kept + max(of_mlp, of_attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """One role's head on the last pipeline stage.

    Attributes:
        rows: trained tokens of a micro-batch on this rank.
        hidden_size: h.
        vocabulary: rows of the output layer on this rank, V; 0 for a value head.
        chunk: ``logprob_chunk_tokens``.
        element: bytes of an element of the model's type.
    """

    rows: int
    hidden_size: int
    vocabulary: int
    chunk: int
    element: int

    @property
    def chunk_elements(self) -> int:
        """Logits that exist at the same time."""
        return min(self.chunk, self.rows) * self.vocabulary

    @property
    def weight_elements(self) -> int:
        """V·h, the output layer's elements."""
        return self.vocabulary * self.hidden_size


def head_kept(shape: HeadShape) -> float:
    """Count hidden states of the trained tokens (float32 for values), log-probs, entropies, normalisers and objective terms."""
    element = shape.element if shape.vocabulary else FLOAT
    return shape.rows * (shape.hidden_size * element + 10 * FLOAT)


def head_forward(shape: HeadShape) -> float:
    """Count a chunk's logits and their exponents in float32; at no time more, so the length of sequences does not count."""
    return 2 * FLOAT * shape.chunk_elements


def head_backward(shape: HeadShape) -> float:
    """Count gradients of the hidden states and, in float32, of the output layer; a chunk's log-probs and probabilities.

    In bfloat16 also a chunk's gradient, and its share of the output layer's in both types.
    """
    hidden = shape.rows * shape.hidden_size * (shape.element if shape.vocabulary else 2 * FLOAT)
    chunk = 2 * FLOAT * shape.chunk_elements
    if shape.element != FLOAT:
        both = shape.element + FLOAT
        chunk = max(chunk, both * shape.chunk_elements + both * shape.weight_elements)
    return hidden + FLOAT * shape.weight_elements + chunk
