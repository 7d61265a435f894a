"""Carries out a plan with point-to-point messages of a torch.distributed process group, over gloo or NCCL."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megarl.errors import TransferError
from megarl.reshard.barrier import PROBLEMS_SHOWN, Barrier, first_line
from megarl.reshard.packed_messages import BucketWork, FlatPart, PackedMessage, bucket_work, digest
from megarl.reshard.plan.plan import Copy, Plan


class PointToPoint:
    """A plan bound to the ranks of a world. It can be carried out any number of times.

    A rank packs what it sends to a peer in one bucket into contiguous bytes with a digest (``PackedMessage``), so every dtype and
    device takes the same way. Staging buffers for the largest bucket are allocated once. Copies between the two sides of one rank
    go straight from tensor to tensor.

    All ranks meet before the first and after the last bucket. So a rank that is missing or holds the wrong tensors stops the
    transfer before anything is written, and what goes wrong on one rank later is raised on every rank. After an error
    the destination is partly written and must not be used.
    """

    def __init__(
        self,
        plan: Plan,
        source_ranks: Sequence[int],
        destination_ranks: Sequence[int],
        *,
        device: torch.device,
        timeout_seconds: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Allocate the buffers; collective over ``group``.

        Args:
            source_ranks: rank in the world of each source rank of the plan. The sides may be the same, overlap or be disjoint.
            destination_ranks: likewise.
            device: of the staging buffers: one that the group's backend sends from (CPU for gloo, CUDA for NCCL).
            timeout_seconds: for each bucket, and for all ranks to meet.
            group: the ranks that take part, those of both sides among them; None is the whole world.

        Raises:
            TransferError: the ranks have made different plans.
        """
        self._group = group or distributed_c10d._get_default_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._rank = dist.get_rank()
        self._device = device
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._barrier = Barrier(self._agree_on(plan, source_ranks, destination_ranks), self._group, device, timeout_seconds)
        self._buckets = bucket_work(plan, list(source_ranks), list(destination_ranks), self._rank)
        self._incoming = [packed for bucket in self._buckets for packed in bucket.incoming]
        self._send_buffer, self._receive_buffer = (
            torch.zeros(max((sum(p.num_bytes for p in side) for side in sides), default=0), dtype=torch.uint8, device=device)
            for sides in ([b.outgoing for b in self._buckets], [b.incoming for b in self._buckets])
        )

    @property
    def buffer_bytes(self) -> int:
        """Of the staging buffers of this rank."""
        return self._send_buffer.numel() + self._receive_buffer.numel()

    @property
    def bytes_received(self) -> int:
        """That this rank gets from others each time, digests included."""
        return sum(packed.num_bytes for packed in self._incoming)

    @torch.no_grad()
    def execute(self, source: Mapping[str, FlatPart], destination: Mapping[str, FlatPart]) -> None:
        """Move everything; collective over the group.

        Args:
            source: this rank's parameters on the source side by name; empty where it has none.
            destination: likewise, written in place.

        Raises:
            TransferError: a rank is missing, died, was too slow or holds other tensors than planned, or bytes arrived changed.
        """
        self._barrier.wait("start of a transfer", self._misfit(source, destination))
        wrong = torch.zeros(len(self._incoming), dtype=torch.bool, device=self._device)
        arrived = 0
        for bucket in self._buckets:
            for packed in bucket.outgoing:
                self._pack(packed, source)
            works = self._post(bucket)
            for copy in bucket.local:
                region = destination[copy.destination_parameter].region(copy.destination)
                region.copy_(source[copy.source_parameter].region(copy.source))
            for work, packed_messages in works:
                self._wait(work, packed_messages)
            for packed in bucket.incoming:
                wrong[arrived] = self._unpack(packed, destination)
                arrived += 1
        changed = [packed for packed, is_wrong in zip(self._incoming, wrong.tolist(), strict=True) if is_wrong]
        problems = [f"what rank {packed.peer} sent to rank {self._rank} in {packed} arrived changed" for packed in changed]
        self._barrier.wait("end of a transfer", "; ".join(problems[:PROBLEMS_SHOWN]))

    def _agree_on(self, plan: Plan, source_ranks: Sequence[int], destination_ranks: Sequence[int]) -> str:
        """Check that all ranks have the same plan; returns a name for this transfer that no other has."""
        hashed = hashlib.blake2b(repr((list(source_ranks), list(destination_ranks))).encode())
        for column in (plan.overlaps, plan.first_overlap, plan.chunk, plan.sender, plan.receiver, plan.bucket):
            hashed.update(column.tobytes())
        entries: list[tuple[str, str]] = [("", "")] * len(self._ranks)
        dist.all_gather_object(entries, (hashed.hexdigest(), uuid4().hex), self._group)
        others = [rank for rank, (fingerprint, _) in zip(self._ranks, entries, strict=True) if fingerprint != entries[0][0]]
        if others:
            raise TransferError(
                f"ranks {others} have made another reshard plan than rank {self._ranks[0]}; "
                "every rank must be given the same model, layouts and bucket size"
            )
        return entries[0][1]

    def _misfit(self, source: Mapping[str, FlatPart], destination: Mapping[str, FlatPart]) -> str:
        """Return what this rank lacks or has in another dtype than the plan says; empty when all fits."""
        for bucket in self._buckets:
            for copies, sides in (
                ([copy for packed in bucket.outgoing for copy in packed.copies], ("source",)),
                ([copy for packed in bucket.incoming for copy in packed.copies], ("destination",)),
                (bucket.local, ("source", "destination")),
            ):
                for copy in copies:
                    for side in sides:
                        misfit = _misfit(copy, side, source if side == "source" else destination)
                        if misfit:
                            return f"rank {self._rank} {misfit}"
        return ""

    def _pack(self, packed: PackedMessage, source: Mapping[str, FlatPart]) -> None:
        regions = [source[copy.source_parameter].region(copy.source) for copy in packed.copies]
        torch._foreach_copy_(packed.staged(self._send_buffer, regions), regions)
        words = packed.bytes_of(self._send_buffer).view(torch.int64)
        words[-1] = digest(words[:-1])

    def _unpack(self, packed: PackedMessage, destination: Mapping[str, FlatPart]) -> Tensor:
        """Write what has arrived; True (on the device) when it is not what was sent."""
        words = packed.bytes_of(self._receive_buffer).view(torch.int64)
        regions = [destination[copy.destination_parameter].region(copy.destination) for copy in packed.copies]
        torch._foreach_copy_(regions, packed.staged(self._receive_buffer, regions))
        return digest(words[:-1]) != words[-1]

    def _post(self, bucket: BucketWork) -> list[tuple[dist.Work, list[tuple[str, PackedMessage]]]]:
        """Start the sends and receives of a bucket; returns what to wait for, and what each of these moves."""
        operations = [
            (dist.P2POp(call, packed.bytes_of(buffer), packed.peer, self._group), (verb, packed))
            for call, verb, buffer, packed_messages in (
                (dist.irecv, "receive from", self._receive_buffer, bucket.incoming),
                (dist.isend, "send to", self._send_buffer, bucket.outgoing),
            )
            for packed in packed_messages
        ]
        # NCCL's must be started together, or they wait for each other
        batches = [operations] if self._device.type == "cuda" and operations else [[operation] for operation in operations]
        works = []
        for batch in batches:
            packed_messages = [packed for _, packed in batch]
            try:
                started = dist.batch_isend_irecv([operation for operation, _ in batch])
            except RuntimeError as error:
                raise self._failure(packed_messages, error) from error
            works += [(work, packed_messages) for work in started]
        return works

    def _wait(self, work: dist.Work, packed_messages: list[tuple[str, PackedMessage]]) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._failure(packed_messages, error) from error

    def _failure(self, packed_messages: list[tuple[str, PackedMessage]], error: RuntimeError) -> TransferError:
        moves = ", ".join(f"{verb} rank {packed.peer} {packed}" for verb, packed in packed_messages[:PROBLEMS_SHOWN])
        return TransferError(
            f"rank {self._rank} could not {moves} within {self._timeout.total_seconds():g} s: {first_line(error)}; "
            "see whether that rank has died, or allow more time"
        )


def _misfit(copy: Copy, side: str, parts: Mapping[str, FlatPart]) -> str:
    name = copy.source_parameter if side == "source" else copy.destination_parameter
    rows, columns = copy.source if side == "source" else copy.destination
    if name not in parts:
        return f"has no {name} on the {side} side, where the plan says that it has"
    part, elements = parts[name], (rows.stop - rows.start) * (columns.stop - columns.start)
    first = rows.start * part.columns + columns.start - part.start
    last = (rows.stop - 1) * part.columns + columns.stop - part.start
    if first < 0 or last > part.values.numel() or part.values.element_size() * elements != copy.num_bytes:
        return f"has {name} on the {side} side as {part.values.numel()} numbers of {part.values.dtype}, which the plan does not fit"
    return ""
