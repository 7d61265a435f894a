"""The manifest of a run's checkpoint: where the run was, and every file with its size and a digest of its bytes."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megarl.errors import CheckpointError, shortened
from megarl.weights.file_digests import FileDigest, sync_folder

MANIFEST = "manifest.json"
FORMAT = 3
FORMAT_WITHOUT_DIGESTS = 2
NO_DIGEST = "0" * 32  # in the manifest's text while its own digest is taken
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step: Count
    weight_version: Count
    data: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=dict)
    has_critic: bool = False
    stage: dict[str, Any] = field(default_factory=dict)
    distributed_optimizer: dict[str, bool] = field(default_factory=dict)


class _FileEntry(BaseModel):
    model_config = STRICT

    bytes: Count
    xxh3_128: Digest


class _Manifest(BaseModel):
    """What every format has."""

    model_config = STRICT | ConfigDict(protected_namespaces=())

    megatron_core: str
    torch: str
    model_digest: str
    state: RunState


class _ManifestWithDigests(_Manifest):
    digest: Digest
    format: Literal[3]
    files: dict[str, _FileEntry]


class _ManifestWithSizes(_Manifest):
    format: Literal[2]
    files: dict[str, Count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest that was read, or is to be written.

    Attributes:
        model_digest: of the model's shape.
        megatron_core, torch: versions that wrote the checkpoint.
        state: where the run was.
        files: by path below the checkpoint; without digests in what earlier versions wrote.
    """

    model_digest: str
    megatron_core: str
    torch: str
    state: RunState
    files: dict[str, FileDigest]

    @property
    def has_digests(self) -> bool:
        """Whether damage inside a file can be seen."""
        return all(entry.xxh3_128 is not None for entry in self.files.values())


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = checkpoint / MANIFEST
    text = _read_text(path)
    with refused_json(path):
        values = json.loads(text)
    if not isinstance(values, dict) or "format" not in values:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: it has no format; {another_checkpoint(checkpoint)}")
    if values["format"] not in (FORMAT, FORMAT_WITHOUT_DIGESTS):
        raise CheckpointError(
            f"{path} has format {shortened(repr(values['format']), 20)}, and this MegaRL reads {FORMAT_WITHOUT_DIGESTS} and "
            f"{FORMAT}; use the version that wrote it"
        )
    has_digests = values["format"] == FORMAT
    try:
        manifest = (_ManifestWithDigests if has_digests else _ManifestWithSizes).model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}; {another_checkpoint(checkpoint)}") from None
    if isinstance(manifest, _ManifestWithDigests):
        if _digest_of(text, manifest.digest) != manifest.digest:
            raise CheckpointError(
                f"{path} is damaged: its bytes do not have the digest that it names; {another_checkpoint(checkpoint)}"
            )
        files = {name: FileDigest(num_bytes=entry.bytes, xxh3_128=entry.xxh3_128) for name, entry in manifest.files.items()}
    else:
        assert isinstance(manifest, _ManifestWithSizes)
        files = {name: FileDigest(num_bytes=size, xxh3_128=None) for name, size in manifest.files.items()}
    _check_names(path, files)
    return Manifest(
        model_digest=manifest.model_digest,
        megatron_core=manifest.megatron_core,
        torch=manifest.torch,
        state=manifest.state,
        files=files,
    )


def write_manifest(checkpoint: Path, manifest: Manifest, state: dict[str, object]) -> None:
    """Write it as the last file of a checkpoint whose others are on the disk.

    Args:
        checkpoint: the folder.
        manifest: what to write.
        state: ``manifest.state`` as JSON values.
    """
    values = {
        "digest": NO_DIGEST,
        "format": FORMAT,
        "megatron_core": manifest.megatron_core,
        "torch": manifest.torch,
        "model_digest": manifest.model_digest,
        "state": state,
        "files": {name: {"bytes": entry.num_bytes, "xxh3_128": entry.xxh3_128} for name, entry in manifest.files.items()},
    }
    text = json.dumps(values, indent=2, allow_nan=False)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    temporary = checkpoint / (MANIFEST + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text.replace(NO_DIGEST, digest, 1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MANIFEST)
    sync_folder(checkpoint)


def another_checkpoint(checkpoint: Path) -> str:
    """Say what to do about a checkpoint that cannot be used."""
    return f"move {checkpoint.name} away to go on from an older checkpoint"


@contextmanager
def refused_json(path: Path) -> Iterator[None]:
    """Turn what a damaged JSON file of a checkpoint raises into a CheckpointError that names it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({shortened(str(error), 80)}); {another_checkpoint(path.parent)}"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {MANIFEST}: the save did not finish; {another_checkpoint(path.parent)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {another_checkpoint(path.parent)}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); {another_checkpoint(path.parent)}") from error


def _digest_of(text: str, digest: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.replace(digest, NO_DIGEST, 1).encode())


def _first_problem(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    where = shortened(".".join(str(part) for part in detail["loc"]), 60)
    given = detail["input"]
    shown = shortened(repr(given), 40) if isinstance(given, (str, int, float, bool, type(None))) else type(given).__name__
    match detail["type"]:
        case "missing":
            return f"{where} is missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{where} is unknown to this MegaRL"
    return f"{where} is {shown}, {shortened(detail['msg'], 80).lower()}"


def _check_names(path: Path, names: Sequence[str] | dict[str, FileDigest]) -> None:
    """Keep to files of the checkpoint."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {shortened(name, 80)}, which is no file of the checkpoint")
