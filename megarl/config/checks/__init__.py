"""Checks across keys, the model's config.json and the number of ranks, made before any process group exists.

Each check yields one line for each mistake: the values, the reason and the fix.
"""

from collections.abc import Iterator
from pathlib import Path

from megarl.config.checks.algorithm import GREEDY_ADVANTAGES
from megarl.config.checks.curriculum import check_curriculum
from megarl.config.checks.model import check_engine, check_rope_scaling
from megarl.config.checks.roles import Role, check_role
from megarl.config.checks.run import check_run
from megarl.config.models import ModelOfRun, critic_of, models_of, policy_of, reference_of
from megarl.config.redaction import check_not_redacted
from megarl.config.schema import Config
from megarl.config.stages import stages_of
from megarl.config.tokenizer_files import check_vocabulary
from megarl.errors import ConfigError
from megarl.families.base.architecture import Architecture
from megarl.families.registry import read_architecture


def check(config: Config, world_size: int) -> None:
    """Refuse a config that cannot run; with a curriculum, one of whose stages cannot.

    Args:
        config: the resolved config.
        world_size: ranks of the run.

    Raises:
        ConfigError: with each mistake.
    """
    failures = list(check_not_redacted(config)) or list(check_curriculum(config)) or list(_check_stages(config, world_size))
    if failures:
        raise ConfigError(*failures)


def _check_stages(config: Config, world_size: int) -> Iterator[str]:
    if config.curriculum is None:
        yield from _check_models_and_run(config, world_size)
        return
    said: set[str] = set()
    for stage in stages_of(config):
        new = [line for line in _check_models_and_run(stage.config, world_size) if line not in said]
        said.update(new)
        yield from (f"{stage.path} ({stage.name}): {line}" for line in new)


def _check_models_and_run(config: Config, world_size: int) -> list[str]:
    """Return the mistakes of a run without stages, or of one stage."""
    failures = list(check_run(config))
    try:
        own = read_architecture(config.model.path)
    except ConfigError as error:
        failures.append(f"model.path: {error}")
    else:
        failures += _check_models(config, own, world_size)
    return failures


def _check_models(config: Config, own: Architecture, world_size: int) -> Iterator[str]:
    """Check every model of the run; ``own`` are the facts of the policy's config.json without model.rope_scaling."""
    scaling = config.model.rope_scaling
    lines = [] if scaling is None else list(check_rope_scaling(scaling, own))
    if lines:
        yield from lines
        return
    facts = own if scaling is None else read_architecture(config.model.path, scaling)
    yield from check_vocabulary(config.model.tokenizer or config.model.path, facts.vocabulary_size)
    yield from _check_attention(config, facts)
    yield from _check_policy(config, facts, world_size)
    yield from _check_reference(config, facts, world_size)
    yield from _check_critic(config, facts, world_size)
    yield from _check_reward_model(config, facts, world_size)
    yield from _check_idle_ranks(config, world_size)


def _check_attention(config: Config, facts: Architecture) -> Iterator[str]:
    """Check that Transformer Engine's attention gets 16 bits, and heads of one width under context parallelism."""
    model = config.model
    if model.attention_impl == "megarl":
        return
    if model.transformer_impl == "local" or model.dtype == "float32":
        yield (
            f"model.attention_impl: transformer_engine takes bfloat16 and Transformer Engine's layers, not dtype {model.dtype} "
            f"with transformer_impl {model.transformer_impl}; change them, or use megarl"
        )
    if facts.mla is not None:
        yield f"model.attention_impl: transformer_engine is not supported for latent attention ({facts.family}); use megarl"


def _check_policy(config: Config, facts: Architecture, world_size: int) -> Iterator[str]:
    yield from check_role(_role(policy_of(config), facts), config, world_size)
    if config.model.init == "pretrained" and config.trains_reward_model:
        if not any(facts.path.glob("*.safetensors")):
            yield (
                f"model.path: {facts.path} has no *.safetensors file, and a reward model starts from those; give a Hugging Face "
                "folder (tools/convert/megatron_to_hf.py makes one)"
            )
    elif config.model.init == "pretrained" and not _has_weights(facts.path):
        yield f"model.path: {facts.path} has no *.safetensors file; give a folder with weights or set model.init to random"
    yield from check_engine(config, facts)
    for token_id in config.rollout.stop_token_ids:
        if not 0 <= token_id < facts.vocabulary_size:
            yield (
                f"rollout.stop_token_ids: token id {token_id} is outside the model's vocabulary of {facts.vocabulary_size}; "
                f"give ids from 0 to {facts.vocabulary_size - 1}"
            )


def _check_reference(config: Config, policy: Architecture, world_size: int) -> Iterator[str]:
    """Check the reference role, where one is needed that is not simply the policy's twin."""
    if config.reference is None or not config.has_reference:
        return
    reference = reference_of(config)
    if config.reference.path is None:
        yield from check_role(_role(reference, policy), config, world_size)
        return
    try:
        facts = read_architecture(reference.path)
    except ConfigError as error:
        yield f"reference.path: {error}"
        return
    yield from check_role(_role(reference, facts), config, world_size)
    if facts.vocabulary_size != policy.vocabulary_size:
        yield (
            f"reference.path: vocab_size {facts.vocabulary_size} of {facts.path} differs from the policy's "
            f"{policy.vocabulary_size}; it is compared token by token: give a reference with the policy's vocabulary"
        )
    if not _has_weights(facts.path):
        yield f"reference.path: {facts.path} has no *.safetensors file; give a folder with weights"


def _check_critic(config: Config, policy: Architecture, world_size: int) -> Iterator[str]:
    """Check the critic's role, where one learns."""
    if not config.learns_from_samples and config.critic is not None:
        yield f"critic: is given and kind {config.kind} has no critic; remove it"
    if not config.has_critic:
        return
    critic, facts = critic_of(config), policy
    if critic.path_key == "critic.path":
        try:
            facts = read_architecture(critic.path)
        except ConfigError as error:
            yield f"critic.path: {error}"
            return
        if facts.vocabulary_size != policy.vocabulary_size:
            yield (
                f"critic.path: vocab_size {facts.vocabulary_size} of {facts.path} differs from the "
                f"policy's {policy.vocabulary_size}; the critic reads the policy's tokens: give one with the policy's vocabulary"
            )
    if config.critic is not None:  # else the policy's layout, which is checked with the policy
        yield from check_role(_role(critic, facts), config, world_size)
    if not critic.is_random and not any(facts.path.glob("*.safetensors")):
        yield (
            f"critic.path: {facts.path} has no *.safetensors file, and a critic starts from those; give a Hugging Face folder "
            "(tools/convert/megatron_to_hf.py makes one)"
        )


def _check_reward_model(config: Config, policy: Architecture, world_size: int) -> Iterator[str]:
    """Check the reward model's role, and what cannot go with it."""
    reward_model = config.reward_model
    if reward_model is None:
        return
    if not config.learns_from_samples:
        yield f"reward_model: is given and kind {config.kind} has no rewards; remove it"
        return
    if config.algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling: is true with a reward_model, and groups are dropped by what the scorers say alone, before "
            "it scores; set it to false or remove reward_model"
        )
    if config.algorithm.advantage in GREEDY_ADVANTAGES:
        yield (
            f"algorithm.advantage: {config.algorithm.advantage} with a reward_model, which does not score the greedy responses; "
            "choose for example leave_one_out, or remove reward_model"
        )
    try:
        facts = read_architecture(reward_model.path)
    except ConfigError as error:
        yield f"reward_model.path: {error}"
        return
    yield from check_role(_role(models_of(config)["reward_model"], facts), config, world_size)
    if facts.vocabulary_size != policy.vocabulary_size:
        yield (
            f"reward_model.path: vocab_size {facts.vocabulary_size} of {facts.path} differs from the policy's "
            f"{policy.vocabulary_size}; it reads the policy's tokens: give one with the policy's vocabulary"
        )
    if not any(facts.path.glob("*.safetensors")):
        yield f"reward_model.path: {facts.path} has no *.safetensors file; give a Hugging Face folder with weights"


def _check_idle_ranks(config: Config, world_size: int) -> Iterator[str]:
    """Check that every rank has a part of some model of the run."""
    ranks = [model.role.ranks(world_size) for model in models_of(config).values()]
    idle = sorted(set(range(world_size)).difference(*ranks))
    if idle and all(0 <= part.start < part.stop <= world_size for part in ranks):  # else check_ranks says what is wrong
        yield (
            f"policy.num_ranks: rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of a world of {world_size} would have no "
            "part of any model; start fewer ranks, or change first_rank and num_ranks of the models"
        )


def _role(model: ModelOfRun, facts: Architecture) -> Role:
    return Role(name=model.name, path_key=model.path_key, config=model.role, facts=facts)


def _has_weights(folder: Path) -> bool:
    """Return whether it holds safetensors, or a Megatron checkpoint as ``tools/convert/hf_to_megatron.py`` writes it."""
    return any(folder.glob("*.safetensors")) or (folder / ".metadata").is_file()
