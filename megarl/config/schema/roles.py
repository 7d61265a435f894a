"""The models of a run: weights, layouts, optimizers."""

from pathlib import Path
from typing import Any, Literal

from megarl.section import Section, key


class ModelConfig(Section):
    """The Hugging Face model that is trained."""

    path: Path = key(
        ..., "folder", "Model folder: config.json, tokenizer files, and safetensors or a Megatron checkpoint unless init is random."
    )
    init: Literal["pretrained", "random"] = key(
        "pretrained", "-", "Read the folder's weights, or draw random ones from its config and the seed."
    )
    tokenizer: Path | None = key(None, "folder", "Tokenizer folder; the model folder when not given.")
    rope_scaling: dict[str, Any] | None = key(
        None,
        "-",
        "RoPE scaling in place of config.json's, under its names, e.g. "
        "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}.",
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "-", "Type of parameters and activations; gradients and optimizer state stay float32."
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = key(
        "auto", "-", "Megatron layer implementation; auto takes Transformer Engine where it is installed and CUDA is present."
    )
    attention_impl: Literal["megarl", "transformer_engine"] = key(
        "megarl", "-", "Attention and its context parallelism: MegaRL's own, or on GPUs Transformer Engine's."
    )
    vocabulary_pad_multiple: int = key(1, "rows", "The vocabulary is padded to a multiple of this times tp.", ge=1)


class ParallelConfig(Section):
    """The layout of one role over its ranks; data parallel size is what remains of them."""

    tp: int = key(1, "ranks", "Tensor parallel size.", ge=1)
    pp: int = key(1, "ranks", "Pipeline parallel size.", ge=1)
    vpp: int = key(1, "model chunks per rank", "Virtual pipeline size (interleaved schedule); 1 means 1F1B.", ge=1)
    cp: int = key(1, "ranks", "Context parallel size.", ge=1)
    ep: int = key(1, "ranks", "Expert parallel size.", ge=1)
    etp: int | None = key(None, "ranks", "Tensor parallel size of experts; tp when not given.", ge=1)
    sequence_parallel: bool = key(False, "-", "Shard activations of norms and residuals along the sequence over the tp ranks.")
    num_layers_in_first_pipeline_stage: int | None = key(
        None, "layers", "Layers of the first pipeline stage; an equal share when not given.", ge=1
    )
    num_layers_in_last_pipeline_stage: int | None = key(
        None, "layers", "Layers of the last pipeline stage; an equal share when not given.", ge=1
    )
    context_parallel_method: Literal["all_gather", "all_to_all", "ring", "hybrid"] = key(
        "all_gather",
        "-",
        "How attention sees other ranks' tokens: gather keys and values, exchange heads (Ulysses), pass keys and values around a "
        "ring, or exchange heads among ulysses_size neighbours and pass keys and values around rings of such neighbours.",
    )
    ulysses_size: int | None = key(
        None, "ranks", "For hybrid: neighbouring context parallel ranks, such as those of a node, that exchange heads.", ge=2
    )
    distributed_optimizer: bool = key(True, "-", "Shard optimizer state over data and context parallel ranks.")
    overlap_gradient_reduce: bool = key(False, "-", "Overlap gradient reduction with the backward pass.")


class RoleConfig(Section):
    """One model in the world: its ranks, its layout over them, and how much it computes at once."""

    parallel: ParallelConfig = key(ParallelConfig, "-", "Layout of this role.")
    first_rank: int = key(0, "rank", "First rank of the world that has a part of this model.", ge=0)
    num_ranks: int | None = key(
        None, "ranks", "How many ranks from first_rank on have a part of this model; all of them when not given.", ge=1
    )
    max_tokens_per_micro_batch: int = key(
        16384, "tokens", "Most tokens that one packed micro-batch of one data parallel replica holds, over all its cp ranks.", ge=1
    )
    logprob_chunk_tokens: int = key(
        1024, "tokens", "Response tokens whose vocabulary logits exist at the same time, in forward and in backward.", ge=1
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none", "-", "Activation recomputation: none, attention only, or whole transformer layers."
    )
    offload: Literal["none", "optimizer", "all"] = key(
        "none",
        "-",
        "What waits in host memory while the model is idle: nothing, optimizer state (and gradients, which are dropped), or the "
        "weights too.",
    )

    offload_activations: bool = key(
        False, "-", "What layers keep for their backward pass (with recompute: full their inputs) waits in host memory until then."
    )

    def ranks(self, world_size: int) -> range:
        """Return its ranks in a world of ``world_size``; they may reach beyond it in a config that was not checked."""
        num_ranks = world_size - self.first_rank if self.num_ranks is None else self.num_ranks
        return range(self.first_rank, self.first_rank + num_ranks)


class ReferenceConfig(RoleConfig):
    """The frozen reference model; built only when algorithm.kl, observe.kl_reference or, for kind preference, the loss needs it."""

    path: Path | None = key(
        None, "folder", "Hugging Face folder of the reference weights; the policy's starting weights when not given."
    )


class OptimizerConfig(Section):
    """Adam (decoupled weight decay) and its learning-rate schedule."""

    learning_rate: float = key(1e-6, "-", "Peak learning rate.", gt=0)
    min_learning_rate: float = key(0.0, "-", "Learning rate at the end of the decay, one step behind the run's last.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "-", "Shape of the decay from peak to minimum, as transformers' schedules of these names."
    )
    warmup_steps: int = key(0, "optimizer steps", "Linear warm-up from 0.", ge=0)
    weight_decay: float = key(0.01, "-", "Decoupled weight decay; not applied to biases and norms.", ge=0)
    beta1: float = key(0.9, "-", "Adam's first moment decay.", ge=0, lt=1)
    beta2: float = key(0.999, "-", "Adam's second moment decay.", ge=0, lt=1)
    epsilon: float = key(1e-8, "-", "Adam's denominator constant.", gt=0)
    clip_gradient: float = key(1.0, "L2 norm", "The global gradient norm is clipped to this; 0 means no clipping.", ge=0)
    max_skipped_steps: int = key(
        10,
        "optimizer steps",
        "Training ends with an error after this many consecutive steps skipped for NaN or Inf gradients.",
        ge=1,
    )


class CriticConfig(RoleConfig):
    """The critic; built only when algorithm.advantage is gae."""

    path: Path | None = key(
        None,
        "folder",
        "Hugging Face folder that the critic starts from: a language model, whose output layer it replaces, or a "
        "...ForSequenceClassification with one label, such as a reward model; the policy's starting weights when not given.",
    )
    optimizer: OptimizerConfig | None = key(None, "-", "The critic's optimizer; settings as the policy's when not given.")
    warmup_steps: int = key(0, "steps", "In the first steps of the run the critic alone learns.", ge=0)


class RewardModelConfig(RoleConfig):
    """A frozen reward model that scores every training response beside the scorers; there is none when the section is not given."""

    path: Path = key(
        ..., "folder", "Hugging Face folder of a ...ForSequenceClassification with one label that reads the policy's tokens."
    )
    weight: float = key(1.0, "-", "Factor of its score in the reward.")
