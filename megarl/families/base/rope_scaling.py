"""The RoPE scaling of a config.json: what it says, and the same config.json with another scaling in it."""

from collections.abc import Mapping
from typing import Any

# These depend on the length of the sequence at hand, so two packings of one batch would not agree.
LENGTH_DEPENDENT = ("dynamic", "longrope")
ORIGINAL = "original_max_position_embeddings"
# needed and optional names of each supported type, as transformers' modeling_rope_utils.py reads them
NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (("factor", ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}
WHOLE_NUMBERS, SWITCHES = (ORIGINAL,), ("truncate",)


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of RoPE, with ``rope_type`` always, and ``rope_theta`` where it is anywhere in the file.

    transformers 5 writes ``rope_parameters``, transformers 4 ``rope_scaling`` with ``rope_type`` or, older still, ``type``; where
    both are given, transformers 5 takes the latter.
    """
    parameters = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    older_type = parameters.pop("type", None)
    parameters["rope_type"] = str(parameters.get("rope_type") or older_type or "default")
    if parameters.get("rope_theta") is None and raw.get("rope_theta") is not None:
        parameters["rope_theta"] = raw["rope_theta"]
    return parameters


def stated_original(raw: Mapping[str, Any]) -> int | None:
    """Positions that the model was pretrained on, where its config.json states them beside ``max_position_embeddings``."""
    stated = raw.get(ORIGINAL) or rope_parameters(raw).get(ORIGINAL)
    return None if stated is None else int(stated)


def normalised(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked scaling with its numbers as the engines need them: vLLM takes no whole number for linear's factor."""
    as_it_is = ("rope_type", *WHOLE_NUMBERS, *SWITCHES)
    return {name: value if name in as_it_is else float(value) for name, value in scaling.items()}


def with_scaling(raw: Mapping[str, object], scaling: Mapping[str, object]) -> dict[str, Any]:
    """Return a config.json with another scaling in place of its own.

    ``rope_theta`` stays. ``max_position_embeddings`` becomes what the scaling reaches (see ``_reach``).

    Args:
        raw: the config.json.
        scaling: checked by ``config/checks/model.py``.
    """
    parameters, theta = normalised(scaling), rope_parameters(raw).get("rope_theta")
    scaled = {name: value for name, value in raw.items() if name not in ("rope_scaling", "rope_parameters")}
    scaled["max_position_embeddings"] = _reach(raw, parameters)
    scaled["rope_parameters"] = parameters
    if parameters["rope_type"] != "default":
        scaled["rope_scaling"] = dict(parameters)  # transformers 4 reads this one, and rope_theta beside it
    if theta is not None:
        scaled["rope_parameters"] = parameters | {"rope_theta": theta}
        scaled["rope_theta"] = theta
    return scaled


def _reach(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    """Positions under a scaling, ``factor`` times those of pretraining.

    YaRN has exactly these, also where config.json had more: vLLM makes a table of no more, and SGLang's fused kernel for Qwen3-MoE
    takes ``max_position_embeddings`` / original for the factor. Other types never have fewer than config.json: Llama 3.1 itself
    has twice 8 × 8192.
    """
    own, own_positions = rope_parameters(raw), int(raw["max_position_embeddings"])
    stretched = float(own.get("factor") or 1.0) if own["rope_type"] == "linear" else 1.0
    original = scaling.get(ORIGINAL) or stated_original(raw) or int(own_positions / stretched)
    if scaling["rope_type"] == "default":
        return int(original)
    reached = int(scaling["factor"] * original)
    return reached if scaling["rope_type"] == "yarn" else max(own_positions, reached)
