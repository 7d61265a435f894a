"""Refuses models that the config's rollout engine would compute otherwise than transformers and the trainer do.

Read from vLLM 0.32.0 (model_executor/models) and SGLang 0.5.23 (srt/models), in the files named after the families.
"""

from collections.abc import Iterator

from megarl.config.model_facts import LATENT_NORM_EPSILON, ModelFacts
from megarl.config.schema import Config

# engines whose models of a family have an output layer of their own, tied or not
NEVER_TIED = {("vllm", "deepseek_v3"), ("sglang", "qwen3_moe"), ("sglang", "mixtral")}


def check_engine(config: Config, facts: ModelFacts) -> Iterator[str]:
    """All checks of this file; one line for each mistake."""
    engine = config.rollout.engine
    if config.rollout.routing_replay and facts.experts is None:
        yield f"rollout.routing_replay: is true and {facts.path} has no experts to replay; set it to false"
    if config.rollout.server is None or not config.samples_responses:
        return
    other = "sglang" if engine == "vllm" else "vllm"
    if (engine, facts.model_type) in NEVER_TIED and facts.has_tied_embeddings:
        yield (
            f"rollout.engine: {engine} gives {facts.model_type} an output layer of its own, and {facts.path} ties it to the "
            f"embedding (tie_word_embeddings); use {other} or embedded"
        )
    if facts.model_type == "deepseek_v3":
        yield from _check_deepseek(engine, facts)
    if engine == "sglang":
        yield from _check_sglang(facts)


def _check_sglang(facts: ModelFacts) -> Iterator[str]:
    num_moe_layers = len(facts.experts.moe_layers) if facts.experts is not None else 0
    if facts.model_type == "qwen3_moe" and num_moe_layers < facts.num_layers:
        yield (
            f"rollout.engine: sglang gives every layer of qwen3_moe experts, and only {num_moe_layers} of the {facts.num_layers} "
            f"layers of {facts.path} have them (decoder_sparse_step, mlp_only_layers); use vllm or embedded"
        )
    attention_factor = facts.rope_parameters.get("attention_factor")
    if facts.model_type != "deepseek_v3" and attention_factor is not None:
        yield (
            f"rollout.engine: sglang reads no attention_factor of RoPE, and {facts.path} has {attention_factor}; "
            "use vllm or embedded"
        )
    if facts.model_type == "mixtral" and facts.rope_type != "default":
        yield (
            f"rollout.engine: sglang does not scale mixtral's RoPE, and {facts.path} has rope_type {facts.rope_type!r}; "
            "use vllm or embedded"
        )


def _check_deepseek(engine: str, facts: ModelFacts) -> Iterator[str]:
    if facts.rope_type not in ("default", "yarn"):
        yield (
            f"rollout.engine: {engine} takes any scaling of deepseek_v3's RoPE for yarn, and {facts.path} has rope_type "
            f"{facts.rope_type!r}; use embedded"
        )
    for name, default in (("attention_factor", None), ("truncate", True)):
        value = facts.rope_parameters.get(name, default)
        if value != default:
            yield f"rollout.engine: {engine} reads no {name} of deepseek_v3's RoPE, and {facts.path} has {value}; use embedded"
    if facts.norm_epsilon != LATENT_NORM_EPSILON:
        yield (
            f"rollout.engine: {engine} gives the norms of deepseek_v3's latents rms_norm_eps {facts.norm_epsilon:g} of "
            f"{facts.path}, and the trainer {LATENT_NORM_EPSILON:g}; use embedded"
        )
    if facts.experts is None:
        return
    routing: dict[str, tuple[object, object]] = {
        "topk_method": (facts.experts.topk_method, "noaux_tc"),
        "scoring_func": (facts.experts.scoring_func, "sigmoid"),
        "moe_layer_freq": (facts.experts.moe_layer_freq, 1),
    }
    for name, (value, needed) in routing.items():
        if value != needed and not (engine == "vllm" and name == "moe_layer_freq" and value is None):
            yield (
                f"rollout.engine: {engine} reads {name} in {facts.path / 'config.json'}, and transformers computes as with "
                f"{needed!r}, not {value!r}; set it to {needed!r}, or use embedded"
            )
