"""The state of megatron-core's Adam, by global parameter name, and who holds which range of it.

Without the distributed optimizer a rank holds float32 moments (and, for 16-bit models, a float32 main copy) of all its parameters.
With it, every rank of a data parallel group holds a range of the flattened parameter (``DistributedOptimizer`` in
megatron/core/optimizer/distrib_optimizer.py). Both are ranges here, so that state moves from owner to owner and is never gathered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from numpy.typing import NDArray
from torch import Tensor

from megarl.reshard.packed_messages import FlatPart
from megarl.reshard.plan.shard_layout import BOX, RankSets, ShardLayout, as_matrix

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"  # the float32 parameter that Adam steps: a copy where the parameter is 16-bit, else the parameter itself
RANGE = np.dtype([("parameter", np.int32), ("start", np.int64), ("stop", np.int64)])


@dataclass(frozen=True, slots=True)
class ParameterState:
    """What a rank holds of the state of one parameter.

    Attributes:
        start: first element of the rank's part of the parameter, row-major, that the tensors are about.
        columns: of the rank's part of the parameter, seen as a matrix.
        tensors: MOMENTS and MAIN, float32, of equal lengths.
    """

    start: int
    columns: int
    tensors: dict[str, Tensor]

    @property
    def stop(self) -> int:
        """Behind the last element."""
        return self.start + self.tensors[MAIN].numel()


def optimizer_parts(states: Mapping[str, ParameterState], key: str) -> dict[str, FlatPart]:
    """Return one kind of state for a transport."""
    return {name: FlatPart(state.tensors[key].view(-1), state.columns, state.start) for name, state in states.items()}


def parameter_states(optimizer: ChainedOptimizer, parameters: Mapping[str, Tensor]) -> dict[str, ParameterState]:
    """Return the optimizer state that this rank holds, by name. Adam must have its state already, if only zeros.

    Args:
        parameters: this rank's parameters by name.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    states = {}
    for part in _parts(optimizer):
        for parameter, start, main in _stepped(part, list(names)):
            state = part.optimizer.state[main]
            assert all(key in state for key in MOMENTS), "Adam's state must be filled before it is moved"
            tensors = {key: state[key] for key in MOMENTS} | {MAIN: main.detach()}
            states[names[parameter]] = ParameterState(start, as_matrix(parameter.shape)[1], tensors)
    return states


def _stepped(part: Any, parameters: list[Tensor]) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Return the parameters with state in ``part`` on this rank, where it begins in them, and the tensor that Adam steps."""
    if isinstance(part, DistributedOptimizer):
        # its own map (_get_main_param_and_optimizer_states) is wrong where one group has parameters of 16 and of 32 bits
        models = chain(chain.from_iterable(part.model_fp32_groups), chain.from_iterable(part.model_float16_groups))
        shards = chain(chain.from_iterable(part.shard_fp32_groups), chain.from_iterable(part.shard_fp32_from_float16_groups))
        for parameter, main in zip(models, shards, strict=True):
            yield parameter, part._get_model_param_range_map(parameter)["param"].start, main
        return
    mains = {main for group in part.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = getattr(parameter, "main_param", parameter)
        if main in mains:
            yield parameter, 0, main


def get_step(optimizer: ChainedOptimizer) -> int:
    """Return the updates that Adam counts, the same for all parameters; 0 where it has none."""
    return max((int(counter) for _, _, counter in _step_counters(optimizer)), default=0)


def set_step(optimizer: ChainedOptimizer, step: int) -> None:
    """Set the count of every parameter."""
    for owner, key, counter in _step_counters(optimizer):
        owner[key] = torch.full_like(counter, step) if isinstance(counter, Tensor) else step


def _step_counters(optimizer: ChainedOptimizer) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Find the step counters: torch counts in the state of each parameter, Apex and Transformer Engine in the parameter groups."""
    for part in _parts(optimizer):
        for owner in (*part.optimizer.param_groups, *part.optimizer.state.values()):
            if "step" in owner:
                yield owner, "step", owner["step"]


def _parts(optimizer: ChainedOptimizer) -> list[Any]:
    """Return Megatron's optimizers of dense parameters and of experts; those without parameters are left out."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def ranges_of(shards: ShardLayout, states: Mapping[str, ParameterState]) -> NDArray[np.void]:
    """Return which elements of which parameter of ``layout`` this rank holds, of type RANGE."""
    numbers = {name: number for number, name in enumerate(shards.parameters)}
    numbers |= {name: number for number, (name, _) in shards.copy_names.items()}
    return np.array([(numbers[name], state.start, state.stop) for name, state in states.items()], dtype=RANGE)


def held_ranges(shards: ShardLayout, ranges: Sequence[NDArray[np.void]], *, with_copies: bool) -> ShardLayout:
    """Return the layout in which each rank holds only a range of each of its parameters.

    Args:
        shards: what each rank would hold if it held its parameters whole.
        ranges: for each rank, of type RANGE.
        with_copies: also the parts of ranks that have a parameter under another name (the last stage's embedding when it is tied).
            A source must not have them: it would hold elements twice, in ranges that are cut elsewhere.
    """
    columns = np.array([as_matrix(shape)[1] for shape in shards.shapes], dtype=np.int64)
    ranks, set_of_rank = shards.rank_sets.ranks, np.repeat(np.arange(len(shards.rank_sets.sizes)), shards.rank_sets.sizes)
    boxes = []
    for rank, held in enumerate(ranges):
        mine = shards.boxes[np.isin(shards.boxes["rank_set"], set_of_rank[ranks == rank])]
        if not with_copies:
            copied = [number for number, (_, copies) in shards.copy_names.items() if rank in copies]
            mine = mine[~np.isin(mine["parameter"], copied)]
        start, stop = np.zeros((2, len(columns)), dtype=np.int64)
        start[held["parameter"]], stop[held["parameter"]] = held["start"], held["stop"]
        parameter = mine["parameter"]
        boxes.append(_within(mine, start[parameter], stop[parameter], columns[parameter]))
        boxes[-1]["rank_set"] = rank
    together, rank_sets = _merge(np.concatenate(boxes))
    return ShardLayout(shards.parameters, shards.shapes, together, rank_sets, shards.num_ranks, shards.copy_names)


def _within(
    boxes: NDArray[np.void], start: NDArray[np.int64], stop: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.void]:
    """Return the parts of boxes that lie in ranges of their parameters: of the first row, of the rows between, of the last row.

    Args:
        start, stop, columns: [boxes], the range, and the width of the parameter.
    """
    first_row, first_column = np.divmod(start, columns)
    last_row, last_column = np.divmod(stop, columns)
    one_row = first_row == last_row
    zero = np.zeros_like(start)
    regions = (
        (first_row, first_row + 1, first_column, np.where(one_row, last_column, columns), (first_column > 0) | one_row),
        (first_row + (first_column > 0), last_row, zero, columns, ~one_row),
        (last_row, last_row + 1, zero, last_column, ~one_row),
    )
    parts = []
    for row_start, row_stop, column_start, column_stop, exists in regions:
        row, column = np.maximum(row_start, boxes["local_row"]), np.maximum(column_start, boxes["local_column"])
        rows = np.minimum(row_stop, boxes["local_row"] + boxes["rows"]) - row
        wide = np.minimum(column_stop, boxes["local_column"] + boxes["columns"]) - column
        some = exists & (rows > 0) & (wide > 0)
        part = boxes[some].copy()
        part["row"] += (row[some] - part["local_row"]).astype(np.int32)
        part["column"] += (column[some] - part["local_column"]).astype(np.int32)
        part["local_row"], part["local_column"] = row[some], column[some]
        part["rows"], part["columns"] = rows[some], wide[some]
        parts.append(part)
    return np.concatenate(parts)


def _merge(boxes: NDArray[np.void]) -> tuple[NDArray[np.void], RankSets]:
    """Return the equal boxes of several ranks as one box of a set of ranks. Each box's ``rank_set`` is its rank."""
    keys = [name for name in BOX.names or () if name != "rank_set"]
    boxes = boxes[np.lexsort((boxes["rank_set"], *(boxes[name] for name in keys)))]
    is_first = np.append(True, np.any([boxes[name][1:] != boxes[name][:-1] for name in keys], axis=0))
    starts = np.flatnonzero(is_first)
    sets: dict[bytes, int] = {}
    members: list[NDArray[np.int32]] = []
    merged = boxes[starts].copy()
    for number, ranks in enumerate(np.split(boxes["rank_set"], starts[1:])):
        index = sets.setdefault(ranks.tobytes(), len(members))
        if index == len(members):
            members.append(ranks)
        merged["rank_set"][number] = index
    return merged, RankSets.of(members)
