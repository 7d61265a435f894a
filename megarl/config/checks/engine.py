"""Refuses models that the config's rollout engine would compute otherwise than transformers and the trainer do.

What a family's models need is in the family's file, read from vLLM 0.32.0 (model_executor/models) and SGLang 0.5.23 (srt/models).
"""

from collections.abc import Iterator

from megarl.config.schema import Config
from megarl.families.base.architecture import Architecture
from megarl.families.base.engine_rules import EngineName
from megarl.families.registry import family_of


def check_engine(config: Config, facts: Architecture) -> Iterator[str]:
    """All checks of this file; one line for each mistake."""
    engine = config.rollout.server_engine
    if config.rollout.routing_replay and facts.moe is None:
        yield f"rollout.routing_replay: is true and {facts.path} has no experts to replay; set it to false"
    if engine is not None and config.samples_responses:
        yield from (f"rollout.engine: {line}" for line in _refusals(facts, engine))


def _refusals(facts: Architecture, engine: EngineName) -> Iterator[str]:
    """Say what the engine computes otherwise."""
    family = family_of(facts.family)
    others = "vllm or embedded" if engine == "sglang" else "sglang or embedded"
    if facts.tied_embeddings and engine in family.never_tied_by:
        yield (
            f"{engine} gives {facts.family} an output layer of its own, and {facts.path} ties it to the "
            f"embedding (tie_word_embeddings); use {others}"
        )
    num_moe_layers = len(facts.moe.moe_layers) if facts.moe is not None else 0
    if num_moe_layers < facts.num_layers and engine in family.experts_everywhere_in:
        yield (
            f"{engine} gives every layer of {facts.family} experts, and only {num_moe_layers} of the {facts.num_layers} layers of "
            f"{facts.path} have them (decoder_sparse_step, mlp_only_layers); use {others}"
        )
    attention_factor = facts.rope_parameters.get("attention_factor")
    if engine == "sglang" and facts.mla is None and attention_factor is not None:
        yield f"sglang reads no attention_factor of RoPE, and {facts.path} has {attention_factor}; use {others}"
    yield from family.engine_refusals(facts, engine)
