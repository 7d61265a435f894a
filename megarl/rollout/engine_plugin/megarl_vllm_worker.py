"""Receives MegaRL's weights inside vLLM's workers.

Runs in the engine's own environment: its folder is put on PYTHONPATH and the class named in ``--worker-extension-cls``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megarl_weight_receiver import WeightReceiver


class MegaRLWorkerExtension:
    """Methods that ``collective_rpc`` can call on every worker; arguments arrive as JSON values."""

    rank: int  # vLLM mixes this class into its worker, which has these two
    model_runner: Any
    _megarl_receiver: WeightReceiver

    def megarl_rank(self) -> str:
        """This worker's rank among the server's workers."""
        return str(self.rank)

    def megarl_join(self, host: str, port: int, world_size: int, timeout: float) -> None:
        """Join the trainer's group, whose rank 0 is the sender."""
        self._megarl_receiver = WeightReceiver(host, port, world_size, 1 + self.rank, timeout)

    def megarl_receive(self) -> None:
        """Load one whole set of weights; raises when the sender gives up or a parameter got no value."""
        runner = self.model_runner
        runner.reload_weights(weights_iterator=self._megarl_incoming())
        _refresh_tied_layers(runner.get_model())
        _pack_experts(runner.get_model())
        # The trainer checks names and shapes before it sends; a parameter that is still on meta is a name vLLM did not map.
        unset = [name for name, parameter in runner.get_model().named_parameters() if parameter.is_meta]
        if unset:
            raise RuntimeError(f"vLLM gave no value to {unset}")

    def _megarl_incoming(self) -> Iterator[tuple[str, torch.Tensor]]:
        while (tensors := self._megarl_receiver.receive()) is not None:
            yield from tensors


def _refresh_tied_layers(model: torch.nn.Module) -> None:
    """Prepare again the layers that share the parameter of an earlier one, as a tied output layer does.

    vLLM's reload updates the shared parameter but not what the second layer derived from it at start: on CPU a packed copy,
    with which it would go on computing the old logits.
    """
    seen: set[int] = set()
    layer: Any
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and id(weight) in seen:
            layer.quant_method.process_weights_after_loading(layer)
        seen.add(id(weight))


def _pack_experts(model: torch.nn.Module) -> None:
    """Pack the weights of experts for their CPU kernels.

    vLLM does so when it first loads a model, not on a reload (unquantized_fused_moe_method.py): the kernels would read the new
    weights in the wrong order.
    """
    layer: Any
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and layer.w13_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)
