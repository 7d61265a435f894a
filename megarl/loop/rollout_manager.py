"""Sampling and scoring as the loops see it: rank 0 does the work, every rank gets the batch."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config
from megarl.loop.collected import Collected
from megarl.loop.main_rank import broadcast_batch, broadcast_value
from megarl.loop.main_rank_rollouts import MainRankRollouts
from megarl.loop.prompts import Prompts
from megarl.loop.weight_sync import MainRankEngine, WeightSync, check_transport
from megarl.train.learner import Learner
from megarl.types import PackedBatch, RolloutGroup
from megarl.weights.checkpoint import DataState


class RolloutManager:
    """The collective face of MainRankRollouts: every rank calls every method.

    Args:
        config: the run, or its stage.
        tokenizer: of the policy.
        policy: whose weights the engine gets.
        warn: called with one line when something needs a person's eye.
        prompts: what is asked, on rank 0.
        with_greedy: also answer each training prompt greedily.

    Attributes:
        outlives_updates: whether responses may be in flight while weights change.
        phase: as what the timer counts ``collect``: ``generate``, or ``wait`` where generation runs beside training.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        policy: Learner,
        warn: Callable[[str], None],
        prompts: Prompts | None,
        *,
        with_greedy: bool,
    ) -> None:
        check_transport(config)
        shapes = policy.weight_map.hugging_face_shapes()
        main = None if prompts is None else MainRankRollouts(config, tokenizer, shapes, warn, prompts, with_greedy=with_greedy)
        self._main = main
        is_asynchronous = config.rollout.asynchronous is not None
        self.outlives_updates = is_asynchronous or config.rollout.partial is not None
        self.phase = "wait" if is_asynchronous else "generate"
        self._weight_sync = WeightSync(config, policy, MainRankEngine(main.engine, main.runner.run, warn) if main else None)

    def push_weights(self, version: int) -> None:
        """Give the policy's weights to the engine; afterwards every response reports ``version``."""
        self._weight_sync.push(version)

    def pause(self) -> None:
        """Let no request be at the engine before weights change: generation beside training waits for them or aborts them."""
        if self._main is not None:
            self._main.pause()

    def resume(self, version: int) -> None:
        """Let generation beside training go on with the weights of ``version``, which the engine has."""
        if self._main is not None:
            self._main.resume(version)

    def collect(self, step: int) -> Collected:
        """Sample and score the groups of one step of the run."""
        collected = None if self._main is None else self._main.collect(step)
        packed = broadcast_batch(None if collected is None else collected.packed, PackedBatch)
        reward_mean = broadcast_value(None if collected is None else collected.reward_mean)
        return collected or Collected(
            packed=packed, groups=(), metrics={}, score_seconds=0.0, tickets=None, reward_mean=reward_mean
        )

    def evaluate(self) -> tuple[dict[str, float], tuple[RolloutGroup, ...]]:
        """Answer the held-out prompts: metrics on every rank, groups on rank 0."""
        metrics, groups = (None, ()) if self._main is None else self._main.evaluate()
        return broadcast_value(metrics), groups

    def data_state(self) -> DataState:
        """Return the position in the prompts, what is known of them, and the groups that wait or were begun; on rank 0."""
        return DataState(position={}, pending=None) if self._main is None else self._main.data_state()

    def restore_data(self, state: DataState) -> None:
        """Go on from there.

        Raises:
            CheckpointError: groups were begun that this run would lose, or the groups or prompts are others.
        """
        if self._main is not None:
            self._main.restore_data(state)

    def close(self) -> None:
        """End the engine and the scorers."""
        if self._main is not None:
            self._main.close()
