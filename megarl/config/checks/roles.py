"""Checks of one role: its model can be built, its layout divides its ranks and the model, its micro-batches hold a sequence."""

from collections.abc import Iterator
from dataclasses import dataclass

from megarl.config.schema import Config, RoleConfig
from megarl.families.base.architecture import Architecture
from megarl.families.base.refusals import common_refusals
from megarl.families.base.rope_scaling import NAMES
from megarl.families.registry import family_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One model of the run.

    Attributes:
        name: its section in the config.
        path_key: the key that gives its model folder.
        config: its section.
        facts: its model.
    """

    name: str
    path_key: str
    config: RoleConfig
    facts: Architecture


def check_role(role: Role, config: Config, world_size: int) -> Iterator[str]:
    """Make all checks of one role; one line for each mistake."""
    yield from check_architecture(role)
    yield from check_ranks(role, world_size)
    yield from check_tensor_parallel(role)
    yield from check_pipeline_parallel(role)
    yield from check_context_parallel(role)
    yield from check_experts(role)
    yield from check_lengths(role, config)
    if role.name in ("reference", "reward_model") and role.config.offload == "optimizer":
        yield f"{role.name}.offload: is optimizer, and a frozen model has none; choose all, or none"
    if role.name in ("reference", "reward_model") and role.config.offload_activations:
        yield f"{role.name}.offload_activations: is true, and a frozen model keeps none; remove it"


def check_architecture(role: Role) -> Iterator[str]:
    """Check that the model uses only what MegaRL builds."""
    facts, where = role.facts, f"{role.path_key}: {role.facts.path / 'config.json'}"
    if facts.rope_type not in NAMES:
        fix = "set model.rope_scaling or give another model" if role.path_key == "model.path" else "give another model"
        yield f"{where}: rope_type {facts.rope_type!r} is not supported; supported are {', '.join(NAMES)}: {fix}"
    yield from (f"{where}: {line}" for line in (*common_refusals(facts), *family_of(facts.family).refusals(facts)))


def check_ranks(role: Role, world_size: int) -> Iterator[str]:
    """Check that the role's ranks exist, and the data parallel sizes over them are whole numbers."""
    first, count = role.config.first_rank, role.config.num_ranks
    if first >= world_size:
        yield f"{role.name}.first_rank: there is no rank {first} in a world of {world_size}; give at most {world_size - 1}"
    elif count is not None and first + count > world_size:
        yield (
            f"{role.name}.num_ranks: {count} ranks from rank {first} on reach beyond a world of {world_size}; "
            f"give at most {world_size - first}, or start more ranks"
        )
    else:
        yield from _check_sizes(role, world_size)


def _check_sizes(role: Role, world_size: int) -> Iterator[str]:
    """Check that both products of axes divide the number of ranks."""
    parallel, num_ranks = role.config.parallel, len(role.config.ranks(world_size))
    words = "world size" if num_ranks == world_size else "number of ranks"
    product = parallel.tp * parallel.pp * parallel.cp
    if num_ranks % product:
        above = (num_ranks // product + 1) * product
        fit = f"{above} ranks" if num_ranks < product else f"{above - product} or {above} ranks"
        yield (
            f"{role.name}.parallel: {words} {num_ranks} = tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} × dp ?: "
            f"{num_ranks} is not divisible by {product}; use {fit}, or smaller tp, pp or cp"
        )
    etp = parallel.etp or parallel.tp
    product = etp * parallel.ep * parallel.pp
    if role.facts.moe is not None and num_ranks % product:
        yield (
            f"{role.name}.parallel.ep: {words} {num_ranks} = etp {etp} × ep {parallel.ep} × pp {parallel.pp} × expert dp ?: "
            f"{num_ranks} is not divisible by {product}; use a smaller ep or etp, or {product} ranks"
        )


def check_tensor_parallel(role: Role) -> Iterator[str]:
    """Check that tp divides everything that it shards."""
    tp, facts = role.config.parallel.tp, role.facts
    sharded = {"num_attention_heads": facts.num_heads}
    if facts.mla is None:
        sharded["num_key_value_heads"] = facts.num_kv_heads
    if facts.moe is None or len(facts.moe.moe_layers) < facts.num_layers:
        sharded["intermediate_size"] = facts.ffn_size
    if facts.moe is not None and facts.moe.shared_ffn_size:
        sharded["n_shared_experts × moe_intermediate_size"] = facts.moe.shared_ffn_size
    for name, size in sharded.items():
        if size % tp:
            yield (
                f"{role.name}.parallel.tp: tp {tp} does not divide the model's {name} {size}; "
                f"tp must divide {', '.join(f'{key} {value}' for key, value in sharded.items())}"
            )
    if role.config.parallel.sequence_parallel and tp == 1:
        yield (
            f"{role.name}.parallel.sequence_parallel: is true with tp 1, and shards over the tp ranks; "
            "set it to false or tp to 2 or more"
        )
    needs = "latent attention" if facts.mla is not None else "experts" if facts.moe is not None else None
    if needs and tp > 1 and not role.config.parallel.sequence_parallel:
        yield (
            f"{role.name}.parallel.sequence_parallel: is false, and tp {tp} with {needs} ({facts.family}) needs it; set it to true"
        )


def check_pipeline_parallel(role: Role) -> Iterator[str]:
    """Check that all pipeline and virtual stages get as many layers, but for a first and last stage with their own numbers."""
    parallel, layers = role.config.parallel, role.facts.num_layers
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"{role.name}.parallel.vpp: vpp {parallel.vpp} needs pp 2 or more and pp is 1; set vpp to 1 or raise pp"
    ends = {
        name: number
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (number := getattr(parallel, name)) is not None
    }
    for name, number in ends.items():
        if parallel.pp == 1:
            yield f"{role.name}.parallel.{name}: is {number} and pp is 1, so there is one stage; remove it or raise pp"
        elif number % parallel.vpp:
            yield f"{role.name}.parallel.{name}: {number} layers do not divide into vpp {parallel.vpp} chunks; use a multiple"
    if not ends:
        yield from _check_equal_stages(role)
    elif parallel.pp > 1:
        remaining, stages = layers - sum(ends.values()), parallel.pp - len(ends)
        chunks = stages * parallel.vpp
        if remaining < chunks or (remaining % chunks if chunks else remaining):
            given = " and ".join(f"{name} {number}" for name, number in ends.items())
            yield (
                f"{role.name}.parallel.pp: the model's {layers} layers less {given} leave {remaining} for the other {stages} stages"
                f" of vpp {parallel.vpp} chunks, which is no equal share; change these numbers or pp {parallel.pp}"
            )


def _check_equal_stages(role: Role) -> Iterator[str]:
    parallel, layers = role.config.parallel, role.facts.num_layers
    chunks = parallel.pp * parallel.vpp
    if layers % chunks:
        yield (
            f"{role.name}.parallel.pp: the model's {layers} layers do not divide into pp {parallel.pp} × vpp {parallel.vpp} = "
            f"{chunks} equal chunks; choose pp × vpp among {_divisors(layers)}, or set num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage"
        )


def check_context_parallel(role: Role) -> Iterator[str]:
    """Check that exchanging heads takes whole heads, and hybrid the number of neighbours that do so."""
    parallel, facts, method = role.config.parallel, role.facts, role.config.parallel.context_parallel_method
    if (method == "hybrid") != (parallel.ulysses_size is not None):
        yield (
            f"{role.name}.parallel.ulysses_size: {parallel.ulysses_size} with context_parallel_method {method}; hybrid needs the "
            "number of neighbouring ranks that exchange heads, the other methods take none"
        )
        return
    if parallel.ulysses_size is not None and (parallel.cp % parallel.ulysses_size or parallel.cp == parallel.ulysses_size):
        yield (
            f"{role.name}.parallel.ulysses_size: {parallel.ulysses_size} does not leave a ring of cp {parallel.cp}; "
            "choose a smaller divisor of cp, or context_parallel_method: all_to_all"
        )
        return
    if parallel.cp == 1 or method not in ("all_to_all", "hybrid"):
        return
    name, size = ("ulysses_size", parallel.ulysses_size) if parallel.ulysses_size else ("cp", parallel.cp)
    heads, key_heads = facts.num_heads // parallel.tp, facts.num_kv_heads // parallel.tp
    if heads % size or (key_heads % size and size % key_heads):
        yield (
            f"{role.name}.parallel.{name}: {method} exchanges whole heads among {size} ranks, and with tp {parallel.tp} a rank has "
            f"{heads} query and {key_heads} key heads; choose a divisor of the query heads that divides the key heads or is a "
            "multiple of them, or context_parallel_method: ring"
        )


def check_experts(role: Role) -> Iterator[str]:
    """Check that ep divides the experts, and etp each of them."""
    parallel, experts = role.config.parallel, role.facts.moe
    if experts is None:
        for name, size in (("ep", parallel.ep), ("etp", parallel.etp or 1)):
            if size > 1:
                yield f"{role.name}.parallel.{name}: is {size}, but the model has no experts ({role.facts.family}); set it to 1"
        return
    etp = parallel.etp or parallel.tp
    if experts.num_experts % parallel.ep:
        yield (
            f"{role.name}.parallel.ep: ep {parallel.ep} does not divide the model's {experts.num_experts} experts; "
            f"choose among {_divisors(experts.num_experts)}"
        )
    if experts.ffn_size % etp:
        yield (
            f"{role.name}.parallel.etp: etp {etp} (tp when not given) does not divide the experts' width {experts.ffn_size}; "
            "choose a smaller etp"
        )


def check_lengths(role: Role, config: Config) -> Iterator[str]:
    """Check that the longest sequence fits into a micro-batch and into the model's positions."""
    step, rollout = config.step_size, config.rollout
    trained, trained_words = step.longest, step.longest_words
    end = int(role.name == "reward_model" or config.trains_reward_model)  # it reads one token behind the sequence
    if trained + end > role.config.max_tokens_per_micro_batch:
        yield (
            f"{role.name}.max_tokens_per_micro_batch: {role.config.max_tokens_per_micro_batch} tokens cannot hold the longest "
            f"sequence ({trained_words}); raise it or shorten the sequences"
        )
    used = [(trained, trained_words)]
    if config.samples_responses and not config.learns_from_samples:
        used.append((rollout.longest, rollout.longest_words))
    for tokens, words in used:
        window = role.facts.sliding_window
        if window is not None and tokens > window:
            yield (
                f"{words} exceed the sliding window of {window} tokens of {role.path_key} {role.facts.path}, and attention is over "
                "the whole sequence; shorten the sequences, or switch the window off in config.json"
            )
        if tokens > role.facts.max_positions:
            yield f"{words} exceed {_positions(role, config)}"


def _positions(role: Role, config: Config) -> str:
    """Return the model's positions, whose they are, and how there can be more."""
    number, scaling = role.facts.max_positions, config.model.rope_scaling
    if role.path_key != "model.path":
        whose, fix = f"{role.path_key} {role.facts.path}", "give a model with more positions"
    elif scaling is None:
        whose, fix = f"model.path {role.facts.path}", "give a model with more positions, or set model.rope_scaling"
    else:
        whose = f"model.path {role.facts.path} under model.rope_scaling"
        fix = "raise model.rope_scaling.factor" if "factor" in scaling else "choose another model.rope_scaling.rope_type"
    return f"max_position_embeddings {number} of {whose}; shorten the sequences or {fix}"


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
