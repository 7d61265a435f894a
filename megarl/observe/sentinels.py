"""Watches that speak up before a run is lost."""

from megarl.errors import TrainingError


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
        """A warning of one line when ``entropy`` (nats) has just fallen below the floor, else None."""
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
