"""Points at which all ranks wait for each other, so that what went wrong on one is known on every one."""

import datetime
import time

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarl.errors import TransferError

PROBLEMS_SHOWN = 3
VERDICT = "absent"  # key of the ranks that were found to be absent
ABSENCE_SECONDS = 60.0  # when a connection has broken, how long the ranks that live have to come, so that only the dead are named


class AbsentRankError(TransferError):
    """A rank did not come to a barrier."""


class Barrier:
    """The points of one transfer at which all its ranks wait for each other."""

    def __init__(self, name: str, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float) -> None:
        """Take a ``name`` that all ranks and no other transfer use, and a ``device`` that the group's backend reduces on."""
        self._name, self._group, self._device = name, group, device
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank()
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._number = 0

    def wait(self, where: str, problem: str) -> None:
        """Wait for all ranks, then raise on every rank what any of them has to report.

        Args:
            where: for messages, after "at the".
            problem: this rank's; empty for none.

        Raises:
            AbsentRankError: some rank did not come.
            TransferError: some rank has a problem.
        """
        self._number += 1
        deadline = time.monotonic() + self._timeout.total_seconds()
        previous, store = (
            dist.PrefixStore(f"{self._name}/{number}", distributed_c10d._get_process_group_store(self._group))
            for number in (self._number - 1, self._number)
        )
        found = torch.tensor(int(bool(problem)), device=self._device)
        try:
            store.set(str(self._rank), "here")
            previous.delete_key(str(self._rank))  # all have been there
            work = dist.all_reduce(found, dist.ReduceOp.MAX, self._group, async_op=True)
            work.wait(self._timeout)
        except RuntimeError as error:
            raise AbsentRankError(
                f"rank {self._rank} did not meet {self._absent(store, deadline)} at the {where} within "
                f"{self._timeout.total_seconds():g} s: {first_line(error)}; see whether it has died, or allow more time"
                + (f" ({problem})" if problem else "")
            ) from error
        if not found:
            return
        problems: list[str] = [""] * len(self._ranks)
        dist.all_gather_object(problems, problem, self._group)
        raise TransferError("; ".join([text for text in problems if text][:PROBLEMS_SHOWN]))

    def _absent(self, store: dist.Store, deadline: float) -> str:
        """Return the ranks that do not come to the barrier: one that is dead breaks connections at once.

        A rank that names them ends, which breaks the connections of others; these need not wait once more.
        """
        others = [rank for rank in self._ranks if rank != self._rank]
        left = datetime.timedelta(seconds=max(min(deadline - time.monotonic(), ABSENCE_SECONDS), 0.01))
        try:
            if not store.check([VERDICT]):
                try:
                    store.wait([str(rank) for rank in others], left)
                    return "some rank"
                except RuntimeError:
                    store.set(VERDICT, "ranks " + ", ".join(str(rank) for rank in others if not store.check([str(rank)])))
            return store.get(VERDICT).decode()
        except RuntimeError:  # rank 0, which serves the store, is gone
            return "some rank"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without gloo's general advice; its type where it has none."""
    return str(error).splitlines()[0].split(" This is typically")[0] if str(error) else type(error).__name__
