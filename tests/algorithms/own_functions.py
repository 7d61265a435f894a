"""What a user might plug in as ``module:function``."""

import torch

from megarl.algorithms.advantages import Advantage, AdvantageInput
from megarl.algorithms.surrogates import Surrogate, SurrogateInput
from megarl.config.schema import AlgorithmConfig

number = 3


def batch_median(inputs: AdvantageInput) -> torch.Tensor:
    returns = inputs.returns()
    return inputs.per_token(returns - returns.median())


def better_than_greedy(inputs: AdvantageInput) -> torch.Tensor:
    return inputs.per_token((inputs.returns() > inputs.greedy_rewards).double())


BETTER_THAN_GREEDY = Advantage(function=better_than_greedy, formula="1 where R > R_greedy, else 0", needs_greedy_response=True)


def infinite(inputs: AdvantageInput) -> torch.Tensor:
    return inputs.per_token(inputs.returns() * float("inf"))


def unclipped(inputs: SurrogateInput, config: AlgorithmConfig) -> Surrogate:
    never = torch.zeros_like(inputs.advantages, dtype=torch.bool)
    return Surrogate(loss=-inputs.log_ratio.exp() * inputs.advantages, clipped_low=never, clipped_high=never)


def no_surrogate(inputs: SurrogateInput, config: AlgorithmConfig) -> torch.Tensor:
    return inputs.advantages
