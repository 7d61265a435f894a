"""What layers keep for their backward pass, in host memory in between."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megarl.train.offload import storages

SMALLEST = 4096  # bytes; a smaller tensor stays: a copy would take longer than its memory is worth


class ActivationOffload:
    """Copies what autograd saves to host memory, and back when the backward pass asks for it.

    torch's save_on_cpu would copy the weights too, and wait for each copy. Here copies to the host run beside the computation;
    those back do not. With full recomputation only the inputs of layers are saved, and so copied. On CPU it is done with plain
    copies.

    Args:
        stays: gives tensors that are there anyway: the weights, which linear layers save too.
    """

    def __init__(self, stays: Callable[[], Iterable[Tensor]]) -> None:
        self._stays = stays
        self._copying = torch.cuda.Stream() if torch.cuda.is_available() else None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it a forward pass is made; its backward pass may come later."""
        own = storages(self._stays())

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            is_small = tensor.numel() * tensor.element_size() < SMALLEST
            if is_small or tensor.untyped_storage()._cdata in own:
                return tensor.device, tensor
            return tensor.device, self._to_host(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._back):
            yield

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._copying is not None)
        if self._copying is None:
            return host.copy_(tensor)
        self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copying)
        return host

    def _back(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        if self._copying is not None:
            torch.cuda.current_stream().wait_stream(self._copying)
        return tensor.to(device, non_blocking=True)
