"""Training on preferences."""

from typing import Literal

from megarl.section import Section, key

REFERENCE_FREE = ("simpo", "orpo")


class PreferenceConfig(Section):
    """Training a policy (kind preference) or a reward model (kind reward_model) on pairs of responses."""

    loss: Literal["dpo", "ipo", "robust", "simpo", "orpo"] = key(
        "dpo",
        "-",
        "Of a policy: DPO (arXiv 2305.18290), IPO (2310.12036), robust DPO (2403.00409), SimPO (2405.14734) or ORPO (2403.07691).",
    )
    beta: float = key(
        0.1,
        "-",
        "How much log-probabilities count against the reference (dpo, robust: β; ipo: τ; simpo: β, where 2 is usual; orpo: λ).",
        gt=0,
    )
    label_smoothing: float = key(
        0.0,
        "-",
        "For dpo (conservative DPO) and robust: the share of the pairs that are labelled the wrong way round.",
        ge=0,
        lt=0.5,
    )
    simpo_margin: float | None = key(None, "-", "For simpo: γ, by which the chosen response is to be ahead.", ge=0)
    reward_margin: float = key(
        0.0, "-", "For kind reward_model: the chosen response's score is to be ahead by this (Llama 2, arXiv 2307.09288).", ge=0
    )
    reward_centering: float = key(
        0.0,
        "-",
        "For kind reward_model: factor of the squared sum of a pair's scores in the loss, which keeps their mean near 0 "
        "(arXiv 2312.09244).",
        ge=0,
    )
    pairs_per_step: int = key(32, "pairs", "Pairs in one optimizer step.", ge=1)
    max_tokens: int = key(
        2048, "tokens", "Longest prompt with one of its two responses; a longer one is an error that names it.", ge=2
    )

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a frozen model."""
        return self.loss not in REFERENCE_FREE
