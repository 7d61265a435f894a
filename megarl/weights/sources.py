"""Where weights come from: a Hugging Face folder of safetensors, or random numbers drawn from the config."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarl.errors import WeightsError
from megarl.weights.mapping import WeightMap
from megarl.weights.rules import Slice


class WeightSource(Protocol):
    """Anything that can give slices of Hugging Face tensors."""

    def read(self, piece: Slice) -> Tensor:
        """The slice, on the CPU, in the source's dtype."""


class SafetensorsSource:
    """The safetensors files of a Hugging Face folder; only the bytes of the asked slices are read.

    Raises:
        WeightsError: a file is missing, truncated or corrupt, or tensors are missing, extra or mis-shaped; all are listed.
    """

    def __init__(self, folder: Path, weight_map: WeightMap) -> None:
        self._folder = folder
        self._open: dict[str, safe_open] = {}
        self._file_of = self._index()
        self._check(weight_map)

    def _index(self) -> dict[str, str]:
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError) as error:
                raise WeightsError(f"{index} is not a safetensors index ({error}); download the model again") from error
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{self._folder} has no *.safetensors file; model.init: random draws weights instead")
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118  (not a dict)

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            path = self._folder / name
            try:
                self._open[name] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError as error:
                raise WeightsError(f"{path} is named by the index and missing; download the model again") from error
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} is truncated or corrupt ({error}); download the model again") from error
        return self._open[name]

    def _check(self, weight_map: WeightMap) -> None:
        expected = weight_map.hugging_face_shapes()
        tied_copy = {"lm_head.weight"} if weight_map.architecture.tied_embeddings else set()
        # some exporters write RoPE's constant frequencies
        constants = {name for name in self._file_of if name.endswith("rotary_emb.inv_freq")}
        missing = sorted(expected.keys() - self._file_of.keys())
        extra = sorted(self._file_of.keys() - expected.keys() - tied_copy - constants)
        wrong = []
        for name in expected.keys() & self._file_of.keys():
            try:
                shape = tuple(self._file(self._file_of[name]).get_slice(name).get_shape())
            except SafetensorError as error:
                raise WeightsError(
                    f"{self._folder / self._file_of[name]} lacks {name}, which the index puts there ({error})"
                ) from error
            if shape != expected[name]:
                wrong.append(f"{name} is {list(shape)}, config.json says {list(expected[name])}")
        problems = [
            f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("extra", extra), ("mis-shaped", wrong)) if names
        ]
        if problems:
            raise WeightsError(f"{self._folder}: weights do not fit config.json; {'; '.join(problems)}")

    def read(self, piece: Slice) -> Tensor:
        """Read the slice from its file."""
        view = self._file(self._file_of[piece.name]).get_slice(piece.name)
        return view[piece.start : piece.stop] if piece.dim == 0 else view[:, piece.start : piece.stop]


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


class RandomSource:
    """Normal weights with the config's initializer_range, zero biases, unit norms: a function of seed and name alone.

    Every tensor is drawn whole and then cut, so that each layout starts from the same model.
    """

    def __init__(self, weight_map: WeightMap, seed: int) -> None:
        self._shapes = weight_map.hugging_face_shapes()
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
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(shape, generator=generator) * self._std
