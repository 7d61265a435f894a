"""Checkpoints of a run: megatron-core's distributed format, which any layout can load, and one manifest written last.

    checkpoints/step_00000012/
        policy/              model, optimizer, scheduler and random state (megatron dist_checkpointing), and the critic's
        outstanding.json     groups that wait to be trained on, whole or begun
        manifest.json        step, weight version, data position, model digest, and every file with its size and digest

A folder without a manifest is an unfinished save and is never read.
"""

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megarl.errors import CheckpointError, shortened
from megarl.weights.distributed_writer import start_result_queue
from megarl.weights.file_digests import (
    collect_digests,
    digest_file,
    files_below,
    find_damage,
    share_of_rank,
    size_damage,
    sync_files,
    sync_folder,
    write_and_digest,
)
from megarl.weights.manifest import MANIFEST, Manifest, RunState, another_checkpoint, read_manifest, refused_json, write_manifest
from megarl.weights.mapping import WeightMap
from megarl.weights.sharded_state import load_sharded_state

POLICY = "policy"  # folder of the tensors
OUTSTANDING = "outstanding.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """Where a run is in its training data.

    Attributes:
        position: as the sampler gives it.
        pending: what was taken from it and not yet trained on, as the collector gives it; None where nothing is sampled to be
            trained on, and on ranks other than 0.
    """

    position: dict[str, Any]
    pending: dict[str, Any] | None


def model_digest(weight_map: WeightMap) -> str:
    """Identifies a model's shape: family and the names and shapes of its tensors."""
    shapes = sorted(weight_map.hugging_face_shapes().items())
    return hashlib.sha256(repr((weight_map.architecture.family, shapes)).encode()).hexdigest()[:16]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    steps = {
        int(match[1]): path.parent
        for path in folder.glob(f"step_*/{MANIFEST}")
        if (match := STEP_FOLDER.fullmatch(path.parent.name))
    }
    return [path for _, path in sorted(steps.items())]


def check_checkpoint(checkpoint: Path, weight_map: WeightMap, rank: int = 0, num_ranks: int = 1) -> Manifest:
    """Read a checkpoint's manifest, and compare this rank's share of its files with it, byte for byte.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of another model or format.
    """
    manifest = read_manifest(checkpoint)
    digest = model_digest(weight_map)
    if manifest.model_digest != digest:
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of another model (digest {shortened(manifest.model_digest, 16)}, this model has "
            f"{digest}); use the model.path it was trained with"
        )
    if problem := size_damage(checkpoint, manifest.files):
        raise CheckpointError(f"{problem}; {another_checkpoint(checkpoint)}")
    damage = find_damage(checkpoint, manifest.files, share_of_rank(manifest.files, rank, num_ranks))
    if damage:
        raise CheckpointError(f"{damage[0]}; {another_checkpoint(checkpoint)}")
    return manifest


def check_checkpoint_together(checkpoint: Path, weight_map: WeightMap) -> Manifest:
    """Do ``check_checkpoint`` with the files shared among the ranks of the world; collective, and all raise what one found."""
    found: Manifest | CheckpointError
    try:
        found = check_checkpoint(checkpoint, weight_map, dist.get_rank(), dist.get_world_size())
    except CheckpointError as error:
        found = error
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, str(found) if isinstance(found, CheckpointError) else None)
    problem = next((text for text in everywhere if text is not None), None)
    if isinstance(found, CheckpointError) or problem is not None:
        raise CheckpointError(problem or str(found))
    return found


def read_data_state(checkpoint: Path, state: RunState) -> DataState:
    """Read where the run that saved the checkpoint was in its data.

    Raises:
        CheckpointError: the groups that wait are damaged.
    """
    file = checkpoint / OUTSTANDING
    if dist.get_rank() != 0 or not file.exists():
        return DataState(position=state.data, pending=None)
    with refused_json(file):
        pending = json.loads(file.read_bytes())
    if not isinstance(pending, dict):
        raise CheckpointError(f"{file} holds no groups of a run; {another_checkpoint(checkpoint)}")
    return DataState(position=state.data, pending=pending)


def load_policy(checkpoint: Path, sharded_state: dict[str, object]) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint of any layout; no file of it is executed.

    Raises:
        CheckpointError: it cannot be read.
    """
    return load_sharded_state(checkpoint / POLICY, sharded_state)


class CheckpointWriter:
    """Writes checkpoints into a run's folder and deletes old ones.

    Args:
        folder: ``checkpoints`` of the run.
        weight_map: of the model.
        keep: how many whole checkpoints stay.
        asynchronous: return before the files are written.
    """

    def __init__(self, folder: Path, weight_map: WeightMap, keep: int, asynchronous: bool) -> None:
        self._folder = folder
        self._weight_map = weight_map
        self._keep = keep
        self._queue = AsyncCallsQueue() if asynchronous else None
        start_result_queue()

    def save(self, sharded_state: dict[str, object], state: RunState, pending: dict[str, object] | None = None) -> None:
        """Save one checkpoint; collective. ``pending``: of DataState, on rank 0.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        checkpoint = self._folder / f"step_{state.step:08d}"
        with _write_errors(str(checkpoint), self._folder):
            self._check_space(checkpoint, sharded_state)
            if dist.get_rank() == 0:
                remove_checkpoint(checkpoint)
                (checkpoint / POLICY).mkdir(parents=True)
            dist.barrier()
            if pending is not None:
                (checkpoint / OUTSTANDING).write_text(json.dumps(pending))
            request = dist_checkpointing.save(sharded_state, str(checkpoint / POLICY), async_sharded_save=True, **_async_strategy())
            if request.async_fn is not None:  # None: this rank has nothing to write
                write = partial(write_and_digest, request.async_fn, checkpoint / POLICY, dist.get_rank())
                request = request._replace(async_fn=write)
            request.add_finalize_fn(self._finisher(checkpoint, state))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)

    def poll(self, *, blocking: bool = False) -> None:
        """Finish saves that have been written in the background; collective."""
        if self._queue is not None:
            with _write_errors(f"a checkpoint into {self._folder}", self._folder):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for saves under way; collective."""
        if self._queue is not None:
            self.poll(blocking=True)
            self._queue.close()

    def _check_space(self, checkpoint: Path, sharded_state: dict[str, object]) -> None:
        """Compare what all ranks are about to write with the free space, so that nothing is half written on a full disk."""
        sizes = torch.tensor([_tensor_bytes(sharded_state)], dtype=torch.int64)
        dist.all_reduce(sizes)
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < int(sizes):
            raise CheckpointError(
                f"cannot write {checkpoint}: it needs up to {int(sizes) / 1e9:.2f} GB and its disk has "
                f"{free / 1e9:.2f} GB free; free some space or lower checkpoint.keep"
            )

    def _finisher(self, checkpoint: Path, state: RunState) -> Callable[[], None]:
        def finish() -> None:
            if dist.get_rank() == 0:
                _finish(checkpoint, state, model_digest(self._weight_map))
                for old in whole_checkpoints(self._folder)[: -self._keep]:
                    remove_checkpoint(old)

        return finish


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, whole or not, if there is one. Of a symbolic link only the link goes, not what it leads to."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted checkpoint never looks whole
    if checkpoint.exists():
        shutil.rmtree(checkpoint)  # does not follow links


def _finish(checkpoint: Path, state: RunState, digest: str) -> None:
    """Make a checkpoint whole whose files are written."""
    digests = collect_digests(checkpoint / POLICY)
    sync_files(checkpoint)
    files = {name: digests.get(Path(name).name) if Path(name).parent.name == POLICY else None for name in files_below(checkpoint)}
    manifest = Manifest(
        model_digest=digest,
        megatron_core=version("megatron-core"),
        torch=torch.__version__,
        state=state,
        files={name: entry or digest_file(checkpoint / name) for name, entry in files.items()},
    )
    write_manifest(checkpoint, manifest, asdict(state))
    sync_folder(checkpoint.parent)


@contextmanager
def _write_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong while writing into ``folder`` into a CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except CheckpointException as error:  # no Exception; raised on every rank, but only rank 0 knows the reasons
        box = ["; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))]
        dist.broadcast_object_list(box, src=0)
        raise _write_error(what, folder, box[0]) from error
    except Exception as error:
        raise _write_error(what, folder, str(error)) from error


def _write_error(what: str, folder: Path, reason: str) -> CheckpointError:
    # torch.save closes its archive after a failed write, fails again, and so hides that the disk is full
    free = shutil.disk_usage(folder).free
    return CheckpointError(
        f"cannot write {what} ({free / 1e6:.1f} MB free there): {shortened(reason)}; earlier checkpoints are untouched"
    )


def _async_strategy() -> dict[str, str]:
    """Choose torch's writer: megatron-core 0.19 takes NVIDIA's resiliency extension by default, which need not be there."""
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item) for item in value)
    data = getattr(value, "data", None)
    is_replica = (
        any(value.replica_id) if isinstance(getattr(value, "replica_id", 0), tuple) else bool(getattr(value, "replica_id", 0))
    )
    return data.nbytes if isinstance(data, torch.Tensor) and not is_replica else 0
