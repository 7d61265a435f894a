"""What one rank does in each bucket of a plan, and how bytes are laid out between two ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megarl.reshard.plan.plan import Copy, Plan
from megarl.reshard.plan.shard_layout import as_matrix

ALIGNMENT = 8  # bytes; a view of a buffer as another dtype must start at a multiple of its item size
DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class FlatPart:
    """What a rank has of its part of a parameter: all elements, or a range of them in row-major order.

    Attributes:
        values: [length of the range], contiguous, a view of the storage that is read or written.
        columns: of the rank's part of the parameter, seen as a matrix.
        start: where the range begins.
    """

    values: Tensor
    columns: int
    start: int = 0

    def region(self, rows_columns: tuple[slice, slice]) -> Tensor:
        """Return a view, [rows, columns], of a region of the matrix that lies within the range."""
        rows, columns = rows_columns
        offset = rows.start * self.columns + columns.start - self.start
        size = (rows.stop - rows.start, columns.stop - columns.start)
        return self.values.as_strided(size, (self.columns, 1), self.values.storage_offset() + offset)


def flat_parts(tensors: Mapping[str, Tensor]) -> dict[str, FlatPart]:
    """Return the parameters as parts that are whole."""
    return {name: FlatPart(tensor.detach().view(-1), as_matrix(tensor.shape)[1]) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class PackedMessage:
    """What travels between this rank and a peer in one bucket: the copies of all their messages, then the digest.

    Attributes:
        bucket: number.
        peer: rank in the world.
        start: first byte in the staging buffer.
        copies: in the order of the plan.
        offsets: of the copies in the packed message, in bytes.
        num_bytes: with the digest.
    """

    bucket: int
    peer: int
    start: int
    copies: tuple[Copy, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def bytes_of(self, buffer: Tensor) -> Tensor:
        """Return the packed message's part of a staging buffer."""
        return buffer[self.start : self.start + self.num_bytes]

    def staged(self, buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return for each copy its part of the staging buffer, in the shapes and dtypes of ``like``."""
        data = self.bytes_of(buffer)
        return [
            data[offset : offset + copy.num_bytes].view(region.dtype).view(region.shape)
            for copy, offset, region in zip(self.copies, self.offsets, like, strict=True)
        ]

    def __str__(self) -> str:
        more = f" and {len(self.copies) - 1} more" if len(self.copies) > 1 else ""
        return f"bucket {self.bucket} ({self.copies[0].tensor}{more})"


def digest(words: Tensor) -> Tensor:
    """Sum of the bytes as int64 numbers (wrapping)."""
    return words.sum(dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class BucketWork:
    """What this rank sends, receives and copies within its own memory in one bucket."""

    outgoing: list[PackedMessage] = field(default_factory=list)
    incoming: list[PackedMessage] = field(default_factory=list)
    local: list[Copy] = field(default_factory=list)


def bucket_work(plan: Plan, source_ranks: Sequence[int], destination_ranks: Sequence[int], rank: int) -> list[BucketWork]:
    """Return for each bucket of a plan the work of one rank.

    Args:
        source_ranks: rank in the world of each source rank.
        destination_ranks: likewise.
        rank: in the world; it may be on either side, on both or on none.
    """
    work = [BucketWork() for _ in range(plan.num_buckets)]
    outgoing: list[dict[int, list[Copy]]] = [{} for _ in work]
    incoming: list[dict[int, list[Copy]]] = [{} for _ in work]
    if rank in source_ranks:
        for message in plan.for_sender(source_ranks.index(rank)):
            peer = destination_ranks[message.receiver]
            copies = work[message.bucket].local if peer == rank else outgoing[message.bucket].setdefault(peer, [])
            copies.extend(message.copies)
    if rank in destination_ranks:
        for message in plan.for_receiver(destination_ranks.index(rank)):
            peer = source_ranks[message.sender]
            if peer != rank:
                incoming[message.bucket].setdefault(peer, []).extend(message.copies)
    for bucket, (mine, sent, received) in enumerate(zip(work, outgoing, incoming, strict=True)):
        mine.outgoing.extend(_packed_messages(bucket, sent))
        mine.incoming.extend(_packed_messages(bucket, received))
    return work


def _packed_messages(bucket: int, copies_of_peer: dict[int, list[Copy]]) -> list[PackedMessage]:
    packed_messages, start = [], 0
    for peer, copies in sorted(copies_of_peer.items()):
        offsets, end = [], 0
        for copy in copies:
            offsets.append(end)
            end += -(-copy.num_bytes // ALIGNMENT) * ALIGNMENT
        packed_messages.append(PackedMessage(bucket, peer, start, tuple(copies), tuple(offsets), end + DIGEST_BYTES))
        start += end + DIGEST_BYTES
    return packed_messages
