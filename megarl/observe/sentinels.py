"""Watches that speak up before a run is lost."""

from collections.abc import Callable

from megarl.config.schema import ObserveConfig
from megarl.errors import TrainingError
from megarl.types import PackedBatch, TokenOutputs


class Sentinels:
    """Watches the steps of an RL run; equal on every rank but for what ``warn`` does.

    Args:
        config: the limits.
        warn: called with one line when something needs a person's eye.
        first_entropy: the run's, where it is known from before.
    """

    def __init__(self, config: ObserveConfig, warn: Callable[[str], None], first_entropy: float | None) -> None:
        self._config = config
        self._warn = warn
        self._entropy_floor = EntropyFloor(config.min_entropy, config.min_entropy_share, first_entropy)
        self._has_compared_logprobs = False

    def check(self, packed: PackedBatch, outputs: TokenOutputs, *, version: int, step: int) -> dict[str, float]:
        """Compare the trainer's log-probabilities with the sampler's, and the entropy with its floor.

        Args:
            packed: of the step.
            outputs: of its tokens, before the updates.
            version: of the weights that gave ``outputs``.
            step: for warnings.

        Returns:
            ``logprob_gap_mean`` and ``logprob_gap_max`` (nats) over the tokens sampled by the weights of ``version``; nothing where
            no token is trained.

        Raises:
            TrainingError: as ``check_logprob_gap``.
        """
        if not packed.loss_mask.any():
            return {}
        entropy = float(outputs.entropies[packed.loss_mask].double().mean())
        # tokens of older weights have other log-probabilities, which says nothing of the setup
        is_current = packed.loss_mask & (packed.weight_versions == version)
        gap = (outputs.old - packed.sampler_logprobs).abs()[is_current].double()
        mean_gap, max_gap = (float(gap.mean()), float(gap.max())) if gap.numel() else (0.0, 0.0)
        first = not self._has_compared_logprobs
        self._has_compared_logprobs |= bool(is_current.any())
        gap_warning = check_logprob_gap(mean_gap, self._config.max_logprob_gap, step, first=first)
        for warning in (gap_warning, self._entropy_floor.check(entropy, step)):
            if warning:
                self._warn(f"warning: {warning}")
        return {"logprob_gap_mean": mean_gap, "logprob_gap_max": max_gap}


def check_logprob_gap(mean_gap: float, limit: float, step: int, *, first: bool) -> str | None:
    """Compare the trainer's log-probabilities of the sampled tokens with the sampler's.

    Args:
        mean_gap: mean of \\|trainer - sampler\\| over the response tokens, nats.
        limit: observe.max_logprob_gap.
        step: the step that the gap belongs to.
        first: True at the first step of a process, where a gap means a wrong setup.

    Returns:
        A warning of one line, or None.

    Raises:
        TrainingError: the gap is above the limit (or NaN) at the first step.
    """
    if mean_gap <= limit:
        return None
    line = (
        f"step {step}: trainer and sampler log-probabilities differ by {mean_gap:.4g} nats per token on average, above "
        f"observe.max_logprob_gap {limit:g}; has the engine other weights, dtype, RoPE, or another temperature or top-p in them?"
    )
    if first:
        raise TrainingError(f"{line} Compare with rollout.engine: embedded")
    return line


class EntropyFloor:
    """Warns when the mean token entropy falls below a floor, once for each fall.

    Args:
        floor: observe.min_entropy, nats; 0 never warns.
        share: observe.min_entropy_share: the floor is at least this share of the first entropy; 0 never warns.
        first: the run's first entropy, where it is known from before; else the first that is checked.
    """

    def __init__(self, floor: float, share: float = 0.0, first: float | None = None) -> None:
        self._floor = floor
        self._share = share
        self._first = first
        self._below = False

    def check(self, entropy: float, step: int) -> str | None:
        """Return a warning of one line when ``entropy`` (nats) has just fallen below the floor, else None."""
        first = self._first = entropy if self._first is None else self._first
        was_below, self._below = self._below, entropy < max(self._floor, self._share * first)
        if was_below or not self._below:
            return None
        is_absolute = entropy < self._floor
        floor = f"observe.min_entropy {self._floor:g}" if is_absolute else f"{self._share:g} of the run's first {first:.4g}"
        key = "" if is_absolute else " (observe.min_entropy_share)"
        return (
            f"step {step}: mean token entropy {entropy:.4g} nats is below {floor}{key}, the policy may be "
            "collapsing; raise algorithm.entropy_coefficient or algorithm.clip.high, or lower optimizer.learning_rate"
        )
