"""An endless, exactly resumable order over the rows of one task, and what is known of how hard each row is."""

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy

from megarl.config.schema import SamplingConfig
from megarl.errors import CheckpointError, quoted


def seeded_random(*numbers: int) -> numpy.random.RandomState:
    """Return random numbers that depend on ``numbers`` alone, for ever: RandomState's stream is frozen by NumPy's policy (NEP 19),
    and Generator's may change between versions."""
    return numpy.random.RandomState(numpy.random.MT19937(numpy.random.SeedSequence(list(numbers))))


def draw_by_weight(random: numpy.random.RandomState, weights: numpy.ndarray, left_out: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` different indices in proportion to their weights, which are above 0 or NaN for those never drawn.

    Taking the smallest Exponential(1) / weight is drawing one after the other without replacement (Efraimidis and Spirakis 2006,
    with logarithms of their keys).
    """
    keys = random.exponential(size=len(weights)) / weights
    keys[list(left_out)] = numpy.nan
    num_left = int((~numpy.isnan(keys)).sum())
    return [int(index) for index in numpy.argsort(keys, kind="stable")[: min(count, num_left)]]


class SuccessRates:
    """How well the policy solves each row: an exponential average over its groups, the newest weighing ``update``.

    An exponential average because the policy changes: what it could not do twenty groups ago says little about now.

    Args:
        num_rows: rows of the task.
        update: weight of the newest group, above 0 and at most 1.

    Attributes:
        rates: float32 [num_rows], shares of right responses, or mean rewards; NaN for rows that were never answered.
    """

    def __init__(self, num_rows: int, update: float) -> None:
        self.rates = numpy.full(num_rows, numpy.nan, dtype=numpy.float32)
        self._update = update

    def record(self, row: int, share: float) -> None:
        """Count one group, in which ``share`` of the responses were right, or the mean reward was so much."""
        rate = self.rates[row]
        self.rates[row] = share if numpy.isnan(rate) else rate + self._update * (share - rate)

    def state(self) -> str:
        """Return all rates as text: the float32 values, little-endian, compressed, in base64 (at most 5.4 bytes a row)."""
        return base64.b64encode(zlib.compress(self.rates.astype("<f4").tobytes())).decode("ascii")

    def restore(self, state: str) -> None:
        """Take the rates of ``state()``; the number of rows has been compared before."""
        self.rates = numpy.frombuffer(zlib.decompress(base64.b64decode(state)), dtype="<f4").astype(numpy.float32)


class RowSampler:
    """Row indices, pass after pass.

    Passes over all rows depend only on seed, task, difficulties and the number of the pass. With order prioritised the rows after
    the first pass are drawn, and depend on the success rates too: without replacement within one call, and never a row that was
    taken since the last ``record``, while others are left.

    Args:
        num_rows: rows of the task, at least 1.
        seed: of the run.
        settings: the order and its settings.
        task: number of the task in its mixture.
        difficulties: float64 [num_rows], larger for harder rows; None where no field gives them.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        settings: SamplingConfig,
        *,
        task: int = 0,
        difficulties: numpy.ndarray | None = None,
    ) -> None:
        assert num_rows > 0
        assert settings.order != "curriculum" or difficulties is not None
        self._identity: dict[str, Any] = {"num_rows": num_rows, "seed": seed, "order": settings.order}
        self._seed, self._task = seed, task
        self._settings = settings
        self._difficulties = difficulties if settings.order in ("curriculum", "prioritised") else None
        self.success = SuccessRates(num_rows, settings.success_update)
        self._epoch = 0
        self._position = 0
        self._pending: list[int] = []  # taken since the last record
        self._order = self._pass()

    def next(self, count: int) -> list[int]:
        """Return the next ``count`` indices; they may span passes."""
        indices: list[int] = []
        while len(indices) < count:
            missing = count - len(indices)
            if self._position == len(self._order) and not self._draws:
                self._epoch += 1
                self._position = 0
                self._order = self._pass()
            taken = self._draw(missing) if self._draws else self._order[self._position : self._position + missing]
            self._position += len(taken)
            indices.extend(taken)
            if self._settings.order == "prioritised":
                self._pending.extend(taken)
        return indices

    def record(self, shares: Sequence[tuple[int, float]]) -> None:
        """Count the groups of a step: row and share of right responses of each."""
        for row, share in shares:
            self.success.record(row, share)
        self._pending.clear()

    def state(self) -> dict[str, Any]:
        """Return where the sampler is, as JSON values."""
        position = {"epoch": self._epoch, "position": self._position, "pending": list(self._pending)}
        return {**self._identity, **position, "success": self.success.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state()`` was taken.

        Raises:
            CheckpointError: the state belongs to another number of rows, seed or order, or lacks an entry.
        """
        missing = self.state().keys() - state.keys()
        if missing:
            raise CheckpointError(
                f"the checkpoint's data position lacks {', '.join(sorted(missing))}; resume from an intact checkpoint"
            )
        for name, here in self._identity.items():
            if state[name] != here:
                raise CheckpointError(
                    f"the checkpoint was made with {name} = {state[name]} for data.train but this run has {here}; "
                    "resume with the data, seed and order of the interrupted run"
                )
        num_rows, position = int(self._identity["num_rows"]), state["position"]
        # beyond the rows of a pass a prioritised order draws
        most = float("inf") if self._settings.order == "prioritised" else num_rows
        numbers = [("epoch", state["epoch"], float("inf")), ("position", position, most)]
        numbers += [("pending", row, num_rows - 1) for row in state["pending"]]
        for name, value, largest in numbers:
            if type(value) is not int or not 0 <= value <= largest:
                raise CheckpointError(
                    f"the checkpoint's data {name} is {quoted(value)}, which is no place in {num_rows} rows; "
                    "resume from another checkpoint"
                )
        self._epoch, self._position, self._pending = state["epoch"], state["position"], list(state["pending"])
        self.success.restore(state["success"])
        self._order = self._pass()

    @property
    def _draws(self) -> bool:
        return self._settings.order == "prioritised" and self._position >= len(self._order)

    def _pass(self) -> list[int]:
        """Return the rows of the present pass in order."""
        num_rows = int(self._identity["num_rows"])
        if self._settings.order == "sequential":
            return list(range(num_rows))
        permutation = self._random(self._epoch).permutation(num_rows)
        if self._difficulties is not None:  # easy to hard; rows of equal difficulty stay shuffled
            permutation = permutation[numpy.argsort(self._difficulties[permutation], kind="stable")]
        return [int(row) for row in permutation]

    def _draw(self, count: int) -> list[int]:
        """Up to ``count`` different rows in proportion to their priorities."""
        if len(self._pending) >= len(self._order):
            self._pending.clear()
        priorities = numpy.maximum(1.0 - numpy.nan_to_num(self.success.rates, nan=0.0), self._settings.priority_floor)
        return draw_by_weight(self._random(self._epoch, self._position), priorities, self._pending, count)

    def _random(self, *draw: int) -> numpy.random.RandomState:
        # zeros at the end of a seed's numbers change nothing, so that a single source has the order of a first task
        first, *rest = draw
        return seeded_random(self._seed, first, self._task, *rest)


class TaskChooser:
    """Which task each prompt of a mixture is of; depends on the seed, the position and, when balanced, on what the step holds.

    Args:
        weights: one for each task, above 0.
        seed: of the run.
        balanced: equal numbers of each task in a step, in place of the weights.
    """

    _BLOCK = 1024  # prompts whose random numbers are made together

    def __init__(self, weights: Sequence[float], seed: int, *, balanced: bool) -> None:
        self._bounds = numpy.cumsum(weights) / numpy.sum(weights)
        self._bounds[-1] = 1.0  # above every draw, whatever the rounding
        self._seed = seed
        self._balanced = balanced

    def choose(self, position: int, count: int, held: Sequence[int]) -> list[int]:
        """Return the tasks' numbers of ``count`` prompts.

        Args:
            position: prompts taken before these.
            count: prompts wanted.
            held: prompts of each task that the step has already; only balanced looks at it.
        """
        if self._balanced:
            return self._evenly(position, count, held)
        return [self._drawn(draw) for draw in range(position, position + count)]

    def _evenly(self, position: int, count: int, held: Sequence[int]) -> list[int]:
        num_tasks = len(self._bounds)
        counts = list(held)
        chosen = []
        for draw in range(position, position + count):
            task = min(range(num_tasks), key=lambda number: (counts[number], (number - draw) % num_tasks))
            counts[task] += 1
            chosen.append(task)
        return chosen

    def _drawn(self, draw: int) -> int:
        if len(self._bounds) == 1:
            return 0
        block, offset = divmod(draw, self._BLOCK)
        # 2^31 keeps these numbers apart from those of the rows' orders, where a task's number stands
        draws = seeded_random(self._seed, block, 1 << 31).random_sample(self._BLOCK)
        return int(numpy.searchsorted(self._bounds, draws[offset], side="right"))
