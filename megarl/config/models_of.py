"""Which models a run builds, and whether it samples responses."""

from megarl.config.schema import Config


def models_of(config: Config) -> tuple[str, ...]:
    """Names of the sections of the models that the loops build, the policy first."""
    is_rl = config.kind == "rl"
    others = {
        "reference": has_reference(config),
        "reward_model": is_rl and config.reward_model is not None,
        "critic": is_rl and config.algorithm.advantage == "gae",
    }
    return ("policy", *(name for name, is_built in others.items() if is_built))


def has_reference(config: Config) -> bool:
    """Whether something is compared with the reference model."""
    match config.kind:
        case "rl":
            return config.algorithm.kl.place != "none" or config.observe.kl_reference
        case "preference":
            return config.preference.has_reference
    return False


def trains_on_pairs(config: Config) -> bool:
    """Whether rows of the data have a chosen and a rejected response."""
    return config.kind in ("preference", "reward_model")


def samples_responses(config: Config) -> bool:
    """Whether the policy answers prompts: to train on the answers, or only when SFT is evaluated."""
    return config.kind == "rl" or (config.kind == "sft" and config.evaluation.data is not None)
