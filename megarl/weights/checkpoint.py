"""Checkpoints of a run: megatron-core's distributed format, which any layout can load, and one manifest written last.

    checkpoints/step_00000012/
        policy/              model, optimizer, scheduler and random state (megatron dist_checkpointing), and the critic's
        outstanding.json     groups that wait to be trained on, whole or begun
        manifest.json        step, weight version, data position, model digest, and every file with its size

A folder without a manifest is an unfinished save and is never read.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megarl.errors import CheckpointError
from megarl.weights.mapping import WeightMap
from megarl.weights.result_queue import start_result_queue

MANIFEST = "manifest.json"
POLICY = "policy"  # folder of the tensors
OUTSTANDING = "outstanding.json"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """Where a run is in its training data.

    Attributes:
        position: as the sampler gives it.
        outstanding: what was taken from it and not yet trained on, as the collector gives it; None where nothing is sampled to be
            trained on, and on ranks other than 0.
    """

    position: dict[str, Any]
    outstanding: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs to go on, besides the policy's tensors.

    Attributes:
        step: steps done.
        weight_version: version of the policy's weights.
        data: position of the training data, as its sampler gives it.
        algorithm: what the RL method carries from step to step.
        has_critic: a critic's tensors are there beside the policy's.
        stage: position in the curriculum; empty without one.
        distributed_optimizer: by role, whether the optimizer state was sharded; megatron-core reads it into the same kind only.
    """

    step: int
    weight_version: int
    data: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=dict)
    has_critic: bool = False
    stage: dict[str, Any] = field(default_factory=dict)
    distributed_optimizer: dict[str, bool] = field(default_factory=dict)


def model_digest(weight_map: WeightMap) -> str:
    """Identifies a model's shape: family and the names and shapes of its tensors."""
    shapes = sorted(weight_map.hugging_face_shapes().items())
    return hashlib.sha256(repr((weight_map.architecture.family, shapes)).encode()).hexdigest()[:16]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{MANIFEST}"))


def read_run_state(checkpoint: Path, weight_map: WeightMap) -> RunState:
    """Read and verify a checkpoint's manifest.

    Raises:
        CheckpointError: a file is missing or has another size, or it is of another model or format.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: the save did not finish; resume from an older checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); resume from an older checkpoint") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {manifest['format']}, and this MegaRL reads {FORMAT}; use the version that wrote it"
        )
    digest = model_digest(weight_map)
    if manifest["model_digest"] != digest:
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of another model (digest {manifest['model_digest']}, this model has {digest}); "
            "use the model.path it was trained with"
        )
    for name, size in manifest["files"].items():
        file = checkpoint / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing; resume from an older checkpoint")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, the manifest says {size}; resume from an older checkpoint"
            )
    return RunState(**manifest["state"])


def read_stage(checkpoint: Path) -> dict[str, Any]:
    """Position in the curriculum, which says in which layout the models are built that the checkpoint is then read into.

    Raises:
        CheckpointError: the checkpoint is of a run without curriculum, or has no readable manifest.
    """
    try:
        stage: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["state"].get("stage")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} cannot be read ({error}); resume from an older checkpoint") from error
    if not stage:
        raise CheckpointError(f"{checkpoint} is of a run without curriculum; remove curriculum to go on with that run")
    return stage


def read_data_state(checkpoint: Path, state: RunState) -> DataState:
    """Where the run that saved the checkpoint was in its data.

    Raises:
        CheckpointError: the groups that wait are damaged.
    """
    file = checkpoint / OUTSTANDING
    if dist.get_rank() != 0 or not file.exists():
        return DataState(position=state.data, outstanding=None)
    try:
        return DataState(position=state.data, outstanding=json.loads(file.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); resume from an older checkpoint") from error


def load_policy(checkpoint: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint of any layout; collective.

    Raises:
        CheckpointError: megatron-core cannot read it.
    """
    try:
        return dist_checkpointing.load(sharded_state, str(checkpoint / POLICY))
    except Exception as error:
        written_by = json.loads((checkpoint / MANIFEST).read_text())["megatron_core"]
        raise CheckpointError(
            f"cannot load {checkpoint} (written by megatron-core {written_by}, this is {version('megatron-core')}): {error}"
        ) from error


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

    def save(self, sharded_state: dict[str, Any], state: RunState, outstanding: dict[str, Any] | None = None) -> None:
        """Save one checkpoint; collective. ``outstanding``: of DataState, on rank 0.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        checkpoint = self._folder / f"step_{state.step:08d}"
        self._check_space(checkpoint, sharded_state)
        if dist.get_rank() == 0:
            shutil.rmtree(checkpoint, ignore_errors=True)
            (checkpoint / POLICY).mkdir(parents=True)
        dist.barrier()
        with _write_errors(str(checkpoint), self._folder):
            if outstanding is not None:
                (checkpoint / OUTSTANDING).write_text(json.dumps(outstanding))
            request = dist_checkpointing.save(
                sharded_state, str(checkpoint / POLICY), async_sharded_save=self._queue is not None, **_async_strategy()
            )
            finish = self._finisher(checkpoint, state)
            if self._queue is None:
                dist.barrier()
                finish()
            else:
                request.add_finalize_fn(finish)
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

    def _check_space(self, checkpoint: Path, sharded_state: dict[str, Any]) -> None:
        """Compare what all ranks are about to write with the free space, so that nothing is half written on a full disk."""
        sizes = torch.tensor([_tensor_bytes(sharded_state)], dtype=torch.int64)
        dist.all_reduce(sizes)
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < int(sizes):
            raise CheckpointError(
                f"cannot write {checkpoint}: it needs up to {int(sizes) / 1e9:.2f} GB and {self._folder} has "
                f"{free / 1e9:.2f} GB free; free some space or lower checkpoint.keep"
            )

    def _finisher(self, checkpoint: Path, state: RunState) -> Callable[[], None]:
        def finish() -> None:
            if dist.get_rank() == 0:
                _write_manifest(checkpoint, state, model_digest(self._weight_map))
                for old in whole_checkpoints(self._folder)[: -self._keep]:
                    (old / MANIFEST).unlink()  # first, so that a half-deleted checkpoint never looks whole
                    shutil.rmtree(old)

        return finish


@contextmanager
def _write_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong while writing into ``folder`` into a CheckpointError of one line."""
    try:
        yield
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
        f"cannot write {what} ({free / 1e6:.1f} MB free there): {' '.join(reason.split())}; earlier checkpoints are untouched"
    )


def _async_strategy() -> dict[str, str]:
    """megatron-core 0.19 takes NVIDIA's resiliency extension by default, which need not be there."""
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


def _write_manifest(checkpoint: Path, state: RunState, digest: str) -> None:
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "megatron_core": version("megatron-core"),
        "torch": torch.__version__,
        "model_digest": digest,
        "state": asdict(state),
        "files": files,
    }
    temporary = checkpoint / (MANIFEST + ".partial")
    with temporary.open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MANIFEST)
