"""megatron-core's queue of write results, kept by a process that costs little and ends with its rank."""

import pickle
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megarl.death_signal import end_with_parent_alone


class BytesQueue:
    """A manager's queue that carries bytes: results have torch's classes, which the manager's process would import for seconds."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, result: Any) -> None:
        """Add a result."""
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        """The oldest result; queue.Empty when there is none."""
        return pickle.loads(self._queue.get_nowait())


def start_result_queue() -> None:
    """Start the queue, whose process ends with this rank even when that is killed."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(end_with_parent_alone)
        filesystem_async._results_queue = BytesQueue(manager.Queue())
