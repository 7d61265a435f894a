"""What a plan costs: bytes by rank and by link, balance, memory and time."""

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megarl.reshard.plan.plan import Plan


class Link(IntEnum):
    """What lies between the sender of a message and its receiver."""

    GPU = 0  # nothing: both are on one GPU
    NODE = 1  # the links within a node
    NETWORK = 2  # the network between nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeeds:
    """Of one GPU, each way, in bytes per second. Copies within a GPU count as free."""

    within_node: float
    between_nodes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What a plan costs.

    Attributes:
        bytes_needed: of all parts that destination ranks hold, summed over the ranks.
        bytes_sent: of all messages.
        sent, received: [ranks, links], bytes.
        least_worst_load: bytes that the worst sender must send whatever the choice of senders.
        copies, messages, buckets: how many.
        send_buffer, receive_buffer: most bytes that any rank sends or receives in one bucket.
        seconds: with each bucket as slow as its slowest rank, sending and receiving at the same time.
        least_seconds: of the busiest rank alone; no order of the same messages is faster.
    """

    bytes_needed: int
    bytes_sent: int
    sent: NDArray[np.int64]
    received: NDArray[np.int64]
    least_worst_load: float
    copies: int
    messages: int
    buckets: int
    bucket_bytes: int
    send_buffer: int
    receive_buffer: int
    seconds: float
    least_seconds: float

    @property
    def worst_over_mean(self) -> float:
        """Bytes of the worst sender over those of the mean one."""
        return float(self.sent.sum(axis=1).max() / self.sent.sum(axis=1).mean())

    @property
    def least_worst_over_mean(self) -> float:
        """What that ratio is at least, whatever the choice of senders."""
        return float(self.least_worst_load / self.sent.sum(axis=1).mean())


def report(plan: Plan, speeds: LinkSpeeds) -> PlanReport:
    """Add a plan up."""
    boxes = plan.destination.boxes
    box_bytes = boxes["rows"].astype(np.int64) * boxes["columns"] * plan.tensors.element_sizes[boxes["tensor"]]
    links = links_of(plan)
    send_seconds, receive_seconds, send_buffer, receive_buffer = _by_bucket(plan, links, speeds)
    return PlanReport(
        bytes_needed=int((box_bytes * plan.destination.rank_sets.sizes[boxes["rank_set"]]).sum()),
        bytes_sent=int(plan.message_bytes.sum()),
        sent=_by_link(plan.sender, links, plan.message_bytes, plan.source.num_ranks),
        received=_by_link(plan.receiver, links, plan.message_bytes, plan.destination.num_ranks),
        least_worst_load=plan.least_worst_load,
        copies=plan.num_copies,
        messages=len(plan.chunk),
        buckets=plan.num_buckets,
        bucket_bytes=plan.bucket_bytes,
        send_buffer=send_buffer,
        receive_buffer=receive_buffer,
        seconds=float(np.maximum(send_seconds.max(axis=1), receive_seconds.max(axis=1)).sum()),
        least_seconds=float(max(send_seconds.sum(axis=0).max(), receive_seconds.sum(axis=0).max())),
    )


def links_of(plan: Plan) -> NDArray[np.int8]:
    """Return the Link of each message, [messages]."""
    receivers = plan.machines.destination_gpu(plan.receiver)
    node = plan.machines.gpus_per_node
    links = np.where(plan.sender // node == receivers // node, Link.NODE, Link.NETWORK)
    return np.where(plan.sender == receivers, Link.GPU, links).astype(np.int8)


def _by_link(
    ranks: NDArray[np.int32], links: NDArray[np.int8], message_bytes: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    sums = np.bincount(ranks * len(Link) + links, message_bytes, minlength=num_ranks * len(Link))
    return sums.astype(np.int64).reshape(num_ranks, len(Link))


def _by_bucket(
    plan: Plan, links: NDArray[np.int8], speeds: LinkSpeeds
) -> tuple[NDArray[np.float64], NDArray[np.float64], int, int]:
    """Return the seconds of sending and of receiving, [buckets, ranks], and the most bytes of both."""
    seconds = plan.message_bytes * np.array([0, 1 / speeds.within_node, 1 / speeds.between_nodes])[links]
    starts = np.searchsorted(plan.bucket, np.arange(plan.num_buckets + 1))
    buffers, times = [0, 0], []
    for side, (ranks, count) in enumerate(((plan.sender, plan.source.num_ranks), (plan.receiver, plan.destination.num_ranks))):
        rows = np.zeros((plan.num_buckets, count))
        for bucket, (first, last) in enumerate(pairwise(starts)):
            rows[bucket] = np.bincount(ranks[first:last], seconds[first:last], minlength=count)
            buffers[side] = max(buffers[side], int(np.bincount(ranks[first:last], plan.message_bytes[first:last]).max()))
        times.append(rows)
    return times[0], times[1], buffers[0], buffers[1]
