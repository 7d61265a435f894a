"""What must be moved, before it is said from which rank: the overlaps of the boxes of two sides."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megarl.reshard.plan.shard_layout import ShardLayout, TensorTable

OVERLAP = np.dtype(
    [
        ("tensor", np.int32),
        ("rows", np.int32),
        ("columns", np.int32),
        ("source_parameter", np.int32),
        ("source_row", np.int32),
        ("source_column", np.int32),
        ("source_ranks", np.int32),  # a rank set of the source: any of them can send it
        ("destination_parameter", np.int32),
        ("destination_row", np.int32),
        ("destination_column", np.int32),
        ("destination_ranks", np.int32),  # a rank set of the destination: each of them needs it
    ]
)
PAIRS_AT_ONCE = 1 << 21  # of boxes that are compared, to bound the memory


def find_overlaps(source: ShardLayout, destination: ShardLayout, num_tensors: int) -> NDArray[np.void]:
    """Find the overlaps (type OVERLAP) that make up every box of the destination, each once, in the order of its tensors.

    Args:
        num_tensors: both sides number the same tensors.
    """
    held = source.boxes[np.argsort(source.boxes["tensor"], kind="stable")]
    needed = destination.boxes[np.argsort(destination.boxes["tensor"], kind="stable")]
    count = np.bincount(held["tensor"], minlength=num_tensors)
    first = np.cumsum(count) - count
    overlaps = [_overlaps(held[left], needed[right]) for left, right in _pairs(first, count, needed["tensor"])]
    whole = np.concatenate(overlaps)
    elements = (whole["rows"].astype(np.int64) * whole["columns"]).sum()
    assert elements == (needed["rows"].astype(np.int64) * needed["columns"]).sum(), "the source lacks a part of the destination"
    return whole


def _pairs(
    first: NDArray[np.int64], count: NDArray[np.int64], tensors: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the indices of all pairs (box held, box needed) of the same tensor, some at a time."""
    ends = np.cumsum(count[tensors])
    start = 0
    while start < len(tensors):
        base = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + PAIRS_AT_ONCE, side="right")))
        repeats = count[tensors[start:stop]]
        offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield np.repeat(first[tensors[start:stop]], repeats) + offset, np.repeat(np.arange(start, stop), repeats)
        start = stop


def _overlaps(held: NDArray[np.void], needed: NDArray[np.void]) -> NDArray[np.void]:
    """Return the overlaps of boxes taken pairwise, empty ones left out."""
    row, column = np.maximum(held["row"], needed["row"]), np.maximum(held["column"], needed["column"])
    rows = np.minimum(held["row"] + held["rows"], needed["row"] + needed["rows"]) - row
    columns = np.minimum(held["column"] + held["columns"], needed["column"] + needed["columns"]) - column
    some = (rows > 0) & (columns > 0)
    overlaps = np.empty(int(some.sum()), dtype=OVERLAP)
    overlaps["tensor"], overlaps["rows"], overlaps["columns"] = held["tensor"][some], rows[some], columns[some]
    for name, boxes in (("source", held), ("destination", needed)):
        overlaps[f"{name}_parameter"] = boxes["parameter"][some]
        overlaps[f"{name}_row"] = (boxes["local_row"] + row - boxes["row"])[some]
        overlaps[f"{name}_column"] = (boxes["local_column"] + column - boxes["column"])[some]
        overlaps[f"{name}_ranks"] = boxes["rank_set"][some]
    return overlaps


def overlap_bytes(overlaps: NDArray[np.void], tensors: TensorTable) -> NDArray[np.int64]:
    """Return the bytes of each overlap, [overlaps]."""
    return overlaps["rows"].astype(np.int64) * overlaps["columns"] * tensors.element_sizes[overlaps["tensor"]]


def split(overlaps: NDArray[np.void], tensors: TensorTable, limit: int) -> NDArray[np.void]:
    """Cut overlaps by rows, so that none is larger than ``limit`` bytes or one row."""
    row_bytes = overlaps["columns"] * tensors.element_sizes[overlaps["tensor"]]
    rows_each = np.maximum(limit // row_bytes, 1)
    parts = -(-overlaps["rows"] // rows_each)
    cut = np.repeat(overlaps, parts)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(parts) - parts, parts)
    offset = number * np.repeat(rows_each, parts)
    cut["source_row"] += offset.astype(np.int32)
    cut["destination_row"] += offset.astype(np.int32)
    cut["rows"] = np.minimum(cut["rows"] - offset, np.repeat(rows_each, parts))
    return cut


def chunks(overlaps: NDArray[np.void], sizes: NDArray[np.int64], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put overlaps that the same ranks hold and the same ranks need into chunks, which travel as one message.

    Args:
        sizes: [overlaps], bytes.
        limit: a chunk ends where it has so many bytes; with its last overlap it may have more.

    Returns:
        [overlaps], the overlaps in the order of chunks; [chunks + 1], where each chunk begins there.
    """
    order = np.lexsort((overlaps["destination_ranks"], overlaps["source_ranks"]))
    ranks, sizes = overlaps[["source_ranks", "destination_ranks"]][order], sizes[order]
    is_first = np.append(True, ranks[1:] != ranks[:-1])
    before = np.cumsum(sizes) - sizes
    before -= np.repeat(before[is_first], np.diff(np.append(np.flatnonzero(is_first), len(overlaps))))
    is_first |= np.diff(before // limit, prepend=0) != 0
    return order, np.append(np.flatnonzero(is_first), len(overlaps))
