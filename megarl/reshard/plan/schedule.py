"""The order of a plan: its messages are put into buckets."""

import numpy as np
from numpy.typing import NDArray


def turns(senders: NDArray[np.integer], receivers: NDArray[np.integer]) -> NDArray[np.int64]:
    """[messages], numbers by which ranks take turns: among messages of one turn, no rank sends twice or receives twice."""
    num_ranks = int(max(senders.max(), receivers.max())) + 1
    return (receivers.astype(np.int64) - senders) % num_ranks


def buckets(
    senders: NDArray[np.integer], receivers: NDArray[np.integer], message_bytes: NDArray[np.int64], capacity: int
) -> NDArray[np.int32]:
    """[messages], the bucket of each message, so that in a bucket no rank sends or receives more than ``capacity`` bytes.

    Turn by turn, each message goes into the first bucket that has room on both its ranks for the largest message.

    Args:
        message_bytes: [messages], each at most ``capacity``.
    """
    order = np.lexsort((senders, turns(senders, receivers)))
    full = capacity - int(message_bytes.max())
    num_ranks = int(max(senders.max(), receivers.max())) + 1
    room_to_send, room_to_receive = [-1] * num_ranks, [-1] * num_ranks  # bit b: room in bucket b
    sent: list[list[int]] = [[] for _ in range(num_ranks)]
    received: list[list[int]] = [[] for _ in range(num_ranks)]
    chosen = np.empty(len(order), dtype=np.int32)
    rows = zip(order.tolist(), senders[order].tolist(), receivers[order].tolist(), message_bytes[order].tolist(), strict=True)
    for message, sender, receiver, size in rows:
        room = room_to_send[sender] & room_to_receive[receiver]
        lowest = room & -room
        bucket = lowest.bit_length() - 1
        for amounts, rooms, rank in ((sent[sender], room_to_send, sender), (received[receiver], room_to_receive, receiver)):
            if len(amounts) <= bucket:
                amounts.extend([0] * (bucket + 1 - len(amounts)))
            amounts[bucket] += size
            if amounts[bucket] > full:
                rooms[rank] ^= lowest
        chosen[message] = bucket
    return chosen
