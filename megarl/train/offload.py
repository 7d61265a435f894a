"""What waits in host memory: a model's tensors while other models work, and activations until their backward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

SMALLEST_ACTIVATION = 4096  # bytes; a smaller tensor stays: a copy would take longer than its memory is worth


class Offloaded:
    """Tensors that are on the device only while somebody uses them.

    Their storages are emptied and filled again in place, as megatron-core does with its own buffers: parameters, gradients and
    optimizer state are views of a few large storages, and every view stays what it was. On CPU the same happens with plain copies.

    Args:
        tensors: gives them; asked each time they leave, for an optimizer makes its state late.
        contents: what has to be kept: tensors that change while they are used, constant ones, or nothing of them: gradient
            buffers, which are cleared before each use anyway, come back with arbitrary values.
        enabled: otherwise they always stay.
    """

    def __init__(
        self, tensors: Callable[[], Iterable[Tensor]], contents: Literal["changing", "constant", "dropped"], *, enabled: bool
    ) -> None:
        self._tensors = tensors
        self._contents = contents
        self._enabled = enabled
        self._num_users = 1  # whoever builds the model, until release
        self._emptied: list[tuple[UntypedStorage, int]] = []
        self._copies: dict[int, Tensor] = {}  # kept while the tensors are back: pinning memory is slow

    def release(self) -> None:
        """End a use; the tensors leave after the last one."""
        self._num_users -= 1
        if self._enabled and self._num_users == 0:
            self._move_out()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the tensors can be used."""
        if self._enabled and self._num_users == 0:
            self._move_in()
        self._num_users += 1
        try:
            yield
        finally:
            self.release()

    def empty(self) -> None:
        """Drop the tensors' memory for good, whether they are offloaded or not."""
        for storage in storages(self._tensors()).values():
            storage.resize_(0)

    @torch.no_grad()
    def _move_out(self) -> None:
        current = storages(self._tensors())
        sizes = {key: storage.nbytes() for key, storage in current.items()}
        # a state that was loaded has replaced others, and may have taken the identity of one
        self._copies = {key: copy for key, copy in self._copies.items() if sizes.get(key) == copy.numel()}
        for key, storage in current.items():
            if self._contents == "changing" or (self._contents == "constant" and key not in self._copies):
                if key not in self._copies:
                    self._copies[key] = torch.empty(sizes[key], dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._copies[key].copy_(_bytes_of(storage))
            storage.resize_(0)
            self._emptied.append((storage, sizes[key]))

    @torch.no_grad()
    def _move_in(self) -> None:
        for storage, num_bytes in self._emptied:
            storage.resize_(num_bytes)
            if self._contents != "dropped":
                _bytes_of(storage).copy_(self._copies[storage._cdata])
        self._emptied.clear()


def storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Return the storages behind some tensors, each once, by its identity."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """Return the storage as uint8 [bytes of the storage], in its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


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
        """Let a forward pass be made within the block; its backward pass may come later."""
        own = storages(self._stays())

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            is_small = tensor.numel() * tensor.element_size() < SMALLEST_ACTIVATION
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
