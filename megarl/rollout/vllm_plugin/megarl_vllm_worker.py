"""Receives MegaRL's weights inside vLLM's workers.

Runs in the engine's own environment: its folder is put on PYTHONPATH and the class named in ``--worker-extension-cls``. Imports
only the standard library, torch and (through the worker it extends) vLLM. The other end is megarl/rollout/weight_sender.py.
"""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

CHUNK_BYTES = 64 << 20  # the same number as the sender's


class MegaRLWorkerExtension:
    """Methods that ``collective_rpc`` can call on every worker; arguments arrive as JSON values."""

    rank: int  # vLLM mixes this class into its worker, which has these two
    model_runner: Any
    _megarl_group: Any

    def megarl_rank(self) -> str:
        """This worker's rank among the server's workers."""
        return str(self.rank)

    def megarl_join(self, host: str, port: int, world_size: int, timeout: float) -> None:
        """Join the trainer's group, whose rank 0 is the sender."""
        limit = timedelta(seconds=timeout)
        store = TCPStore(host, port, world_size, is_master=False, timeout=limit)
        rank = 1 + self.rank
        self._megarl_group = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, limit)

    def megarl_receive(self) -> None:
        """Load one whole set of weights; raises when the sender gives up or a parameter got no value."""
        runner = self.model_runner
        runner.reload_weights(weights_iterator=self._megarl_incoming())
        _refresh_tied_layers(runner.get_model())
        # The trainer checks names and shapes before it sends; a parameter that is still on meta is a name vLLM did not map.
        unset = [name for name, parameter in runner.get_model().named_parameters() if parameter.is_meta]
        if unset:
            raise RuntimeError(f"vLLM gave no value to {unset}")

    def _megarl_incoming(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Decode the sender's messages: header length, JSON header, then the tensors' bytes."""
        while True:
            length = torch.empty(1, dtype=torch.int64)
            self._megarl_broadcast(length)
            encoded = torch.empty(int(length), dtype=torch.uint8)
            self._megarl_broadcast(encoded)
            header = json.loads(encoded.numpy().tobytes())
            if header["kind"] == "end":
                return
            if header["kind"] == "abort":
                raise RuntimeError(f"the trainer gave the update up: {header['reason']}")
            flat = torch.empty(header["bytes"], dtype=torch.uint8)
            for chunk in flat.split(CHUNK_BYTES):
                self._megarl_broadcast(chunk)
            for name, dtype, shape, start, end in header["tensors"]:
                yield name, flat[start:end].view(getattr(torch, dtype)).view(shape)

    def _megarl_broadcast(self, tensor: torch.Tensor) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._megarl_group.broadcast([tensor], options).wait()


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
