"""A transformers model's memory under the names of its checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megarl.errors import RolloutError


class _WithoutCopies(TorchFunctionMode):
    """``contiguous`` gives back the tensor itself."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def checkpoint_views(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of the model's checkpoint, each a view of the model's own parameters and persistent buffers.

    transformers keeps the experts of a layer in one parameter, and cuts it into the checkpoint's tensors when it saves a model
    (``core_model_loading``); the same cut without its copies shows where each tensor of a checkpoint belongs.

    Args:
        model: on any device.
        shapes: of the tensors that are wanted, by checkpoint name.

    Raises:
        RolloutError: a wanted tensor is not in the model, or a part of the model is in none of them.
    """
    state = model.state_dict()
    with _WithoutCopies(), torch.no_grad():
        views = revert_weight_conversion(model, state)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    strange = [
        name
        for name, shape in shapes.items()
        if name not in views or views[name].shape != shape or views[name].untyped_storage().data_ptr() not in storages
    ]
    if strange:
        raise RolloutError(
            f"transformers' {type(model).__name__} has no {strange[0]} of shape {shapes[strange[0]]} "
            f"({len(strange)} such of {len(shapes)} tensors); use rollout.engine: vllm or sglang"
        )
    size = sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values())  # tied parameters once
    covered = sum(views[name].numel() for name in shapes)
    if covered != size:
        raise RolloutError(
            f"transformers' {type(model).__name__} has {size} numbers and the weights of the trainer {covered}; "
            "use rollout.engine: vllm or sglang"
        )
    return {name: views[name] for name in shapes}
