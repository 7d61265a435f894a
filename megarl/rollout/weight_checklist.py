"""Does a weight update bring every parameter of the engine's model, once and in its shape?"""

from collections.abc import Iterable

from torch import Tensor, nn

from megarl.errors import WeightsError

NAMES_SHOWN = 8


class WeightChecklist:
    """Ticks off the tensors of one update and reports all that is wrong with it at the end.

    Nothing is raised before ``finish``: the stream of weights is often made by collectives of all trainer ranks, and leaving
    it half-read would hang them.
    """

    def __init__(self, model: nn.Module) -> None:
        """The names and shapes to come are those of the model's parameters and persistent buffers; it may be on ``meta``."""
        state = model.state_dict(keep_vars=True)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        # Tied parameters are one tensor under several names: any one of the names brings it.
        self._tensor_of_name = {name: id(tensor) for name, tensor in state.items()}
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
        arrived_tensors = {self._tensor_of_name[name] for name in self._arrived}
        wrong_names = {problem.split(" ", 1)[0] for problem in self._wrong}
        missing = [
            name for name, tensor in self._tensor_of_name.items() if tensor not in arrived_tensors and name not in wrong_names
        ]
        problems = [
            f"{title}: {_shortened(names)}"
            for title, names in (("missing", missing), ("not in the model", self._unknown), ("wrong", self._wrong))
            if names
        ]
        if problems:
            raise WeightsError(f"{engine} refused the new weights ({'; '.join(problems)}); they do not fit the model's config.json")


def _shortened(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more
