"""The reshard plan: which rank sends which part of which parameter to which rank, where it goes there, and in which order.

A plan is arithmetic over two layouts and a weight map: no process group, no tensor. Whatever carries it out, on every rank:

- goes through the buckets in order and, within one, posts its receives and sends, waits for them and writes what came. Every bucket
  lists the same messages on both their ranks and no rank waits for a later bucket, so nothing can wait in a circle.
- or, with calls that block, handles its messages in the order of ``messages``, as a sender or as a receiver. All ranks follow one
  order, so both ends of the first message that is not done have nothing left to wait for.

In a bucket a rank sends at most ``bucket_bytes`` and receives at most as many: with buffers for one bucket, that is the memory
needed beside the parameters. Zero rows that pad a vocabulary are in no message; they are zero on both sides from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megarl.config.schema import ModelConfig, ParallelConfig
from megarl.errors import ConfigError
from megarl.families.base.engine_rules import EngineLayout
from megarl.families.registry import read_architecture
from megarl.models.build import use_transformer_engine
from megarl.models.transformer_config import DTYPES
from megarl.parallel.axis_sizes import axis_sizes
from megarl.reshard.plan.balance import Machines, choose_senders, least_worst_load
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.overlaps import chunks, find_overlaps, overlap_bytes, split
from megarl.reshard.plan.shard_layout import ShardLayout, TensorTable, megatron_shard_layout, optimizer_table, tensor_table
from megarl.weights.mapping import build_weight_map

FINENESS = 128  # overlaps are at most this part of a rank's mean share, so that shares can be made equal
OVERLAPS_PER_BUCKET = 16  # and this part of a bucket, so that buckets can be filled; a message is smaller than two such overlaps


@dataclass(frozen=True, slots=True)
class Copy:
    """Part of one parameter to part of another. Parameters are seen as matrices (``megarl.reshard.plan.shard_layout``).

    Attributes:
        tensor: the Hugging Face tensor it is part of.
        source_parameter, destination_parameter: names.
        source, destination: rows and columns there.
        num_bytes: of the part.
    """

    tensor: str
    source_parameter: str
    source: tuple[slice, slice]
    destination_parameter: str
    destination: tuple[slice, slice]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends to another at once: its copies, one after another."""

    bucket: int
    sender: int
    receiver: int
    num_bytes: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan:
    """All copies of a transfer, in columns: they may be tens of millions, and a message's copies are a run of overlaps that it
    shares with the messages to other ranks.

    Attributes:
        overlaps: of type OVERLAP, by chunks.
        first_overlap: [chunks + 1], where each chunk begins in ``overlaps``.
        chunk, sender, receiver, bucket, message_bytes: [messages], in order: by bucket, in a bucket by turns.
        bucket_bytes: most that a rank sends, or receives, in one bucket.
        least_worst_load: bytes that the worst sender must send whatever the choice of senders.
    """

    source: ShardLayout
    destination: ShardLayout
    tensors: TensorTable
    machines: Machines
    overlaps: NDArray[np.void]
    first_overlap: NDArray[np.int64]
    chunk: NDArray[np.int32]
    sender: NDArray[np.int32]
    receiver: NDArray[np.int32]
    bucket: NDArray[np.int32]
    message_bytes: NDArray[np.int64]
    bucket_bytes: int
    least_worst_load: float

    @property
    def num_copies(self) -> int:
        """Copies of all messages."""
        return int(np.diff(self.first_overlap)[self.chunk].sum())

    @property
    def num_buckets(self) -> int:
        """Number of buckets of all messages."""
        return int(self.bucket[-1]) + 1

    def messages(self) -> Iterator[Message]:
        """Yield all messages in order."""
        return self._messages(np.arange(len(self.bucket)))

    def for_sender(self, rank: int) -> Iterator[Message]:
        """Yield what source rank ``rank`` sends, in order."""
        return self._messages(np.flatnonzero(self.sender == rank))

    def for_receiver(self, rank: int) -> Iterator[Message]:
        """Yield what destination rank ``rank`` receives, in order."""
        return self._messages(np.flatnonzero(self.receiver == rank))

    def first_copies(self, number: int) -> Iterator[tuple[Message, Copy]]:
        """Yield the first ``number`` copies and the messages they are in."""
        return islice(((message, copy) for message in self.messages() for copy in message.copies), number)

    def _messages(self, numbers: NDArray[np.int64]) -> Iterator[Message]:
        tensors = list(self.tensors.numbers)
        for number in numbers.tolist():
            sender, receiver = int(self.sender[number]), int(self.receiver[number])
            chunk = self.chunk[number]
            rows = self.overlaps[self.first_overlap[chunk] : self.first_overlap[chunk + 1]]
            sizes = overlap_bytes(rows, self.tensors).tolist()
            copies = tuple(
                Copy(
                    tensor=tensors[overlap["tensor"]],
                    source_parameter=self.source.parameter_name(int(overlap["source_parameter"]), sender),
                    source=_region(overlap, "source"),
                    destination_parameter=self.destination.parameter_name(int(overlap["destination_parameter"]), receiver),
                    destination=_region(overlap, "destination"),
                    num_bytes=size,
                )
                for overlap, size in zip(rows, sizes, strict=True)
            )
            yield Message(int(self.bucket[number]), sender, receiver, int(self.message_bytes[number]), copies)


def _region(overlap: np.void, side: str) -> tuple[slice, slice]:
    row, column = int(overlap[f"{side}_row"]), int(overlap[f"{side}_column"])
    return slice(row, row + int(overlap["rows"])), slice(column, column + int(overlap["columns"]))


def turns(senders: NDArray[np.integer], receivers: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the numbers, [messages], by which ranks take turns: of the messages of one turn, no rank sends or receives two."""
    num_ranks = int(max(senders.max(), receivers.max())) + 1
    return (receivers.astype(np.int64) - senders) % num_ranks


def buckets(
    senders: NDArray[np.integer], receivers: NDArray[np.integer], message_bytes: NDArray[np.int64], capacity: int
) -> NDArray[np.int32]:
    """Return the bucket of each message, [messages], so that in a bucket no rank sends or receives more than ``capacity`` bytes.

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


def build_plan(source: ShardLayout, destination: ShardLayout, tensors: TensorTable, machines: Machines, bucket_bytes: int) -> Plan:
    """Plan a transfer; a function of its arguments alone.

    Args:
        tensors: that both sides were made with.
        bucket_bytes: most that a rank sends, or receives, in one bucket.

    Raises:
        ConfigError: a bucket cannot hold a message.
    """
    overlaps = find_overlaps(source, destination, len(tensors.shapes))
    num_receivers = destination.rank_sets.sizes
    needed = int((overlap_bytes(overlaps, tensors) * num_receivers[overlaps["destination_ranks"]]).sum())
    limit = max(1, min(needed // source.num_ranks // FINENESS, bucket_bytes // OVERLAPS_PER_BUCKET))
    overlaps = split(overlaps, tensors, limit)
    order, first_overlap = chunks(overlaps, overlap_bytes(overlaps, tensors), limit)
    overlaps = overlaps[order]
    chunk_bytes = np.add.reduceat(overlap_bytes(overlaps, tensors), first_overlap[:-1])
    if chunk_bytes.max() > bucket_bytes:
        raise ConfigError(f"buckets of {bucket_bytes} bytes cannot hold a row of {chunk_bytes.max()} bytes; use larger buckets")

    # a message for each chunk and each rank that needs it
    holders, receiving = (overlaps[name][first_overlap[:-1]] for name in ("source_ranks", "destination_ranks"))
    repeats = num_receivers[receiving]
    chunk = np.repeat(np.arange(len(holders), dtype=np.int32), repeats)
    within_set = np.arange(len(chunk)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    receivers = destination.rank_sets.ranks[destination.rank_sets.starts[receiving][chunk] + within_set]
    message_bytes = chunk_bytes[chunk]
    gpus = machines.destination_gpu(receivers)
    senders = choose_senders(source.rank_sets, holders[chunk], message_bytes, gpus, machines, source.num_ranks)
    bucket = buckets(senders, receivers, message_bytes, bucket_bytes)
    in_order = np.lexsort((chunk, turns(senders, receivers), bucket))
    bytes_of_set = np.bincount(holders, chunk_bytes * repeats, minlength=len(source.rank_sets.sizes))
    return Plan(
        source=source,
        destination=destination,
        tensors=tensors,
        machines=machines,
        overlaps=overlaps,
        first_overlap=first_overlap,
        chunk=chunk[in_order],
        sender=senders[in_order],
        receiver=receivers[in_order],
        bucket=bucket[in_order],
        message_bytes=message_bytes[in_order],
        bucket_bytes=bucket_bytes,
        least_worst_load=least_worst_load(source.rank_sets, bytes_of_set, source.num_ranks),
    )


def plan_transfer(
    model: ModelConfig,
    source: ParallelConfig,
    world_size: int,
    target: EngineLayout | ParallelConfig,
    machines: Machines,
    bucket_bytes: int,
    *,
    optimizer_state: bool = False,
) -> Plan:
    """Plan how a model gets from a Megatron layout to engines, or to another Megatron layout over the same ranks.

    Only the model's config.json is read.

    Args:
        optimizer_state: float32 tensors of the shapes of the parameters (a moment of Adam) instead of the weights.

    Raises:
        ConfigError: a layout does not divide the model or the world.
    """
    architecture = read_architecture(model.path)
    weight_map = build_weight_map(architecture, model.vocabulary_pad_multiple, use_transformer_engine(model.transformer_impl))
    tensors = optimizer_table(weight_map) if optimizer_state else tensor_table(weight_map, DTYPES[model.dtype].itemsize)
    held = megatron_shard_layout(weight_map, axis_sizes(source, world_size), tensors)
    if isinstance(target, EngineLayout):
        needed = engine_shard_layout(architecture, target, tensors)
    else:
        needed = megatron_shard_layout(weight_map, axis_sizes(target, world_size), tensors)
    return build_plan(held, needed, tensors, machines, bucket_bytes)
