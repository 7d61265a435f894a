"""Given responses to train on, alone or in pairs: rank 0 reads and packs them, every rank gets them."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from megarl.loop.main_rank import broadcast_batch, on_main_rank
from megarl.types import PackedBatch
from megarl.weights.checkpoint import DataState

Example = TypeVar("Example")


class ResumableSource(Protocol[Example]):
    """Gives examples without end, from a position that can be kept."""

    def take(self, count: int) -> list[Example]:
        """Return the next so many."""

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values."""

    def restore(self, state: dict[str, object]) -> None:
        """Go on from ``state()``."""


class Examples(Generic[Example]):
    """The training data of a run on given responses; every rank calls every method.

    Args:
        open_source: opens what gives the examples, on rank 0.
        pack: makes a batch of them.
    """

    def __init__(
        self, open_source: Callable[[], ResumableSource[Example]], pack: Callable[[Sequence[Example]], PackedBatch]
    ) -> None:
        self._source = on_main_rank(open_source)
        self._pack = pack

    def take(self, count: int) -> PackedBatch:
        """Return the next ``count`` examples as a batch."""
        return broadcast_batch(None if self._source is None else self._pack(self._source.take(count)), PackedBatch)

    def data_state(self) -> DataState:
        """Return the position in the data, on rank 0."""
        return DataState(position={} if self._source is None else self._source.state(), pending=None)

    def restore_data(self, state: DataState) -> None:
        """Go on from that position."""
        if self._source is not None:
            self._source.restore(state.position)
