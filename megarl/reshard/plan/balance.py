"""Which of the ranks that hold an overlap sends it: every rank its share, neighbours first."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarl.reshard.plan.shard_layout import RankSets


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Where the ranks of both sides are. Source rank r is GPU r.

    Attributes:
        gpus_per_node: GPU g is in node g // gpus_per_node.
        first_destination_gpu: destination rank r is GPU first_destination_gpu + r; 0 when both sides share their GPUs.
    """

    gpus_per_node: int
    first_destination_gpu: int = 0

    def destination_gpu(self, ranks: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the GPUs of destination ranks."""
        return ranks + self.first_destination_gpu


def choose_senders(
    holders: RankSets,
    holders_of_copy: NDArray[np.int32],
    copy_bytes: NDArray[np.int64],
    receiver_gpus: NDArray[np.integer],
    machines: Machines,
    num_senders: int,
) -> NDArray[np.int32]:
    """Choose the rank that sends each copy, [copies].

    Rank sets are served from the smallest to the largest. Each fills its ranks, which may have been given copies before, to one
    level, as water fills a vessel; where the sets are nested, as those of a layout are, no other choice has a lower highest
    level. Within the level of each rank, copies go to the receiver's own GPU, then to its node, then to the others.

    Args:
        holders_of_copy: [copies], the set whose ranks hold it.
        copy_bytes: [copies].
        receiver_gpus: [copies].
    """
    senders = holders.ranks[holders.starts[holders_of_copy]]
    sizes = holders.sizes
    alone = np.where(sizes[holders_of_copy] == 1, copy_bytes, 0)
    load = np.bincount(senders, alone, minlength=num_senders).astype(np.float64)
    several = np.flatnonzero(sizes[holders_of_copy] > 1)
    # one receiver's copies side by side, so that few ranks send to it
    several = several[np.lexsort((receiver_gpus[several], holders_of_copy[several]))]
    used, starts = np.unique(holders_of_copy[several], return_index=True)
    groups = dict(zip(used.tolist(), np.split(several, starts[1:]), strict=True)) if used.size else {}
    for number in sorted(groups, key=lambda number: (sizes[number], number)):
        copies, ranks = groups[number], holders[number]
        quota = _fill(load[ranks], float(copy_bytes[copies].sum()))
        chosen = _within_quota(ranks, quota, copy_bytes[copies], receiver_gpus[copies], machines.gpus_per_node)
        senders[copies] = chosen
        load += np.bincount(chosen, copy_bytes[copies], minlength=num_senders)
    return senders


def _fill(load: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """Return what each rank gets of ``amount`` so that all that get any reach the same level."""
    order = np.sort(load)
    level = (np.cumsum(order) + amount) / np.arange(1, len(order) + 1)
    # the first level that stays below the next rank's own load, else the last
    above = np.append(order[1:], np.inf)
    return np.maximum(level[np.argmax(level <= above)] - load, 0)


def _within_quota(
    ranks: NDArray[np.int32],
    quota: NDArray[np.float64],
    copy_bytes: NDArray[np.int64],
    receiver_gpus: NDArray[np.integer],
    gpus_per_node: int,
) -> NDArray[np.int32]:
    """Choose a rank for each copy, [copies]; no rank exceeds its quota by more than three copies."""
    chosen = np.full(len(copy_bytes), -1, dtype=np.int32)
    left = quota.copy()
    for level, destination in ((ranks, receiver_gpus), (ranks // gpus_per_node, receiver_gpus // gpus_per_node)):
        waiting = np.flatnonzero(chosen < 0)
        near = waiting[np.isin(destination[waiting], level)]
        near = near[np.argsort(destination[near], kind="stable")]
        by_level = np.argsort(level, kind="stable")
        ends = np.cumsum(left[by_level])
        start = _start_within(destination[near], copy_bytes[near])
        first = np.searchsorted(level[by_level], destination[near])
        last = np.searchsorted(level[by_level], destination[near], side="right") - 1
        position = start + ends[first] - left[by_level][first]
        fits = position < ends[last]
        index = by_level[np.searchsorted(ends, position[fits], side="right")]
        chosen[near[fits]] = ranks[index]
        left = np.maximum(left - np.bincount(index, copy_bytes[near[fits]], minlength=len(ranks)), 0)
    far = np.flatnonzero(chosen < 0)
    if far.size:
        middle = np.cumsum(copy_bytes[far]) - copy_bytes[far] / 2
        ends = np.cumsum(left if left.any() else np.ones(len(ranks)))
        index = np.searchsorted(ends, middle * (ends[-1] / copy_bytes[far].sum()), side="right")
        chosen[far] = ranks[np.minimum(index, len(ranks) - 1)]
    return chosen


def _start_within(groups: NDArray[np.integer], amounts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for sorted groups, the sum of the amounts of the same group that come before each."""
    before = np.cumsum(amounts) - amounts
    first = np.searchsorted(groups, groups)
    return before - before[first] if len(groups) else before


def least_worst_load(holders: RankSets, bytes_of_set: NDArray[np.int64], num_senders: int) -> float:
    """Return a bound in bytes that no choice of senders can be below: what only the ranks of some set hold must be sent by them.

    The sets looked at are those given, those that overlap put together, and all ranks. Where sets that overlap are nested (all
    but the embedding's when it is tied), some choice of senders for fine copies reaches the bound.

    Args:
        bytes_of_set: [sets], bytes to be sent that the ranks of each set hold.
    """
    used: list[int] = np.flatnonzero(bytes_of_set).tolist()
    together = np.arange(num_senders)  # of each rank, the lowest rank of those put together
    for number in used:
        labels = np.unique(together[holders[number]])
        together[np.isin(together, labels)] = labels[0]
    in_set = np.zeros((len(used), num_senders), dtype=bool)
    for row, number in enumerate(used):
        in_set[row, holders[number]] = True
    in_set = np.concatenate([in_set, together == np.unique(together)[:, None], np.ones((1, num_senders), dtype=bool)])
    ranks = np.concatenate([holders[number] for number in used])
    sizes = holders.sizes[used]
    worst = 0.0
    for members in np.unique(in_set, axis=0):
        inside = np.add.reduceat(members[ranks], np.cumsum(sizes) - sizes, dtype=np.int64) == sizes
        worst = max(worst, float(bytes_of_set[used][inside].sum()) / int(members.sum()))
    return worst
