"""Does a weight update bring every tensor of the model's checkpoint, once and in its shape?"""

from collections.abc import Mapping

from torch import Tensor

from megarl.errors import WeightsError, listed

NAMES_SHOWN = 8


class WeightChecklist:
    """Ticks off the tensors of one update and reports all that is wrong with it at the end.

    Nothing is raised before ``finish``: the stream of weights is often made by collectives of all trainer ranks, and leaving
    it half-read would hang them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the ``shapes`` of the tensors to come, by Hugging Face name; tied embeddings come once, without lm_head."""
        self._shapes = shapes
        self._arrived: set[str] = set()
        self._unknown: list[str] = []
        self._wrong: list[str] = []

    def accepts(self, name: str, tensor: Tensor) -> bool:
        """Tick ``name`` off; False when the tensor must not be loaded (``finish`` will tell why)."""
        if name not in self._shapes:
            self._unknown.append(name)
        elif tuple(tensor.shape) != self._shapes[name]:
            self._wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {self._shapes[name]}")
        elif name in self._arrived:
            self._wrong.append(f"{name} came twice")
        else:
            self._arrived.add(name)
            return True
        return False

    def finish(self, engine: str) -> None:
        """Raise WeightsError naming what is missing, unknown or mis-shaped; the message begins with ``engine``."""
        seen = self._arrived | {problem.split(" ", 1)[0] for problem in self._wrong}
        missing = [name for name in self._shapes if name not in seen]
        problems = [
            f"{title}: {listed(names, NAMES_SHOWN)}"
            for title, names in (("missing", missing), ("not in the model", self._unknown), ("wrong", self._wrong))
            if names
        ]
        if problems:
            raise WeightsError(f"{engine} refused the new weights ({'; '.join(problems)}); they do not fit the model's config.json")
