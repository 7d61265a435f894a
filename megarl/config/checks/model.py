"""Checks of a model's config.json: whether the engine computes it as the trainer does, and a RoPE scaling in its place."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from megarl.config.schema import Config
from megarl.families.base.architecture import Architecture
from megarl.families.base.engine_rules import EngineName
from megarl.families.base.rope_scaling import LENGTH_DEPENDENT, NAMES, ORIGINAL, SWITCHES, WHOLE_NUMBERS
from megarl.families.registry import family_of

KEY = "model.rope_scaling"
TEMPERATURES = ("attention_factor", "mscale", "mscale_all_dim")


def check_engine(config: Config, facts: Architecture) -> Iterator[str]:
    """Refuse what the engine of the run computes otherwise than transformers and the trainer do; one line for each.

    What a family's models need is in the family's file, read from vLLM 0.32.0 (model_executor/models) and SGLang 0.5.23
    (srt/models).
    """
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


def check_rope_scaling(scaling: Mapping[str, object], facts: Architecture) -> Iterator[str]:
    """Refuse a model.rope_scaling that transformers or an engine would read otherwise than it is meant; one line for each mistake.

    Args:
        scaling: what the config gives.
        facts: of the model's own config.json.
    """
    rope_type = scaling.get("rope_type")
    if rope_type in LENGTH_DEPENDENT:
        yield (
            f"{KEY}.rope_type: {rope_type} depends on the length of the sequence at hand, so two packings of one batch would not "
            f"agree; use yarn"
        )
    elif rope_type not in NAMES:
        found = "is missing" if rope_type is None else f"{rope_type!r} is unknown; the nearest is {_nearest(str(rope_type), NAMES)}"
        yield f"{KEY}.rope_type: {found}; give one of {', '.join(NAMES)}"
    else:
        lines = [*_check_names(rope_type, scaling), *_check_values(scaling)]
        yield from lines or _check_together(scaling, facts)


def _nearest(name: str, names: Mapping[str, object] | tuple[str, ...]) -> str:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _check_names(rope_type: str, scaling: Mapping[str, object]) -> Iterator[str]:
    """Check that the names are exactly those of the type."""
    needed, optional = NAMES[rope_type]
    known = ("rope_type", *needed, *optional)
    for name in scaling:
        if name not in known:
            yield (
                f"{KEY}.{name}: is no name of rope_type {rope_type}; the nearest is {_nearest(str(name), known)}, all are "
                f"{', '.join(known)}"
            )
    for name in needed:
        if name not in scaling:
            yield f"{KEY}.{name}: is missing, and rope_type {rope_type} needs it; give {', '.join(needed)}"


def _check_values(scaling: Mapping[str, Any]) -> Iterator[str]:
    """Check that each value is of its type and in its range."""
    for name, value in scaling.items():
        if name == "rope_type":
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in SWITCHES:
            if not isinstance(value, bool):
                yield f"{KEY}.{name}: is {value!r}; give true or false"
        elif name in WHOLE_NUMBERS:
            if not is_number or value != int(value) or isinstance(value, float) or value < 1:
                yield f"{KEY}.{name}: is {value!r}; give a whole number of tokens ≥ 1"
        elif not is_number or not 0 < value < float("inf"):
            yield f"{KEY}.{name}: is {value!r}; give a number > 0"
        elif name == "factor" and value < 1:
            yield f"{KEY}.factor: is {value:g}, which would shorten the model's positions; give a number ≥ 1"


def _check_together(scaling: Mapping[str, Any], facts: Architecture) -> Iterator[str]:
    """Check that the values fit each other and the model."""
    for low, high, defaults in (("low_freq_factor", "high_freq_factor", (1, 4)), ("beta_slow", "beta_fast", (1, 32))):
        smaller, larger = scaling.get(low, defaults[0]), scaling.get(high, defaults[1])
        if smaller >= larger:
            yield f"{KEY}.{low}: {smaller:g} is not below {high} {larger:g}; give a smaller {low} or a larger {high}"
    if ("mscale" in scaling) != ("mscale_all_dim" in scaling):
        yield f"{KEY}.mscale: transformers reads mscale and mscale_all_dim only together; give both or neither"
    original, file = scaling.get(ORIGINAL), facts.path / "config.json"
    known, most = facts.original_positions, facts.max_positions
    if original is not None and known is not None and original != known:
        yield f"{KEY}.{ORIGINAL}: is {original}, and {file} says that the model was pretrained on {known}; give {known}"
    elif original is not None and original > most:
        yield f"{KEY}.{ORIGINAL}: is {original}, and {file} has max_position_embeddings {most}; give at most that"
    own = facts.rope_parameters
    left_out = [name for name in TEMPERATURES if own.get(name) is not None and name not in scaling]
    if scaling["rope_type"] == own["rope_type"] and left_out:
        values = " and ".join(f"{name} {own[name]}" for name in left_out)
        yield f"{KEY}: leaves out {values} of {file}, and without attention has another temperature; give {values} too"
