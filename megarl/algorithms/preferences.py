"""What training on preferences minimises: the loss of each pair of a chosen and a rejected response to the same prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.algorithms.objectives import Objective, ObjectiveFunction, TokenData
from megarl.config.schema import Config, PreferenceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """One choice.

    Attributes:
        function: called with what is compared of the chosen and the rejected responses, each float64 [pairs], differentiable, and
            the settings; gives float64 [pairs]. Compared is log π of the response's tokens, or log π - log π_ref where the loss has
            a reference.
        per_token: the mean over the response's tokens is compared, not the sum.
        formula: with x that comparison's difference, chosen less rejected, and its source.
    """

    function: Callable[[Tensor, Tensor, PreferenceConfig], Tensor]
    per_token: bool
    formula: str


def dpo(chosen: Tensor, rejected: Tensor, config: PreferenceConfig) -> Tensor:
    """Return DPO's loss (arXiv 2305.18290, equation 7), with label smoothing ε conservative DPO's.

    That is cross-entropy against labels that are wrong with probability ε (its authors' note "A note on DPO with noisy preferences
    & relationship to IPO", 2023).
    """
    logits, wrong = config.beta * (chosen - rejected), config.label_smoothing
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def robust(chosen: Tensor, rejected: Tensor, config: PreferenceConfig) -> Tensor:
    """Return robust DPO's loss (arXiv 2403.00409): over labels wrong with probability ε its mean is the loss of right ones."""
    logits, wrong = config.beta * (chosen - rejected), config.label_smoothing
    return (-(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)) / (1 - 2 * wrong)


def ipo(chosen: Tensor, rejected: Tensor, config: PreferenceConfig) -> Tensor:
    """Return the loss of IPO (arXiv 2310.12036, equation 17), on means over tokens as TRL's DPOTrainer takes them."""
    return (chosen - rejected - 1 / (2 * config.beta)).square()


def simpo(chosen: Tensor, rejected: Tensor, config: PreferenceConfig) -> Tensor:
    """Return the loss of SimPO (arXiv 2405.14734): no reference, means over tokens, and a margin γ."""
    assert config.simpo_margin is not None
    return -F.logsigmoid(config.beta * (chosen - rejected) - config.simpo_margin)


def orpo(chosen: Tensor, rejected: Tensor, config: PreferenceConfig) -> Tensor:
    """Return ORPO's loss (arXiv 2403.07691).

    It is the chosen response's mean negative log-likelihood, less λ times the log-sigmoid of the log of the odds ratio, with odds
    p / (1 - p) of p the geometric mean of the tokens' probabilities.
    """

    def log_odds(mean_logprob: Tensor) -> Tensor:
        # float32 rounds log-probs of nearly certain tokens to 0, where the odds would be infinite
        return mean_logprob - torch.log(-torch.expm1(mean_logprob.clamp(max=-1e-7)))

    return -chosen - config.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


PREFERENCE_LOSSES = {
    "dpo": PreferenceLoss(function=dpo, per_token=False, formula="-(1-ε) log σ(βx) - ε log σ(-βx) (2305.18290)"),
    "ipo": PreferenceLoss(function=ipo, per_token=True, formula="(x - 1/(2β))² (2310.12036)"),
    "robust": PreferenceLoss(function=robust, per_token=False, formula="(-(1-ε) log σ(βx) + ε log σ(-βx)) / (1-2ε) (2403.00409)"),
    "simpo": PreferenceLoss(function=simpo, per_token=True, formula="-log σ(βx - γ) (2405.14734)"),
    "orpo": PreferenceLoss(function=orpo, per_token=True, formula="-log π_chosen - β log σ(log odds ratio) (2403.07691)"),
}


def build_pair_objective(config: Config) -> ObjectiveFunction:
    """Return what a run on pairs minimises: of kind preference a policy's loss, of kind reward_model a reward model's."""
    return partial(reward_objective if config.trains_reward_model else preference_objective, config=config.preference)


def preference_objective(logprobs: Tensor, entropies: Tensor, data: TokenData, *, config: PreferenceConfig) -> Objective:
    """Sum the weighted losses of pairs; sequences 2i and 2i + 1 of the batch are the chosen and rejected response of pair i.

    A pair's weight is the sum of its tokens' weights, so each context parallel rank's loss has the share of the pair of which it
    holds the tokens, and the shares add up to the pair.

    Args:
        logprobs, entropies: float [tokens], differentiable.
        data: of the same tokens, with both sequences of every pair.
        config: the settings.
    """
    loss = PREFERENCE_LOSSES[config.loss]
    sequences = data.sequences
    log_ratios = logprobs.double()
    if data.reference_logprobs is not None:
        log_ratios = log_ratios - data.reference_logprobs.double()
    compared = sequences.totals(log_ratios)
    policy = sequences.totals(logprobs.detach())
    if loss.per_token:
        compared = compared / sequences.lengths
    pairs, weights = _pairs_here(data)
    chosen, rejected = compared[2 * pairs], compared[2 * pairs + 1]
    total = (loss.function(chosen, rejected, config) * weights).sum()
    metrics = _metrics(total, config.beta * chosen, config.beta * rejected, weights)
    metrics["chosen_logprob"] = (policy[2 * pairs] * weights).sum()
    metrics["rejected_logprob"] = (policy[2 * pairs + 1] * weights).sum()
    return Objective(total, metrics | {"entropy": entropies.detach().sum()})


def reward_objective(values: Tensor, data: TokenData, *, config: PreferenceConfig) -> Objective:
    """Sum the weighted Bradley-Terry negative log-likelihoods, -log σ(r_chosen - r_rejected - margin) (InstructGPT, arXiv
    2203.02155, equation 1; the margin is Llama 2's, 2307.09288), plus centering · (r_chosen + r_rejected)² (2312.09244).

    Args:
        values: float [tokens], differentiable: the score of each response at the one token of it that counts.
        data: of the same tokens, with both sequences of every pair.
        config: the settings.
    """
    scores = data.sequences.totals(values)
    pairs, weights = _pairs_here(data)
    chosen, rejected = scores[2 * pairs], scores[2 * pairs + 1]
    terms = -F.logsigmoid(chosen - rejected - config.reward_margin) + config.reward_centering * (chosen + rejected).square()
    total = (terms * weights).sum()
    return Objective(total, _metrics(total, chosen, rejected, weights))


def _pairs_here(data: TokenData) -> tuple[Tensor, Tensor]:
    """Return the numbers of the pairs of this rank's tokens, int64 [pairs], and their tokens' summed weights, float64 [pairs]."""
    pairs, of_tokens = (data.sequences.numbers // 2).unique(return_inverse=True)
    weights = torch.zeros(pairs.numel(), dtype=torch.float64, device=pairs.device)
    return pairs, weights.index_add_(0, of_tokens, data.weights.double())


def _metrics(loss: Tensor, chosen: Tensor, rejected: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the loss, and weighted sums over pairs of what their rewards, float64 [pairs], say."""
    chosen, rejected = chosen.detach(), rejected.detach()
    means = {
        "accuracy": (chosen > rejected).double(),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return {"loss": loss.detach()} | {name: (values * weights).sum() for name, values in means.items()}
