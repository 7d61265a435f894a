"""Receives MegaRL's weights inside vLLM's workers.

Runs in the engine's own environment: its folder is put on PYTHONPATH and the class named in ``--worker-extension-cls``.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megarl_slice_receiver import SliceReceiver
from megarl_weight_receiver import WeightReceiver
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer


class MegaRLWorkerExtension:
    """Methods that ``collective_rpc`` can call on every worker; arguments arrive as JSON values."""

    rank: int  # vLLM mixes this class into its worker, which has these four
    device: torch.device
    model_runner: Any
    vllm_config: Any
    _megarl_receiver: WeightReceiver
    _megarl_slices: SliceReceiver

    def megarl_place(self) -> str:
        """Return this worker's rank among the server's workers, how the server divides the model, the model's RoPE, and which
        log-probs it reports, as JSON."""
        parallel = self.vllm_config.parallel_config
        sizes = {name: getattr(parallel, f"{name}_parallel_size") for name in ("tensor", "pipeline", "data")}
        model = self.vllm_config.model_config
        reported = {"rope_parameters": model.hf_text_config.rope_parameters, "logprobs_mode": model.logprobs_mode}
        return json.dumps({"rank": self.rank, "experts": parallel.enable_expert_parallel, **reported, **sizes})

    def megarl_join(self, host: str, port: int, world_size: int, timeout: float) -> None:
        """Join the trainer's group for whole tensors, whose rank 0 is the sender."""
        self._megarl_receiver = WeightReceiver(host, port, world_size, 1 + self.rank, timeout)

    def megarl_join_slices(self, host: str, port: int, world_size: int, first_rank: int, timeout: float) -> None:
        """Join the trainer's group for slices, in which the server's workers have the ranks from ``first_rank`` on."""
        self._megarl_slices = SliceReceiver(host, port, world_size, first_rank + self.rank, timeout, self.device)

    def megarl_receive(self) -> None:
        """Load one whole set of tensors; raises when the sender gives up or a parameter got no value."""
        self.model_runner.reload_weights(weights_iterator=self._megarl_incoming())
        self._megarl_finish()

    def megarl_receive_slices(self) -> None:
        """Write one whole set of this worker's slices; raises when one does not come or does not fit."""
        model = self.model_runner.get_model()
        layers = _Layers(model, [name for name, *_ in self._megarl_slices.parameters])
        self._megarl_slices.receive(layers)
        finalize_layerwise_reload(model, self.vllm_config.model_config)
        self._megarl_finish()

    def _megarl_incoming(self) -> Iterator[tuple[str, Tensor]]:
        while (tensors := self._megarl_receiver.receive()) is not None:
            yield from tensors

    def _megarl_finish(self) -> None:
        model = self.model_runner.get_model()
        _refresh_tied_layers(model)
        _pack_experts(model)
        # a parameter that is still on meta is one that the trainer did not send, or that vLLM did not map
        unset = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if unset:
            raise RuntimeError(f"vLLM gave no value to {unset}")


class _Layers:
    """vLLM's parameters as the trainer writes slices into them.

    A layer that computes with its parameters as they are loaded is written in place. Any other is made anew in the form that
    checkpoints are loaded into, processed when all of it has come, and copied into the tensors that its kernels use: vLLM's own
    layer-wise reload, with slices instead of its weight loaders (model_executor/model_loader/reload/layerwise.py).
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._model = model
        self._left = Counter(self._layer(name) for name in names)
        in_place = [layer for layer in self._left if _computes_with_loaded_parameters(layer)]
        initialize_layerwise_reload(model)
        for layer in in_place:
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            info.reset()

    def open(self, name: str) -> Tensor:
        layer = self._layer(name)
        materialize_layer(layer, get_layerwise_info(layer))
        return getattr(layer, name.rpartition(".")[2]).data

    def finish(self, name: str) -> None:
        layer = self._layer(name)
        self._left[layer] -= 1
        info = get_layerwise_info(layer)
        if self._left[layer] == 0 and info.can_load():
            _layerwise_process(layer, info)

    def _layer(self, name: str) -> nn.Module:
        return self._model.get_submodule(name.rpartition(".")[0])


def _computes_with_loaded_parameters(layer: nn.Module) -> bool:
    """Return True for norms, and on GPUs for unquantized linear and embedding layers, which the CPU backend packs."""
    method = getattr(layer, "quant_method", None)
    on_gpu = next(layer.parameters()).device.type == "cuda"
    return method is None or (on_gpu and type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def _refresh_tied_layers(model: nn.Module) -> None:
    """Prepare again the layers that share the parameter of an earlier one, as a tied output layer does.

    vLLM's reload updates the shared parameter but not what the second layer derived from it at start: on CPU a packed copy,
    with which it would go on computing the old logits.
    """
    seen: set[int] = set()
    layer: Any
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and id(weight) in seen:
            layer.quant_method.process_weights_after_loading(layer)
        seen.add(id(weight))


def _pack_experts(model: nn.Module) -> None:
    """Pack the weights of experts for their CPU kernels.

    vLLM does so when it first loads a model, not on a reload (unquantized_fused_moe_method.py): the kernels would read the new
    weights in the wrong order.
    """
    layer: object
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and layer.w13_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)
