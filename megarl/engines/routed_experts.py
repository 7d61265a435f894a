"""Which experts an engine sent each token to: recorded in a transformers model, or read from a server's answer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megarl.errors import RolloutError
from megarl.families.base.architecture import MixtureOfExperts

Recorded = list[list[Tensor]]


@contextmanager
def recorded_experts(model: PreTrainedModel) -> Iterator[Recorded]:
    """Record for each layer with experts those that every forward pass chooses: integer [batch · positions, top_k] each."""
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    recorded: Recorded = [[] for _ in routers]
    hooks = [router.register_forward_hook(partial(_record, layer)) for router, layer in zip(routers, recorded, strict=True)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _record(layer: list[Tensor], router: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, experts = output  # logits, weights, indices: transformers' routers of all families
    layer.append(experts)


def experts_of_rows(recorded: Recorded, num_rows: int) -> Tensor:
    """Return int16 [num_rows, positions, num_moe_layers, top_k] of all forward passes, one after the other."""
    layers = [torch.cat([experts.view(num_rows, -1, experts.shape[-1]) for experts in layer], dim=1) for layer in recorded]
    return torch.stack(layers, dim=2).to("cpu", torch.int16)


def reported_experts(engine: str, report: "numpy.ndarray[Any, Any] | None", num_tokens: int, moe: MixtureOfExperts) -> Tensor:
    """Read ``Generation.routed_experts`` from a server's report.

    Args:
        engine: its name.
        report: integer [num_tokens - 1, num_layers, top_k], or the same as one row; layers without experts are included.
        num_tokens: of prompt and response.

    Returns:
        int16 [num_tokens - 1, num_moe_layers, top_k].

    Raises:
        RolloutError: there is no report, or it is not one of this model.
    """
    if report is None:
        raise RolloutError(
            f"{engine} reports no experts, and rollout.routing_replay needs them; a server given by URL must be "
            "started with --enable-return-routed-experts"
        )
    expected = (num_tokens - 1, moe.num_layers, moe.top_k)
    if report.size != math.prod(expected):
        raise RolloutError(f"{engine} reports experts of shape {report.shape}, not [tokens, layers, top_k] = {expected}")
    report = report.reshape(expected)
    experts = numpy.sort(report[:, list(moe.moe_layers)].astype(numpy.int16), axis=-1)
    if experts.size and not (0 <= experts.min() <= experts.max() < moe.num_experts and (numpy.diff(experts, axis=-1) > 0).all()):
        raise RolloutError(f"{engine} reports experts that are not {moe.top_k} different ones of 0..{moe.num_experts - 1}")
    return torch.from_numpy(experts)
