"""Where weights come from: a Hugging Face folder of safetensors, or random numbers drawn from the config."""

import hashlib
import logging
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import WeightsError, listed, shortened, with_fix
from megarl.families.base.weight_blocks import EMBEDDING, LM_HEAD
from megarl.families.base.weight_rules import Start
from megarl.weights.files.safetensors_files import SafetensorsFolder
from megarl.weights.files.stored_tensors import TensorFolder, check_finite, read_columns, read_stored_rows, windows
from megarl.weights.mapping import WeightMap
from megarl.weights.shards import Slice

VOCABULARY = (EMBEDDING, LM_HEAD)
QUANTIZED_ENDINGS = ("weight_scale_inv", "weight_scale", ".qweight", ".qzeros", ".scales", ".absmax", "_blocks", "_scales")

logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Anything that can give slices of Hugging Face tensors."""

    def read(self, piece: Slice) -> Tensor:
        """Read the slice onto the CPU, in the source's dtype."""


class SafetensorsSource:
    """The safetensors files of a Hugging Face folder; only the bytes of the asked slices are read.

    Raises:
        WeightsError: a file is missing, truncated or corrupt, or tensors are missing, extra or mis-shaped; all are listed.
    """

    def __init__(self, folder: Path, weight_map: WeightMap) -> None:
        self._tensors = SafetensorsFolder(folder)
        check_tensors(self._tensors, weight_map)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for line in weight_map.notices(self._tensors.shapes):
                logger.warning("%s: %s", folder, line)

    def read(self, piece: Slice) -> Tensor:
        """Read the slice from its file."""
        stored = self._tensors.tensors[piece.name]
        if piece.dim == 1:
            values = read_columns(stored, piece.start, piece.stop)
        else:
            values = torch.empty((piece.stop - piece.start, *stored.shape[1:]), dtype=stored.dtype)
            read_stored_rows(stored, piece.start, values, keep_cached=True)  # other ranks read the neighbouring rows
        check_finite(values, piece.name, self._tensors.folder)
        return values


def check_tensors(tensors: TensorFolder, weight_map: WeightMap) -> None:
    """Refuse a folder whose tensors are not those of the model.

    Raises:
        WeightsError: they are quantized; tensors are missing, extra or mis-shaped; or a tied output layer is not the embedding.
    """
    _check_plain(tensors)
    expected = weight_map.hugging_face_shapes()
    missing = sorted(expected.keys() - tensors.shapes.keys())
    extra = sorted(weight_map.unknown(tensors.shapes.keys() - expected.keys()))
    wrong = [
        f"{name} is {list(tensors.shapes[name])}, config.json says {list(shape)}{' (vocab_size)' * (name in VOCABULARY)}"
        for name, shape in expected.items()
        if tensors.shapes.get(name, shape) != shape
    ]
    problems = [
        f"{what}: {shortened(listed(names, 2), 160)}"
        for what, names in (("missing", missing), ("extra", extra), ("mis-shaped", wrong))
        if names
    ]
    if missing == [LM_HEAD]:
        problems.append("tie_word_embeddings is false")
    if problems:
        raise WeightsError(
            with_fix(f"{tensors.folder}: weights do not fit config.json; {'; '.join(problems)}", "copy the model again")
        )
    if weight_map.architecture.tied_embeddings:
        _check_tied(tensors)


def _check_plain(tensors: TensorFolder) -> None:
    """Refuse quantized weights, and whole numbers."""
    for name, dtype in tensors.dtypes.items():
        if name.endswith(QUANTIZED_ENDINGS) or dtype.itemsize == 1 or not dtype.is_floating_point:
            kind = f"{shortened(name, 100)}, {str(dtype).removeprefix('torch.')}"
            raise WeightsError(
                f"{tensors.folder}: its weights are quantized or whole numbers ({kind}); give the model in bfloat16 or float32"
            )


def _check_tied(tensors: TensorFolder) -> None:
    """Refuse an output layer of its own where config.json says that it is the embedding: transformers and vLLM would keep it."""
    head, embedding = tensors.shapes.get(LM_HEAD), tensors.shapes.get(EMBEDDING)
    if head is None or embedding is None:
        return
    is_same = head == embedding
    for start, stop in windows(embedding, tensors.dtypes[EMBEDDING]) if is_same else ():
        parts = []
        for name in (LM_HEAD, EMBEDDING):
            parts.append(torch.empty((stop - start, *embedding[1:]), dtype=tensors.dtypes[name]))
            tensors.read_rows(name, start, parts[-1])
        is_same &= torch.equal(parts[0].float(), parts[1].float())
    if not is_same:
        raise WeightsError(
            f"{tensors.folder}: {LM_HEAD} differs from {EMBEDDING}, and config.json has tie_word_embeddings true; set it to false "
            f"to use {LM_HEAD}, or remove {LM_HEAD}"
        )


class RandomSource:
    """Normal weights with the config's initializer_range, zero biases, unit norms: a function of seed and name alone.

    Every tensor is drawn whole and then cut, so that each layout starts from the same model.
    """

    def __init__(self, weight_map: WeightMap, seed: int) -> None:
        self._shapes = weight_map.hugging_face_shapes()
        self._starts = weight_map.hugging_face_starts()
        self._std = weight_map.architecture.initializer_range
        self._seed = seed
        self._last: tuple[str, Tensor] | None = None

    def read(self, piece: Slice) -> Tensor:
        """Draw the tensor and cut it."""
        if self._last is None or self._last[0] != piece.name:
            self._last = (piece.name, self._draw(piece.name))
        return self._last[1].narrow(piece.dim, piece.start, piece.stop - piece.start)

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if self._starts[name] is Start.ZEROS:
            return torch.zeros(shape)
        if self._starts[name] is Start.ONES:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        std = 1 / (shape[-1] + 1) if self._starts[name] is Start.SMALL else self._std
        return torch.randn(shape, generator=generator) * std
