"""The environment's rewards beside the scorers'."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from megarl.errors import RewardError
from megarl.types import Rollout, ScoredRollout

PART = "environment"  # name of its part of the reward

logger = logging.getLogger(__name__)


class EpisodeScorer:
    """Adds an episode's reward to what the scorers give; an environment that failed is treated as a scorer that did.

    Args:
        score: the scorers.
        weight: factor of the episode's reward.
        on_failure: rewards.on_failure.
    """

    def __init__(self, score: Callable[[Rollout], Awaitable[ScoredRollout | None]], *, weight: float, on_failure: str) -> None:
        self._score = score
        self._weight = weight
        self._on_failure = on_failure

    async def score(self, rollout: Rollout) -> ScoredRollout | None:
        """The scored response; None when the environment or a scorer failed and ``on_failure`` is drop.

        With ``on_failure: zero`` an episode whose environment failed has no part of that name and adds 0, whatever rewards came
        before the failure.

        Raises:
            RewardError: the environment or a scorer failed and ``on_failure`` is stop.
        """
        episode = rollout.episode
        assert episode is not None
        line = rollout.environment_failure
        if line is not None:
            logger.warning("%s", line)
            if self._on_failure == "stop":
                raise RewardError(f"{line}; set rewards.on_failure to drop or zero to go on without it")
            if self._on_failure == "drop":
                return None
        scored = await self._score(rollout)
        if scored is None:
            return None
        if line is not None:
            return replace(scored, failures=(line, *scored.failures))
        parts = {**scored.parts, PART: episode.reward}
        return replace(scored, reward=scored.reward + self._weight * episode.reward, parts=parts)
