"""What collecting a step's groups gave, and what it took."""

from dataclasses import dataclass, field, fields

from megarl.types import RolloutGroup, Tickets


@dataclass(slots=True, kw_only=True)
class CollectStats:
    """What collecting took.

    Attributes:
        wall_seconds: from the first request to the last score.
        generating_seconds: wall time with at least one request at the engine; in the rest of ``wall_seconds`` responses were only
            scored or waited for their environments.
        generate_seconds: time at the engine, summed over requests.
        score_seconds: time in scorers, summed over responses.
        waves: rounds of prompts.
        dropped_unscored: groups dropped because a scorer or the environment failed and rewards.on_failure is drop.
        dropped_filtered: groups dropped by dynamic sampling for equal rewards.
        reused: groups of the step that waited from an earlier one.
        dropped_surplus: groups dropped because they waited longer than algorithm.max_surplus_age.
        surplus: groups that wait for the next step.
        retries: requests sent again.
        environment_failures: episodes whose environment failed, in dropped groups too.
        failures: one line for each failed request, scorer or environment.
    """

    wall_seconds: float = 0.0
    generating_seconds: float = 0.0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    waves: int = 0
    dropped_unscored: int = 0
    dropped_filtered: int = 0
    reused: int = 0
    dropped_surplus: int = 0
    surplus: int = 0
    retries: int = 0
    environment_failures: int = 0
    failures: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return the numbers by their names in the log."""
        numbers = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "failures"}
        return {f"rollout/{name}": float(value) for name, value in numbers.items()} | {
            "rollout/failures": float(len(self.failures))
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectResult:
    """What collecting one step gave.

    Attributes:
        groups: those to train on, in the order of their prompts; of balanced tasks in turn.
        filtered: those that dynamic sampling dropped for equal rewards.
        sampled: all that were sampled and scored now, filtered ones and those that wait for the next step included.
        stats: what it took.
        tickets: names of the groups where some outlive a step; None elsewhere.
    """

    groups: tuple[RolloutGroup, ...]
    filtered: tuple[RolloutGroup, ...]
    sampled: tuple[RolloutGroup, ...]
    stats: CollectStats
    tickets: Tickets | None
